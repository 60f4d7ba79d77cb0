"""Reads a project's labeling configuration: where boxes are drawn, where masks go, which field holds the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from mal_train.core.errors import ConfigError

BOXES: Final = {"RectangleLabels": "rectanglelabels", "Rectangle": "rectangle"}
MASKS: Final = {"BrushLabels": "brushlabels", "PolygonLabels": "polygonlabels"}
"""Tags and the type of their regions; of several mask tags of one picture the first kind here is used."""


@dataclass(frozen=True)
class Control:
    """A tool of the labeling page.

    Attributes:
        name: as regions refer to it (`from_name`).
        to_name: name of the picture that it draws on.
        kind: type of its regions.
        labels: the classes that it offers.
    """

    name: str
    to_name: str
    kind: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LabelConfig:
    """What of a labeling configuration concerns boxes and masks.

    Attributes:
        boxes: tools that draw boxes, by name.
        masks: for each picture the tool that its masks are given to.
        pictures: for each picture the field of a task's data that holds its address.
    """

    boxes: Mapping[str, Control]
    masks: Mapping[str, Control]
    pictures: Mapping[str, str]

    def mask_tool(self, to_name: str, labels: tuple[str, ...]) -> tuple[Control, tuple[str, ...]]:
        """The tool that takes the masks of a picture, and the labels of a box that it offers.

        A box without a label gets the tool's only label where there is but one.

        Raises:
            ConfigError: no tool for masks, or it offers none of the labels.
        """
        tool = self.masks.get(to_name)
        if tool is None:
            raise ConfigError(
                f"labeling configuration: nothing takes masks of the picture {to_name!r}; add "
                f'<BrushLabels name="mask" toName="{to_name}"> with the classes of the boxes'
            )
        known = tuple(label for label in labels if label in tool.labels)
        if not labels and len(tool.labels) == 1:
            known = tool.labels
        if not known:
            shown = ", ".join(labels) or "a box without a label"
            raise ConfigError(
                f"labeling configuration: {tool.name!r} does not offer {shown}; its labels are "
                f"{', '.join(tool.labels) or 'none'}; give it those of the boxes"
            )
        return tool, known


def read_label_config(xml: str) -> LabelConfig:
    """What the XML text says.

    Raises:
        ConfigError: no XML, no picture, or no tool that draws boxes on one.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ConfigError(f"labeling configuration: not readable as XML ({error})") from None
    pictures = {
        tag.get("name", ""): tag.get("value", "").removeprefix("$")
        for tag in root.iter("Image")
        if tag.get("value", "").startswith("$")
    }
    boxes = {control.name: control for control in _controls(root, BOXES) if control.to_name in pictures}
    masks: dict[str, Control] = {}
    for control in _controls(root, MASKS):
        masks.setdefault(control.to_name, control)
    if not boxes:
        raise ConfigError(
            "labeling configuration: no boxes are drawn on a picture in it; it needs <Image> with "
            'value="$..." and <RectangleLabels> with its toName'
        )
    return LabelConfig(boxes, masks, pictures)


def _controls(root: ElementTree.Element, tags: Mapping[str, str]) -> list[Control]:
    return [
        Control(
            tag.get("name", ""),
            tag.get("toName", ""),
            kind,
            tuple(label.get("alias", "") or label.get("value", "") for label in tag.iter("Label")),
        )
        for name, kind in tags.items()
        for tag in root.iter(name)
    ]
