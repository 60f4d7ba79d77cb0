"""COCO files: what is refused, what is carried, what comes out."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from mal_train.errors import BadDataset, OutputError
from mal_train.labeling import rle
from mal_train.labeling.coco import (
    PROVENANCE_KEY,
    Annotation,
    CocoFile,
    Reason,
    answer_fields,
    by_image,
    error_fields,
    id_order,
    labelled_file,
    parse_coco,
    read_coco,
    tao_keeps,
    training_refusal,
    write_json_atomic,
)
from mal_train.labeling.settings import Compat
from tests.reference import fixture, shared


def row(annotation_id: Any = 1, **fields: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], **fields}


def dataset(*rows: Any, **fields: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": list(rows),
        **fields,
    }


def only(raw: dict[str, Any]) -> Annotation:
    (annotation,) = parse_coco(raw).annotations
    return annotation


class TestWholeFile:
    def test_missing_file_is_named_with_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(BadDataset, match=r"none\.json: cannot be read \(No such file.*COCO JSON"):
            read_coco(tmp_path / "none.json")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty file"),
            (b" \n", "empty file"),
            (b"{", "not JSON"),
            (b"\xff\xfe\x00", "not JSON"),
            (b"[" * 200_000, "nested too deeply"),
            (b"[]", "a list is a COCO results file"),
            (b"null", "holds null"),
            (b'{"images": [], "annotations": []}', "has no 'categories'"),
            (b"{}", "has no 'images', 'annotations', 'categories'"),
            (b'{"images": {}, "annotations": [], "categories": []}', "'images' is an object; it must be a list"),
            (b'{"images": [], "annotations": null, "categories": []}', "'annotations' is null"),
            (b'{"images": [], "annotations": [], "categories": [], "x": 1' + b"0" * 5000 + b"}", "not JSON"),
        ],
    )
    def test_what_is_no_coco_file_is_refused_with_its_name(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(BadDataset, match=r"x\.json") as caught:
            read_coco(path)
        assert message in str(caught.value)

    def test_byte_order_mark_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(dataset(row())).encode())
        assert len(read_coco(path).annotations) == 1

    def test_repeated_annotation_ids_refuse_the_file_and_list_the_first(self) -> None:
        rows = [row(n) for n in range(9)] * 2
        with pytest.raises(BadDataset, match=r"annotation id 0, 1, 2, 3, 4 and 4 more used more than once"):
            parse_coco(dataset(*rows))

    def test_repeated_image_ids_refuse_the_file(self) -> None:
        with pytest.raises(BadDataset, match='image id "a" used more than once'):
            parse_coco(dataset(images=[{"id": "a", "file_name": "a.png"}, {"id": "a", "file_name": "b.png"}]))

    def test_number_and_string_of_the_same_digits_are_two_ids(self) -> None:
        assert [a.id for a in parse_coco(dataset(row(1), row("1"), row(1.5))).annotations] == [1, "1", 1.5]

    def test_no_annotations_is_a_data_set_too(self) -> None:
        ((image, annotations),) = by_image(parse_coco(dataset()))
        assert image.size_wh == (64, 48)
        assert annotations == []

    @pytest.mark.parametrize("name", ["coco_val_dev", "coco_train_mini", "coco_person_single"])
    def test_real_files_have_no_problem(self, name: str) -> None:
        coco = read_coco(shared("data", name, "annotations.json"))
        assert not coco.problem_counts()
        assert coco.notes == ()
        assert sum(len(rows) for _, rows in by_image(coco)) == len(coco.annotations)


class TestRows:
    def test_good_row_is_read(self) -> None:
        annotation = only(dataset(row("k", iscrowd=1, note="mine")))
        assert annotation.box_xywh == (1.0, 2.0, 10.0, 20.0)
        assert annotation.iscrowd
        assert annotation.problem is None
        assert annotation.raw["note"] == "mine"

    @pytest.mark.parametrize(
        ("bad", "reason", "message"),
        [
            (None, Reason.NOT_AN_OBJECT, "annotations[0]: null; an object is needed"),
            (7, Reason.NOT_AN_OBJECT, "annotations[0]: a number"),
            (row(None), Reason.BAD_ID, "annotations[0]: id null"),
            (row([1]), Reason.BAD_ID, "id [1]; a number or a string"),
            (row(True), Reason.BAD_ID, "id true"),
            (row(math.nan), Reason.BAD_ID, "id NaN"),
            (row(image_id=2), Reason.IMAGE_UNKNOWN, "annotation 1: image_id 2 is not among the images"),
            (row(image_id="1"), Reason.IMAGE_UNKNOWN, "there is an image 1, a number"),
            (row(image_id={}), Reason.IMAGE_UNKNOWN, "image_id {}"),
            (row(category_id=4), Reason.CATEGORY_UNKNOWN, "category_id 4 is not among the categories"),
            (row(category_id=None), Reason.CATEGORY_UNKNOWN, "category_id null"),
            (row(bbox=None), Reason.BAD_BOX, "annotation 1: has no bbox"),
            (row(bbox=[1, 2, 3]), Reason.BAD_BOX, "bbox [1, 2, 3]; four finite numbers"),
            (row(bbox=[1, 2, 3, 4, 5]), Reason.BAD_BOX, "four finite numbers"),
            (row(bbox={"x": 1}), Reason.BAD_BOX, "four finite numbers"),
            (row(bbox=[1, 2, "3", 4]), Reason.BAD_BOX, 'bbox [1, 2, "3", 4]'),
            (row(bbox=[1, 2, True, 4]), Reason.BAD_BOX, "four finite numbers"),
            (row(bbox=[1, 2, math.nan, 4]), Reason.BAD_BOX, "bbox [1, 2, NaN, 4]"),
            (row(bbox=[1, 2, math.inf, 4]), Reason.BAD_BOX, "Infinity"),
            (row(bbox=[1, 2, 10**400, 4]), Reason.BAD_BOX, "four finite numbers"),
            (row(bbox=[1, 2, 10**5000, 4]), Reason.BAD_BOX, "a number of thousands of digits"),
            (row(bbox=[0] * 1000), Reason.BAD_BOX, "..."),
            (row(iscrowd="0"), Reason.BAD_ISCROWD, 'iscrowd "0"; 0 or 1'),
            (row(iscrowd=2), Reason.BAD_ISCROWD, "iscrowd 2"),
        ],
    )
    def test_faulty_row_stays_in_its_place_and_says_why(self, bad: Any, reason: Reason, message: str) -> None:
        coco = parse_coco(dataset(bad, row("good")))
        assert [a.id for a in coco.annotations][1:] == ["good"]
        assert coco.annotations[1].problem is None
        assert coco.annotations[0].reason is reason
        assert message in str(coco.annotations[0].problem)
        assert coco.problem_counts() == {str(reason): 1}

    def test_image_id_written_as_number_where_the_file_has_strings_is_hinted_at(self) -> None:
        images = [{"id": "1", "file_name": "a.png"}]
        assert "a string: the types must be the same" in str(only(dataset(row(), images=images)).problem)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            ({"id": 1, "width": 64, "height": 48}, "image 1: file_name null"),
            ({"id": 1, "file_name": ""}, 'file_name ""'),
            ({"id": 1, "file_name": "a\0b"}, "file_name"),
            ({"id": 1, "file_name": "a", "width": -5, "height": 4}, "width -5; a whole number of pixels"),
            ({"id": 1, "file_name": "a", "width": 5, "height": "4"}, 'height "4"'),
            ({"id": 1, "file_name": "a", "width": 1e12, "height": 4}, "width 1000000000000.0"),
            ({"id": 1, "file_name": "a", "width": math.nan, "height": 4}, "width NaN"),
            ({"id": 1, "file_name": "a", "width": 10**6, "height": 10**6}, "1000000 x 1000000 px; the limit is"),
        ],
    )
    def test_unusable_image_gives_its_problem_to_its_rows(self, image: dict[str, Any], message: str) -> None:
        annotation = only(dataset(row(), images=[image]))
        assert annotation.reason is Reason.IMAGE_UNUSABLE
        assert message in str(annotation.problem)

    def test_image_without_size_is_usable(self) -> None:
        coco = parse_coco(dataset(row(), images=[{"id": 1, "file_name": "a.png"}]))
        assert coco.images[1].size_wh is None
        assert coco.annotations[0].problem is None

    def test_whole_float_sizes_are_read_as_pixels(self) -> None:
        coco = parse_coco(dataset(images=[{"id": 1, "file_name": "a.png", "width": 64.0, "height": 48.0}]))
        assert coco.images[1].size_wh == (64, 48)

    def test_faults_that_no_annotation_can_carry_are_noted(self) -> None:
        images = [{"id": 1, "file_name": "a.png"}, {"file_name": "b.png"}, "c"]
        categories = [{"id": 3, "name": "cup"}, {"id": 3, "name": "mug"}, {"name": "no id"}, None]
        coco = parse_coco(dataset(row(), images=images, categories=categories))
        assert [note.split(":")[0] for note in coco.notes] == [
            "images[1]",
            "images[2]",
            "categories[1]",
            "categories[2]",
            "categories[3]",
        ]
        assert coco.category_names == {3: "cup"}
        assert coco.annotations[0].problem is None

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        st.lists(
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=5)
                    | st.dictionaries(
                        st.sampled_from(["id", "image_id", "category_id", "bbox", "iscrowd", "x"]), inner, max_size=6
                    )
                ),
                max_leaves=12,
            ),
            max_size=6,
        )
    )
    def test_any_json_is_refused_or_kept_row_for_row(self, rows: list[Any]) -> None:
        try:
            coco = parse_coco(dataset(*rows))
        except BadDataset:
            # Two rows drew the same id.
            return
        assert len(coco.annotations) == len(rows)
        for annotation in coco.annotations:
            usable = annotation.id is not None and all(map(math.isfinite, annotation.box_xywh))
            assert usable or annotation.problem is not None
            assert (annotation.problem is None) == (annotation.reason is None)
        json.dumps(labelled_file(coco, {}))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
    def test_mixed_ids_have_one_order(self, ids: list[int | float | str]) -> None:
        assert sorted(ids, key=id_order) == sorted(reversed(ids), key=id_order)


class TestByImage:
    def test_images_come_in_file_order_with_rows_in_file_order(self) -> None:
        images = [{"id": n, "file_name": f"{n}.png"} for n in (5, 2, 9)]
        rows = [row(n, image_id=image_id) for n, image_id in enumerate([2, 5, 2, 77, 5])]
        found = [
            (image.id, [a.id for a in rows]) for image, rows in by_image(parse_coco(dataset(*rows, images=images)))
        ]
        assert found == [(5, [1, 4]), (2, [0, 2]), (9, [])]

    def test_rows_with_a_problem_come_too(self) -> None:
        ((_, rows),) = by_image(parse_coco(dataset(row(bbox=None))))
        assert [a.reason for a in rows] == [Reason.BAD_BOX]


class TestTrainingFilter:
    def test_published_filter_keeps_the_same_boxes(self) -> None:
        data = json.loads(fixture("l_filter.json").read_text())
        size = (data["width"], data["height"])
        for kept, low, high in ((data["train_kept"], 2048, 1e10), (data["test_kept"], 0, 1e9)):
            ours = [n for n, box in enumerate(data["bboxes"], start=1) if tao_keeps(box, size, low, high)]
            assert ours == kept

    def test_boxes_over_the_edge_are_clipped_not_dropped(self) -> None:
        annotation = only(dataset(row(bbox=[-5, 0, 25, 20])))
        bounds = {"min_area": 300.0, "max_area": 1e10}
        assert training_refusal(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.NONE) is None
        refused = training_refusal(annotation, (0, 0, 20, 20), (64, 48), **bounds, compat=Compat.TAO)
        assert refused is Reason.BOX_OUT_OF_BOUNDS

    @pytest.mark.parametrize("compat", list(Compat))
    def test_crowds_are_never_trained_on(self, compat: Compat) -> None:
        annotation = only(dataset(row(iscrowd=1)))
        refused = training_refusal(annotation, (1, 2, 10, 20), (64, 48), min_area=0, max_area=1e10, compat=compat)
        assert refused is Reason.CROWD

    @pytest.mark.parametrize(
        ("clipped", "expected"),
        [
            (None, Reason.BAD_BOX),
            ((0.0, 0.0, 10.0, 10.0), Reason.BOX_TOO_SMALL),
            ((0.0, 0.0, 10.0, 10.5), None),
            ((0.0, 0.0, 20.0, 10.0), Reason.BOX_TOO_LARGE),
        ],
    )
    def test_area_bounds_are_strict_and_on_the_clipped_box(self, clipped: Any, expected: Reason | None) -> None:
        annotation = only(dataset(row()))
        refused = training_refusal(annotation, clipped, (64, 48), min_area=100, max_area=200, compat=Compat.NONE)
        assert refused is expected

    def test_rows_with_a_problem_keep_their_reason(self) -> None:
        annotation = only(dataset(row(category_id=8)))
        refused = training_refusal(annotation, None, (64, 48), min_area=0, max_area=9, compat=Compat.NONE)
        assert refused is Reason.CATEGORY_UNKNOWN


class TestLabelledFile:
    answer = answer_fields({"size": [48, 64], "counts": "abc"}, 12, 0.5, ["BOX_CLIPPED"])

    def labelled(self, raw: dict[str, Any], answers: dict[Any, Any] | None = None, **options: Any) -> dict[str, Any]:
        return labelled_file(parse_coco(raw), answers or {}, **options)

    def test_fields_and_box_of_the_user_stay_and_area_is_that_of_the_mask(self) -> None:
        raw = dataset(row(bbox=[123.45, 2, 10, 20], area=200, note={"a": 1}), info={"by": "me"}, extra=[1])
        out = self.labelled(raw, {1: self.answer})
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

    def test_order_is_that_of_the_file_whatever_the_order_of_answers(self) -> None:
        raw = dataset(row("b"), row("a"), row(3))
        out = self.labelled(raw, {3: self.answer, "a": self.answer, "b": self.answer})
        assert [r["id"] for r in out["annotations"]] == ["b", "a", 3]

    def test_input_is_not_changed(self) -> None:
        raw = dataset(row(), row(2, iscrowd=1), row(3, bbox=None))
        before = json.dumps(raw)
        self.labelled(raw, {1: self.answer}, provenance={"a": 1})
        assert json.dumps(raw) == before

    def test_failed_row_keeps_its_fields_and_gets_the_error_and_an_empty_mask(self) -> None:
        raw = dataset(row(note="mine", segmentation=[[1, 1, 2, 2, 3, 1]]))
        (out,) = self.labelled(raw, {1: error_fields("IMAGE_NOT_FOUND", "a.png: no such file")})["annotations"]
        assert out["error"] == {"reason": "IMAGE_NOT_FOUND", "message": "a.png: no such file"}
        assert out["note"] == "mine"
        assert (out["area"], out["score"]) == (0.0, 0.0)
        mask = rle.Rle.from_coco(out["segmentation"])
        assert (mask.height, mask.width, rle.area(mask)) == (48, 64, 0)

    def test_failed_row_of_an_image_of_unknown_size_has_no_mask(self) -> None:
        raw = dataset(row(segmentation=[[1, 1, 2, 2, 3, 1]]), images=[{"id": 1, "file_name": "a.png"}])
        (out,) = self.labelled(raw, {1: error_fields("IMAGE_NOT_FOUND", "")})["annotations"]
        assert "segmentation" not in out

    def test_row_with_a_problem_carries_it(self) -> None:
        (out,) = self.labelled(dataset(row(bbox=[1, 2])))["annotations"]
        assert out["error"]["reason"] == "BAD_BOX"
        assert out["bbox"] == [1, 2]

    def test_row_without_any_answer_is_reported_not_passed_over(self) -> None:
        (out,) = self.labelled(dataset(row()))["annotations"]
        assert out["error"]["reason"] == "NOT_ANSWERED"

    def test_kept_rows_are_copied_as_they_are(self) -> None:
        raw = dataset(row(segmentation=[[1, 1, 2, 2, 3, 1]], score=0.1))
        assert self.labelled(raw, keep={1})["annotations"] == raw["annotations"]

    def test_crowd_is_copied_through_and_flagged(self) -> None:
        raw = dataset(row(iscrowd=1, segmentation={"size": [1, 1], "counts": [1]}))
        (out,) = self.labelled(raw)["annotations"]
        assert out == {**raw["annotations"][0], "flags": ["CROWD"]}

    def test_leavings_of_an_earlier_run_do_not_stand_beside_the_new_answer(self) -> None:
        raw = dataset(row(error={"reason": "X", "message": ""}, agreement=0.5, score=0.9, flags=["FULL_BOX"]))
        (out,) = self.labelled(raw, {1: self.answer})["annotations"]
        assert "error" not in out
        assert "agreement" not in out
        assert out["flags"] == ["BOX_CLIPPED"]

    def test_entries_that_are_no_rows_stay_where_they_were(self) -> None:
        out = self.labelled(dataset(None, row(), 5), {1: self.answer})
        assert out["annotations"][0] is None
        assert out["annotations"][2] == 5

    def test_provenance_replaces_that_of_an_earlier_run(self) -> None:
        raw = dataset(**{PROVENANCE_KEY: {"old": True}})
        assert PROVENANCE_KEY not in self.labelled(raw)
        assert self.labelled(raw, provenance={"branch": "student"})[PROVENANCE_KEY] == {"branch": "student"}

    def test_agreement_is_written_when_there_is_one(self) -> None:
        assert answer_fields({}, 1, 0.5, agreement=0.25)["agreement"] == 0.25
        assert "agreement" not in answer_fields({}, 1, 0.5)

    def test_pycocotools_loads_labelled_failed_and_crowd_rows(self, tmp_path: Path) -> None:
        label = answer_fields(rle.encode_region(np.ones((2, 2), dtype=np.bool_), 0, 0, (48, 64)).to_coco(), 4, 0.5)
        raw = dataset(row(1), row(2, bbox=None), row(3, iscrowd=1, segmentation=[[1, 1, 5, 5, 9, 1]]))
        path = tmp_path / "out.json"
        write_json_atomic(path, self.labelled(raw, {1: label}))
        coco = COCO(str(path))
        assert [int(coco.annToMask(coco.anns[n]).sum()) for n in (1, 2)] == [4, 0]
        assert coco.annToMask(coco.anns[3]).any()


class TestWriting:
    def test_what_is_written_reads_back_equal(self, tmp_path: Path) -> None:
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

    def test_nan_of_the_user_does_not_lose_the_file(self, tmp_path: Path) -> None:
        write_json_atomic(tmp_path / "x.json", {"bbox": [math.nan]})
        assert math.isnan(json.loads((tmp_path / "x.json").read_text())["bbox"][0])

    def test_mode_follows_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o022)
        try:
            write_json_atomic(tmp_path / "x.json", {})
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o644

    def test_symbolic_link_stays_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real.json").write_text("old")
        (tmp_path / "link.json").symlink_to("real.json")
        write_json_atomic(tmp_path / "link.json", {"new": 1})
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "real.json").read_text()) == {"new": 1}

    @pytest.mark.parametrize(
        ("code", "remedy"),
        [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "quota"), (errno.EIO, "can be written to")],
    )
    def test_full_disk_leaves_the_old_file_and_no_scrap(
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

    def test_file_size_limit_is_an_output_error_that_keeps_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ, so the write fails with EFBIG, as on a real full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OutputError, match=r"x\.json: not written"):
                write_json_atomic(path, {"a": ["x" * 100] * 5000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_missing_folder_is_an_output_error(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="make its folder first"):
            write_json_atomic(tmp_path / "none" / "x.json", {})

    def test_folder_in_the_place_of_the_file_is_an_output_error(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").mkdir()
        with pytest.raises(OutputError):
            write_json_atomic(tmp_path / "x.json", {})
        assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]

    def test_unserialisable_value_leaves_the_old_file_and_no_scrap(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_text("old")
        with pytest.raises(TypeError):
            write_json_atomic(path, {"a": object()})
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_labelling_every_real_box_keeps_every_row() -> None:
    coco: CocoFile = read_coco(shared("data", "coco_val_dev", "annotations.json"))
    out = labelled_file(coco, {a.id: answer_fields({}, 1, 0.5) for a in coco.annotations if a.id and not a.iscrowd})
    assert [r["id"] for r in out["annotations"]] == [a.id for a in coco.annotations]
    assert sum(r.get("flags") == ["CROWD"] for r in out["annotations"]) == 4
    assert not any("error" in r for r in out["annotations"])
