"""Reads the labeling configuration of a project: its tools for boxes, masks and points, and the data of its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from xml.etree import ElementTree

from mal_train.core.errors import ConfigError

BOXES: Final = {"RectangleLabels": "rectanglelabels", "Rectangle": "rectangle"}
MASKS: Final = {"BrushLabels": "brushlabels", "PolygonLabels": "polygonlabels"}
"""Tags and the types of their regions; if an image has several mask tags, the first type here is used."""

POINTS: Final = {"KeyPointLabels": "keypointlabels"}
POSITIVE: Final = "object"
NEGATIVE: Final = "background"
"""Labels, in any case, of a control for points that correct masks; one without both of them is for other points."""

MAX_CONFIG_CHARS: Final = 1_000_000


@dataclass(frozen=True)
class Control:
    """A control tag of the labeling configuration.

    Attributes:
        name: its name, `from_name` in regions.
        to_name: name of the image that it annotates.
        region_type: type of its regions.
        labels: its classes.
    """

    name: str
    to_name: str
    region_type: str
    labels: tuple[str, ...]

    @cached_property
    def known(self) -> frozenset[str]:
        """Its classes, to look many labels up."""
        return frozenset(self.labels)


@dataclass(frozen=True)
class LabelConfig:
    """The part of a labeling configuration that concerns boxes, masks and points that correct masks.

    Attributes:
        boxes: controls for boxes, by name.
        masks: the control for masks of each image, by image name.
        points: controls for points that correct masks, by name.
        image_fields: the field of a task's data with the URL of each image, by image name.
    """

    boxes: Mapping[str, Control]
    masks: Mapping[str, Control]
    points: Mapping[str, Control]
    image_fields: Mapping[str, str]

    def mask_control(self, to_name: str, labels: tuple[str, ...]) -> tuple[Control, tuple[str, ...]]:
        """Returns the control for masks of an image, and those of the labels of a box that it has.

        A box without a label gets the label of the control if there is only one.

        Raises:
            ConfigError: the image has no control for masks, or the control has none of the labels.
        """
        control = self.masks.get(to_name)
        if control is None:
            raise ConfigError(
                f"labeling configuration: no control for masks of image {to_name!r}; add "
                f'<BrushLabels name="mask" toName="{to_name}"> with the classes of the boxes'
            )
        known = tuple(label for label in labels if label in control.known)
        if not labels and len(control.labels) == 1:
            known = control.labels
        if not known:
            missing = ", ".join(labels) or "default label for boxes without one"
            raise ConfigError(
                f"labeling configuration: control {control.name!r} has no {missing}; its labels are "
                f"{', '.join(control.labels) or 'none'}; add the labels of the boxes"
            )
        return control, known


def read_label_config(xml: str) -> LabelConfig:
    """Parses the XML of a labeling configuration.

    Raises:
        ConfigError: it is not valid XML, or has no control for boxes on an image.
    """
    if len(xml) > MAX_CONFIG_CHARS:
        raise ConfigError(f"labeling configuration: {len(xml)} characters; at most {MAX_CONFIG_CHARS}")
    try:
        root = ElementTree.fromstring(xml)
    # ValueError: half of a surrogate pair, which JSON can hold.
    except (ElementTree.ParseError, ValueError) as error:
        raise ConfigError(f"labeling configuration: not valid XML ({error})") from None
    image_fields = {
        tag.get("name", ""): tag.get("value", "").removeprefix("$")
        for tag in root.iter("Image")
        if tag.get("value", "").startswith("$")
    }
    boxes = {control.name: control for control in _controls(root, BOXES) if control.to_name in image_fields}
    masks: dict[str, Control] = {}
    for control in _controls(root, MASKS):
        masks.setdefault(control.to_name, control)
    if not boxes:
        raise ConfigError(
            "labeling configuration: no control for boxes on an image; add <Image> with "
            'value="$..." and <RectangleLabels> with its toName'
        )
    points = {
        control.name: control
        for control in _controls(root, POINTS)
        if {POSITIVE, NEGATIVE} <= {label.casefold() for label in control.labels}
    }
    return LabelConfig(boxes, masks, points, image_fields)


def _controls(root: ElementTree.Element, tags: Mapping[str, str]) -> list[Control]:
    return [
        Control(
            tag.get("name", ""),
            tag.get("toName", ""),
            region_type,
            tuple(label.get("alias", "") or label.get("value", "") for label in tag.iter("Label")),
        )
        for name, region_type in tags.items()
        for tag in root.iter(name)
    ]
