"""Writing labeled COCO files."""

import errno
import json
import math
import os
import resource
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from mal_train.core.coco.annotations import CocoFile, parse_coco, read_coco
from mal_train.core.coco.output import (
    PROVENANCE_KEY,
    error_fields,
    label_fields,
    labeled_file,
    mask_score_of,
    write_json_atomic,
)
from mal_train.core.errors import OutputError
from mal_train.core.masks import rle
from tests.mal_train.core.coco.coco_rows import dataset, row
from tests.reference import shared


class TestLabeledFile:
    result = label_fields({"size": [48, 64], "counts": "abc"}, 12, 0.5, ["BOX_CLIPPED"])

    def labeled(self, raw: dict[str, Any], results: dict[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        return labeled_file(parse_coco(raw), results or {}, **options)

    def test_user_fields_and_box_are_kept_and_area_is_the_mask_area(self) -> None:
        raw = dataset(row(bbox=[123.45, 2, 10, 20], area=200, note={"a": 1}), info={"by": "me"}, extra=[1])
        out = self.labeled(raw, {1: self.result})
        assert out["info"] == {"by": "me"}
        assert out["extra"] == [1]
        assert out["annotations"] == [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [123.45, 2, 10, 20],
                "area": 12.0,
                "note": {"a": 1},
                "iscrowd": 0,
                "segmentation": {"size": [48, 64], "counts": "abc"},
                "score": 0.5,
                "flags": ["BOX_CLIPPED"],
            }
        ]

    def test_rows_keep_file_order_for_any_order_of_results(self) -> None:
        raw = dataset(row("b"), row("a"), row(3))
        out = self.labeled(raw, {3: self.result, "a": self.result, "b": self.result})
        assert [r["id"] for r in out["annotations"]] == ["b", "a", 3]

    def test_input_is_not_changed(self) -> None:
        raw = dataset(row(), row(2, iscrowd=1), row(3, bbox=None))
        before = json.dumps(raw)
        self.labeled(raw, {1: self.result}, provenance={"a": 1})
        assert json.dumps(raw) == before

    def test_a_failed_row_keeps_its_fields_and_gets_an_error_and_an_empty_mask(self) -> None:
        raw = dataset(row(note="mine", segmentation=[[1, 1, 2, 2, 3, 1]]))
        (out,) = self.labeled(raw, {1: error_fields("IMAGE_NOT_FOUND", "a.png: no such file")})["annotations"]
        assert out["error"] == {"reason": "IMAGE_NOT_FOUND", "message": "a.png: no such file"}
        assert out["note"] == "mine"
        assert (out["area"], out["score"]) == (0.0, 0.0)
        mask = rle.Rle.from_coco(out["segmentation"])
        assert (mask.height, mask.width, rle.area(mask)) == (48, 64, 0)

    def test_a_failed_row_of_an_image_of_unknown_size_has_no_mask(self) -> None:
        raw = dataset(row(segmentation=[[1, 1, 2, 2, 3, 1]]), images=[{"id": 1, "file_name": "a.png"}])
        (out,) = self.labeled(raw, {1: error_fields("IMAGE_NOT_FOUND", "")})["annotations"]
        assert "segmentation" not in out

    def test_an_invalid_row_gets_its_error(self) -> None:
        (out,) = self.labeled(dataset(row(bbox=[1, 2])))["annotations"]
        assert out["error"]["reason"] == "BAD_BOX"
        assert out["bbox"] == [1, 2]

    def test_a_row_without_a_result_is_reported(self) -> None:
        (out,) = self.labeled(dataset(row()))["annotations"]
        assert out["error"]["reason"] == "NOT_ANSWERED"

    def test_kept_rows_are_copied_unchanged(self) -> None:
        raw = dataset(row(segmentation=[[1, 1, 2, 2, 3, 1]], score=0.1))
        assert self.labeled(raw, keep={1})["annotations"] == raw["annotations"]

    def test_crowd_rows_are_copied_and_flagged(self) -> None:
        raw = dataset(row(iscrowd=1, segmentation={"size": [1, 1], "counts": [1]}))
        (out,) = self.labeled(raw)["annotations"]
        assert out == {**raw["annotations"][0], "flags": ["CROWD"]}

    def test_results_of_an_earlier_run_are_removed(self) -> None:
        raw = dataset(row(error={"reason": "X", "message": ""}, agreement=0.5, score=0.9, flags=["FULL_BOX"]))
        (out,) = self.labeled(raw, {1: self.result})["annotations"]
        assert "error" not in out
        assert "agreement" not in out
        assert out["flags"] == ["BOX_CLIPPED"]

    def test_entries_that_are_not_objects_keep_their_index(self) -> None:
        out = self.labeled(dataset(None, row(), 5), {1: self.result})
        assert out["annotations"][0] is None
        assert out["annotations"][2] == 5

    def test_provenance_replaces_the_entry_of_an_earlier_run(self) -> None:
        raw = dataset(**{PROVENANCE_KEY: {"old": True}})
        assert PROVENANCE_KEY not in self.labeled(raw)
        assert self.labeled(raw, provenance={"branch": "student"})[PROVENANCE_KEY] == {"branch": "student"}

    def test_agreement_is_written_if_it_was_measured(self) -> None:
        assert label_fields({}, 1, 0.5, agreement=0.25)["agreement"] == 0.25
        assert "agreement" not in label_fields({}, 1, 0.5)

    def test_pycocotools_loads_labeled_failed_and_crowd_rows(self, tmp_path: Path) -> None:
        label = label_fields(rle.encode_region(np.ones((2, 2), dtype=np.bool_), 0, 0, (48, 64)).to_coco(), 4, 0.5)
        raw = dataset(row(1), row(2, bbox=None), row(3, iscrowd=1, segmentation=[[1, 1, 5, 5, 9, 1]]))
        path = tmp_path / "out.json"
        write_json_atomic(path, self.labeled(raw, {1: label}))
        coco = COCO(str(path))
        assert [int(coco.annToMask(coco.anns[n]).sum()) for n in (1, 2)] == [4, 0]
        assert coco.annToMask(coco.anns[3]).any()


class TestWriting:
    def test_a_written_object_reads_back_equal(self, tmp_path: Path) -> None:
        obj = {
            "a": [{"n": n, "s": "é\ud800"} for n in range(4001)],
            "empty": [],
            "info": {"x": [1.5, None]},
            "one": [1],
        }
        path = tmp_path / "x.json"
        write_json_atomic(path, obj)
        assert json.loads(path.read_text()) == obj
        assert path.read_text() == json.dumps(obj) + "\n"

    def test_nan_in_a_user_field_is_written(self, tmp_path: Path) -> None:
        write_json_atomic(tmp_path / "x.json", {"bbox": [math.nan]})
        assert math.isnan(json.loads((tmp_path / "x.json").read_text())["bbox"][0])

    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_json_atomic(tmp_path / "x.json", {})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o644

    @pytest.mark.parametrize(
        ("code", "remedy"),
        [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EIO, "writable")],
    )
    def test_a_full_disk_leaves_the_old_file_and_no_temporary_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
    ) -> None:
        path = tmp_path / "x.json"
        path.write_text("old")

        def fail(_descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=remedy):
            write_json_atomic(path, {"new": 1})
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_size_limit_is_an_output_error_and_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ, so the write fails with EFBIG, as on a real full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OutputError, match=r"x\.json"):
                write_json_atomic(path, {"a": ["x" * 100] * 5000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_missing_folder_is_an_output_error(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="folder"):
            write_json_atomic(tmp_path / "none" / "x.json", {})

    def test_a_folder_at_the_path_is_an_output_error(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").mkdir()
        with pytest.raises(OutputError):
            write_json_atomic(tmp_path / "x.json", {})
        assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]

    def test_an_unserializable_value_leaves_the_old_file_and_no_temporary_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_json_atomic(path, {"a": object()})
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_labeling_every_real_box_keeps_every_row() -> None:
    coco: CocoFile = read_coco(shared("data", "coco_val_dev", "annotations.json"))
    out = labeled_file(coco, {a.id: label_fields({}, 1, 0.5) for a in coco.annotations if a.id and not a.iscrowd})
    assert [r["id"] for r in out["annotations"]] == [a.id for a in coco.annotations]
    assert sum(r.get("flags") == ["CROWD"] for r in out["annotations"]) == 4
    assert not any("error" in r for r in out["annotations"])


@pytest.mark.parametrize(
    ("points", "is_corrected"),
    [
        ([], False),
        ([[3, 4, 1]], True),
        ([[3, 4, 0]], True),
        ([[1.5, 4, 0], [40.5, 4, 0], [3, 23.5, 0]], False),
        ([[1.5, 4, 0], [63.5, 47.5, 0]], False),
        ([[1.5, 4, 0], [12.5, 22.5, 0]], True),
    ],
)
def test_a_row_is_corrected_by_the_points_in_its_box(points: list[list[float]], is_corrected: bool) -> None:
    coco = parse_coco(dataset(row(bbox=[2, 3, 11, 20], points=points)))
    result = label_fields({"size": [48, 64], "counts": "abc"}, 12, 0.5)
    (labeled,) = labeled_file(coco, {1: result})["annotations"]
    assert labeled.get("corrected", False) is is_corrected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"score": 0.25}, {"score": 0.25, "mask_score": 0.9}),
        ({"score": 0.25, "mask_score": 0.4, "flags": []}, {"score": 0.25, "mask_score": 0.9}),
        ({"score": 0.4, "flags": []}, {"score": 0.9}),
        ({"mask_score": 0.4}, {"score": 0.9}),
        ({}, {"score": 0.9}),
    ],
    ids=["detector", "detector, labeled before", "labeled before", "odd", "no score"],
)
def test_the_score_that_a_row_came_with_is_kept(
    fields: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], **fields}
    image = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
    content = {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "cup"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    coco = read_coco(tmp_path / "a.json")
    results = [label_fields({}, 1, 0.9), error_fields("OUT_OF_MEMORY", "no")]
    labeled, failed = (labeled_file(coco, {1: result})["annotations"][0] for result in results)
    scores = {key: labeled[key] for key in ("score", "mask_score") if key in labeled}
    assert scores == expected
    assert mask_score_of(labeled) == 0.9
    assert mask_score_of(failed) == 0.0
    assert failed.get("score") == (0.25 if "mask_score" in expected else 0.0)
