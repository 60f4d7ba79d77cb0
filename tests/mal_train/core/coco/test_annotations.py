"""Reading COCO files: which files are rejected and which rows are kept with an error."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.coco.annotations import Reason, by_image, id_order, parse_coco, read_coco
from mal_train.core.coco.output import labeled_file
from mal_train.core.errors import BadDataset
from tests.mal_train.core.coco.coco_rows import dataset, only, row
from tests.reference import shared


class TestFile:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BadDataset, match=r"none\.json.*No such file"):
            read_coco(tmp_path / "none.json")

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            (b"", "empty"),
            (b" \n", "empty"),
            (b"{", "JSON"),
            (b"\xff\xfe\x00", "JSON"),
            (b"[" * 200_000, "nested"),
            (b"[]", "a list"),
            (b"null", "null"),
            (b'{"images": []}', "'annotations'"),
            (b"{}", "'images', 'annotations'"),
            (b'{"images": [], "annotations": [], "categories": 5}', "'categories'"),
            (gzip.compress(b"{}")[:-9], "gzip"),
            (b"\x1f\x8bno", "gzip"),
            (b'{"images": {}, "annotations": [], "categories": []}', "'images'"),
            (b'{"images": [], "annotations": null, "categories": []}', "'annotations'"),
            (b'{"images": [], "annotations": [], "categories": [], "x": 1' + b"0" * 5000 + b"}", "JSON"),
        ],
    )
    def test_a_file_that_is_not_coco_is_rejected_by_name(self, tmp_path: Path, content: bytes, named: str) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(BadDataset, match=r"x\.json") as caught:
            read_coco(path)
        assert named in str(caught.value)

    def test_a_byte_order_mark_is_skipped(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(dataset(row())).encode())
        assert len(read_coco(path).annotations) == 1

    def test_repeated_annotation_ids_reject_the_file_and_the_first_are_listed(self) -> None:
        rows = [row(n) for n in range(9)] * 2
        with pytest.raises(
            BadDataset, match=r"annotation id 0 \(annotations\[0\], annotations\[9\]\), 1 .*, 4 .* and 4 more "
        ):
            parse_coco(dataset(*rows))

    def test_repeated_image_ids_reject_the_file(self) -> None:
        with pytest.raises(BadDataset, match='image id "a"'):
            parse_coco(dataset(images=[{"id": "a", "file_name": "a.png"}, {"id": "a", "file_name": "b.png"}]))

    def test_a_number_and_a_string_of_the_same_digits_are_different_ids(self) -> None:
        assert [a.id for a in parse_coco(dataset(row(1), row("1"), row(1.5))).annotations] == [1, "1", 1.5]

    def test_a_file_without_annotations_is_accepted(self) -> None:
        ((image, annotations),) = by_image(parse_coco(dataset()))
        assert image.size_wh == (64, 48)
        assert annotations == []

    @pytest.mark.parametrize("name", ["coco_val_dev", "coco_train_mini", "coco_person_single"])
    def test_real_files_have_no_invalid_rows(self, name: str) -> None:
        coco = read_coco(shared("data", name, "annotations.json"))
        assert not coco.problem_counts()
        assert coco.notes == ()
        assert sum(len(rows) for _, rows in by_image(coco)) == len(coco.annotations)


class TestRows:
    def test_a_valid_row_is_read(self) -> None:
        annotation = only(dataset(row("k", iscrowd=1, note="mine")))
        assert annotation.box_xywh == (1.0, 2.0, 10.0, 20.0)
        assert annotation.iscrowd
        assert annotation.problem is None
        assert annotation.raw["note"] == "mine"

    @pytest.mark.parametrize(
        ("bad", "reason", "named"),
        [
            (None, Reason.NOT_AN_OBJECT, "annotations[0]: null"),
            (7, Reason.NOT_AN_OBJECT, "annotations[0]: a number"),
            (row(None), Reason.BAD_ID, "annotations[0]: id null"),
            (row([1]), Reason.BAD_ID, "id [1]"),
            (row(True), Reason.BAD_ID, "id true"),
            (row(math.nan), Reason.BAD_ID, "id NaN"),
            (row(image_id=2), Reason.IMAGE_UNKNOWN, "annotation 1: image_id 2"),
            (row(image_id="1"), Reason.IMAGE_UNKNOWN, "number"),
            (row(image_id={}), Reason.IMAGE_UNKNOWN, "image_id {}"),
            (row(attributes={"rotation": 30}), Reason.BOX_ROTATED, "30 degrees"),
            (row(bbox=None), Reason.BAD_BOX, "annotation 1: bbox"),
            (row(bbox=[1, 2, 3]), Reason.BAD_BOX, "bbox [1, 2, 3]"),
            (row(bbox=[1, 2, 3, 4, 5]), Reason.BAD_BOX, "bbox [1, 2, 3, 4, 5]"),
            (row(bbox={"x": 1}), Reason.BAD_BOX, 'bbox {"x": 1}'),
            (row(bbox=[1, 2, "3", 4]), Reason.BAD_BOX, 'bbox [1, 2, "3", 4]'),
            (row(bbox=[1, 2, True, 4]), Reason.BAD_BOX, "bbox [1, 2, true, 4]"),
            (row(bbox=[1, 2, math.nan, 4]), Reason.BAD_BOX, "bbox [1, 2, NaN, 4]"),
            (row(bbox=[1, 2, math.inf, 4]), Reason.BAD_BOX, "Infinity"),
            (row(bbox=[1, 2, 10**400, 4]), Reason.BAD_BOX, "bbox [1, 2, 1000"),
            (row(bbox=[1, 2, 10**5000, 4]), Reason.BAD_BOX, "bbox "),
            (row(bbox=[0] * 1000), Reason.BAD_BOX, "..."),
            (row(iscrowd="0"), Reason.BAD_ISCROWD, 'iscrowd "0"'),
            (row(iscrowd=2), Reason.BAD_ISCROWD, "iscrowd 2"),
        ],
    )
    def test_an_invalid_row_keeps_its_index_and_names_its_error(self, bad: Any, reason: Reason, named: str) -> None:
        coco = parse_coco(dataset(bad, row("good")))
        assert [a.id for a in coco.annotations][1:] == ["good"]
        assert coco.annotations[1].problem is None
        assert coco.annotations[0].reason is reason
        assert named in str(coco.annotations[0].problem)
        assert coco.problem_counts() == {str(reason): 1}

    def test_an_image_id_of_the_wrong_json_type_gets_a_hint(self) -> None:
        images = [{"id": "1", "file_name": "a.png"}]
        assert 'image "1" exists as a string' in str(only(dataset(row(), images=images)).problem)

    @pytest.mark.parametrize(
        ("image", "named"),
        [
            ({"id": 1, "width": 64, "height": 48}, "image 1: file_name null"),
            ({"id": 1, "file_name": ""}, 'file_name ""'),
            ({"id": 1, "file_name": "a\0b"}, "file_name"),
            ({"id": 1, "file_name": "a", "width": 5.5, "height": 4}, "width 5.5"),
            ({"id": 1, "file_name": "a", "width": 5, "height": "4 px"}, 'height "4 px"'),
            ({"id": 1, "file_name": "a", "width": 5, "height": True}, "height true"),
            ({"id": 1, "coco_url": 7}, "file_name null"),
            ({"id": 1, "file_name": "a", "width": 1e12, "height": 4}, "width 1000000000000.0"),
            ({"id": 1, "file_name": "a", "width": math.nan, "height": 4}, "width NaN"),
            ({"id": 1, "file_name": "a", "width": 10**6, "height": 10**6}, "1000000 x 1000000 px"),
        ],
    )
    def test_rows_of_an_unusable_image_carry_its_problem(self, image: dict[str, Any], named: str) -> None:
        annotation = only(dataset(row(), images=[image]))
        assert annotation.reason is Reason.IMAGE_UNUSABLE
        assert named in str(annotation.problem)

    def test_an_image_without_a_size_is_usable(self) -> None:
        coco = parse_coco(dataset(row(), images=[{"id": 1, "file_name": "a.png"}]))
        assert coco.images[1].size_wh is None
        assert coco.annotations[0].problem is None

    def test_integral_float_sizes_are_read_as_pixels(self) -> None:
        coco = parse_coco(dataset(images=[{"id": 1, "file_name": "a.png", "width": 64.0, "height": 48.0}]))
        assert coco.images[1].size_wh == (64, 48)

    def test_errors_of_images_and_categories_are_noted(self) -> None:
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
    def test_any_json_is_rejected_or_kept_row_by_row(self, rows: list[Any]) -> None:
        try:
            coco = parse_coco(dataset(*rows))
        except BadDataset:
            # Two rows have the same id.
            return
        assert len(coco.annotations) == len(rows)
        for annotation in coco.annotations:
            usable = annotation.id is not None and all(map(math.isfinite, annotation.box_xywh))
            assert usable or annotation.problem is not None
            assert (annotation.problem is None) == (annotation.reason is None)
        json.dumps(labeled_file(coco, {}))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()))
    def test_mixed_ids_have_a_total_order(self, ids: list[int | float | str]) -> None:
        assert sorted(ids, key=id_order) == sorted(reversed(ids), key=id_order)


class TestByImage:
    def test_images_and_their_rows_are_yielded_in_file_order(self) -> None:
        images = [{"id": n, "file_name": f"{n}.png"} for n in (5, 2, 9)]
        rows = [row(n, image_id=image_id) for n, image_id in enumerate([2, 5, 2, 77, 5])]
        found = [
            (image.id, [a.id for a in rows]) for image, rows in by_image(parse_coco(dataset(*rows, images=images)))
        ]
        assert found == [(5, [1, 4]), (2, [0, 2]), (9, [])]

    def test_invalid_rows_are_yielded_too(self) -> None:
        ((_, rows),) = by_image(parse_coco(dataset(row(bbox=None))))
        assert [a.reason for a in rows] == [Reason.BAD_BOX]
