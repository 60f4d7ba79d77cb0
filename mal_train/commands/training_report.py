"""Writes report.html at the end of a training: curves, metrics, masks, failures, settings and times."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mal_train.config.spec import Spec
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.annotations import CocoFile, JsonId
from mal_train.core.images.files import ImageSource
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import InstanceComparison
from mal_train.core.metrics.score_quality import BAD_IOU
from mal_train.core.report.charts import Point, downsample, line_chart
from mal_train.core.report.evaluation import evaluation_sections
from mal_train.core.report.overlays import png_data_uri
from mal_train.core.report.page import Card, Html, build_report, contact_sheet, folded, section, side_by_side, table
from mal_train.core.yaml_config import dump
from mal_train.training.box_proxy import BoxProxy
from mal_train.training.panels import around_median, close_ups
from mal_train.training.run_files import read_metrics
from mal_train.training.validation import ValidationSnapshot

WORST, TYPICAL = 24, 12
CLASSES = 20
_LOSSES = {
    "loss": "total",
    "loss_mil": "multiple instance",
    "loss_crf": "mean field",
    "loss_mask": "mask",
    "loss_logit": "logit bound",
}


def write_training_report(
    folder: Path, spec: Spec, facts: Sequence[tuple[str, str]], validation: ValidationSnapshot | None
) -> Path:
    """Writes <folder>/report.html, a page without external files, and returns its path.

    Args:
        folder: output folder of the run; metrics.csv in it gives the curves.
        spec: the spec; secrets are redacted.
        facts: (name, value) rows about the run: data, weights and their license, times.
        validation: the last validation; None without one.

    Raises:
        OutputError: the page cannot be written.
    """
    sections = [section("The run", table(["property", "value"], facts)), _curves(read_metrics(folder))]
    if validation is None:
        sections.append(section("Metrics", "", "There was no validation."))
    else:
        sections += _validation_sections(validation)
    sections.append(_settings(spec))
    path = folder / "report.html"
    write_text(path, build_report("Training", sections, str(folder)))
    return path


def _curves(rows: Sequence[Mapping[str, Any]]) -> Html:
    train = [row for row in rows if row["kind"] == "train"]
    losses = {name: downsample(_points(train, column)) for column, name in _LOSSES.items()}
    # Leave out losses that are switched off.
    losses = {name: points for name, points in losses.items() if any(y != 0.0 for _, y in points)}
    validations = [row for row in rows if row["kind"] == "val"]
    ious = {name: _points(validations, f"mIoU{size}") for name, size in _MIOU.items()}
    aps = {name: _points(validations, name) for name in ("AP@1", "AP@score")}
    charts = [
        line_chart(losses, "step", "loss"),
        line_chart({"learning rate": downsample(_points(train, "lr"))}, "step", "learning rate"),
    ]
    if any(ious.values()):
        charts += [line_chart(ious, "step", "mIoU"), line_chart(aps, "step", "AP")]
    if validations:
        charts.append(line_chart({name: _points(validations, name) for name in _PROXY}, "step", "without masks"))
    return section("Curves", side_by_side(*charts), "From metrics.csv; losses are means of neighboring steps.")


_PROXY = ("tightness", "stability", "box_proxy")
_MIOU = {"all": "", "small": "_small", "medium": "_medium", "large": "_large"}


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[Point]:
    return [(row["step"], row[column]) for row in rows if column in row]


def _validation_sections(validation: ValidationSnapshot) -> list[Html]:
    result, coco, image_dir = validation.result, validation.coco, validation.image_dir
    if not result.report.overall.count:
        return [
            section("Metrics", _proxy_table(result.proxy), "Last validation, student network; no masks to compare.")
        ]
    config = result.config
    small, medium, large = config.mask_thres
    note = (
        f"Last validation, student network. Thresholds: small {small:g}, medium {medium:g}, large {large:g}; "
        f"score: {config.score_meaning()}."
    )
    worst = result.compared[:WORST]
    cards = _cards(worst, coco, image_dir)
    sections = evaluation_sections(result.report, note, cards, len(worst) - len(cards))
    typical = _cards(around_median(result.compared, TYPICAL), coco, image_dir)
    if typical:
        sections.append(section("Typical masks", contact_sheet(typical), "Masks around the median IoU."))
    sections.append(
        section(
            "Failures by category",
            table(
                ["category, most failures first", "masks", f"IoU < {BAD_IOU:g}", "fraction", "empty"],
                failures_by_category(result.compared, coco.category_names)[:CLASSES],
            ),
            "A mask fails if its IoU with the ground truth is below 0.5; empty: no pixel is above the threshold.",
        )
    )
    return sections


def _proxy_table(proxy: BoxProxy) -> Html:
    return table(["metric", "value", "of"], [[name, value, proxy.count] for name, value in proxy.metrics().items()])


def failures_by_category(
    compared: Sequence[InstanceComparison], names: Mapping[JsonId, str]
) -> list[tuple[str, int, int, float, int]]:
    """Returns (category, masks, failures, their fraction, empty masks), most failures first.

    Args:
        compared: masks with their ground truth; a failure has IoU < 0.5.
        names: names of the categories, by id.
    """
    masks: Counter[JsonId] = Counter()
    bad: Counter[JsonId] = Counter()
    empty: Counter[JsonId] = Counter()
    for pair in compared:
        category = pair.row.category_id
        masks[category] += 1
        bad[category] += pair.row.iou < BAD_IOU
        empty[category] += rle.area(pair.prediction) == 0
    rows = [
        (names.get(category, str(category)), count, bad[category], bad[category] / count, empty[category])
        for category, count in masks.items()
    ]
    return sorted(rows, key=lambda row: (-row[2], -row[3], row[0]))


def _cards(compared: Sequence[InstanceComparison], coco: CocoFile, image_dir: ImageSource) -> list[Card]:
    return [
        Card(png_data_uri(panel.image), panel.title, panel.detail) for panel in close_ups(compared, coco, image_dir)
    ]


def _settings(spec: Spec) -> Html:
    # A training reads nothing of section tune, whose fields are not the same in every spec.
    values, defaults = (
        _flat(each.model_dump(mode="json", exclude={"tune"})) for each in (spec.without_secrets(), Spec())
    )
    changed = [(name, str(value), str(defaults[name])) for name, value in values.items() if value != defaults[name]]
    body = table(["field", "value", "default"], changed)
    body += folded("experiment.yaml: all fields", dump(spec.without_secrets()))
    return section("Settings", body, "Fields that differ from their default.")


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in data.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return fields
