"""The page that training leaves at its end, report.html: curves, figures, pictures, failures, settings, durations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mal_train.config.spec import Spec
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.annotations import CocoFile, JsonId
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import InstanceComparison
from mal_train.core.metrics.score_quality import BAD_IOU
from mal_train.core.report.charts import Point, downsample, line_chart
from mal_train.core.report.evaluation import evaluation_sections
from mal_train.core.report.overlays import png_data_uri
from mal_train.core.report.page import Card, Html, build_report, contact_sheet, folded, section, side_by_side, table
from mal_train.core.yaml_config import dump
from mal_train.training.panels import close_ups, typical
from mal_train.training.run_files import read_metrics
from mal_train.training.validation import Validated

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
    folder: Path, spec: Spec, facts: Sequence[tuple[str, str]], validated: Validated | None
) -> Path:
    """Writes <folder>/report.html, one file with everything in it, and returns its path.

    Args:
        folder: of the run; its metrics.csv gives the curves.
        spec: what was asked for; secrets are left out.
        facts: (what, figure) of the run: data, weights and their license, durations.
        validated: None where nothing was validated.

    Raises:
        OutputError: the page could not be written.
    """
    sections = [section("The run", table(["what", ""], facts)), _curves(read_metrics(folder))]
    if validated is None:
        sections.append(section("Metrics", "", "There was no validation: no file with masks was given."))
    else:
        sections += _validation_sections(validated)
    sections.append(_settings(spec))
    path = folder / "report.html"
    write_text(path, build_report("Training", sections, str(folder)))
    return path


def _curves(rows: Sequence[Mapping[str, Any]]) -> Html:
    train = [row for row in rows if row["kind"] == "train"]
    losses = {name: downsample(_points(train, column)) for column, name in _LOSSES.items()}
    # A loss that is off all the time says nothing.
    losses = {name: points for name, points in losses.items() if any(y != 0.0 for _, y in points)}
    validations = [row for row in rows if row["kind"] == "val"]
    ious = {name: _points(validations, f"mIoU{size}") for name, size in _MIOU.items()}
    aps = {name: _points(validations, name) for name in ("AP@1", "AP@score")}
    charts = [
        line_chart(losses, "step", "loss"),
        line_chart({"learning rate": downsample(_points(train, "lr"))}, "step", "learning rate"),
    ]
    if validations:
        charts += [line_chart(ious, "step", "mIoU"), line_chart(aps, "step", "AP")]
    return section("Curves", side_by_side(*charts), "From metrics.csv; losses are means of neighboring steps.")


_MIOU = {"all": "", "small": "_small", "medium": "_medium", "large": "_large"}


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[Point]:
    return [(row["step"], row[column]) for row in rows if column in row]


def _validation_sections(validated: Validated) -> list[Html]:
    found, coco, image_dir = validated.found, validated.coco, validated.image_dir
    config = found.config
    small, medium, large = config.mask_thres
    note = (
        f"Of the last validation, student network. Thresholds: small {small:g}, medium {medium:g}, large {large:g}; "
        f"score: {config.score_meaning()}."
    )
    sections = evaluation_sections(found.report, note, _cards(found.compared[:WORST], coco, image_dir))
    usual = _cards(typical(found.compared, TYPICAL), coco, image_dir)
    if usual:
        sections.append(section("Typical masks", contact_sheet(usual), "Those round the median IoU."))
    sections.append(
        section(
            "Failures by category",
            table(
                ["category, most failures first", "masks", f"IoU < {BAD_IOU:g}", "share", "empty"],
                failures_by_category(found.compared, coco.category_names)[:CLASSES],
            ),
            "A mask fails when its IoU with the true one is below one half; empty: no pixel passed the threshold.",
        )
    )
    return sections


def failures_by_category(
    compared: Sequence[InstanceComparison], names: Mapping[JsonId, str]
) -> list[tuple[str, int, int, float, int]]:
    """(category, masks, IoU < 0.5, their share, empty ones), most failures first; categories without masks are absent.

    Args:
        compared: masks with their ground truth.
        names: of categories by id.
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


def _cards(compared: Sequence[InstanceComparison], coco: CocoFile, image_dir: Path) -> list[Card]:
    return [
        Card(png_data_uri(entry.picture), entry.title, entry.detail) for entry in close_ups(compared, coco, image_dir)
    ]


def _settings(spec: Spec) -> Html:
    asked, usual = _flat(spec.without_secrets().model_dump(mode="json")), _flat(Spec().model_dump(mode="json"))
    changed = [(name, str(value), str(usual[name])) for name, value in asked.items() if value != usual[name]]
    body = table(["field", "value", "default"], changed)
    body += folded("experiment.yaml: every field", dump(spec.without_secrets()))
    return section("Settings", body, "Fields that differ from their default.")


def _flat(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return found
