"""Reading and rewriting COCO files row by row."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.coco import json_reader
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason, parse_coco, read_coco
from mal_train.core.coco.output import label_fields, labeled_file, labeled_row, write_json_atomic
from mal_train.core.coco.stream import CocoHead, copy_coco, read_list, scan_coco, write_transformed
from mal_train.core.errors import BadDataset, OutputError


def small(**more: Any) -> dict[str, Any]:
    rows = [
        {"id": at, "image_id": 1, "category_id": 1, "bbox": [at, 0, 4.5e0, 4], "note": "ä\u2028"} for at in range(7)
    ]
    return {
        "info": {"source": "test", "n": [1, -2.5e-3, None, True]},
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}, {"id": "b", "file_name": "b.png"}],
        "annotations": [*rows, {"id": 99, "image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}, "not a row", 1.5e3],
        "categories": [{"id": 1, "name": "cup"}],
        "licenses": [],
        "scale": 1.25,
        **more,
    }


def write(path: Path, raw: Any, **options: Any) -> Path:
    path.write_text(json.dumps(raw, **options))
    return path


def scan(path: Path) -> tuple[CocoHead, list[Annotation]]:
    rows: list[Annotation] = []
    head = scan_coco(path, lambda _, row: rows.append(row))
    return head, rows


@pytest.mark.parametrize("read_bytes", [1, 3, 17, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_equal_those_of_read_coco_for_any_read_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_reader, "_READ_BYTES", read_bytes)
    path = write(tmp_path / "in.json", small(), indent=indent, ensure_ascii=False)
    expected = read_coco(path)
    if read_bytes < 4:
        # The encoding is detected from the first four bytes.
        monkeypatch.setattr(json, "detect_encoding", lambda _: "utf-8")
    head, rows = scan(path)
    assert rows == expected.annotations
    assert head.images == expected.images
    assert (head.category_names, head.count) == (expected.category_names, len(rows))
    assert head.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_of_json_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(json.dumps(small(), ensure_ascii=False).encode(encoding))
    assert scan(path)[1] == parse_coco(small()).annotations


def test_lists_may_be_in_any_order(tmp_path: Path) -> None:
    raw = small()
    path = write(tmp_path / "in.json", {key: raw[key] for key in reversed(raw)})
    assert scan(path)[1] == parse_coco(raw).annotations


@pytest.mark.parametrize("with_old_provenance", [False, True])
def test_the_written_file_equals_that_of_write_json_atomic(tmp_path: Path, with_old_provenance: bool) -> None:
    raw = small(**({"mask_auto_labeler": {"old": 1}} if with_old_provenance else {}))
    path = write(tmp_path / "in.json", raw)
    results: dict[JsonId, Any] = {at: label_fields({"size": [30, 40], "counts": "x"}, 3, 0.5) for at in range(4)}
    write_json_atomic(tmp_path / "expected.json", labeled_file(read_coco(path), results, {"by": "test"}))
    head, _ = scan(path)

    def transform(index: int, row: Any, annotation: Annotation) -> Any:
        return labeled_row(row, annotation, head.images, results.get(index))

    write_transformed(head, tmp_path / "out.json", transform, {"by": "test"})
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "expected.json").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "[]",
        "3",
        "{",
        '{"images": []}',
        '{"images": [], "annotations": [], "categories": []',
        '{"images": [], "annotations": {}, "categories": []}',
        '{"images": [], "annotations": [{}, ], "categories": []}',
        '{"images": [], "annotations": [1 2], "categories": []}',
        '{"images": [], "images": [], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [], "categories": []} more',
        '{"images": [], "annotations": [tru], "categories": []}',
        '{"images": [], "annotations": [' + '{"a":' * 100_000,
        '{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [{"id": "a"}, {"id": "a"}], "categories": []}',
        "\udcff{}",
    ],
)
def test_an_unusable_file_is_rejected_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadDataset, match=r"broken\.json"):
        scan(path)


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize(
    "text", ["{}", '{"images": []}', '{"annotations": []}', '{"images": {}, "annotations": []}', '{"info": [1]}']
)
def test_a_file_without_its_lists_is_not_copied(tmp_path: Path, text: str, suffix: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    output = tmp_path / f"out.{suffix}"
    output.write_text("of an earlier run")
    with pytest.raises(BadDataset, match=r"broken\.json"):
        copy_coco(tmp_path / "broken.json", output)
    assert output.read_text() == "of an earlier run"


def test_a_missing_file_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"absent\.json"):
        scan(tmp_path / "absent.json")


def test_a_file_that_changed_after_its_scan_is_detected_and_an_old_output_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "in.json", small())
    head, _ = scan(path)
    (tmp_path / "out.json").write_text("old")
    write(path, small(scale=2))
    with pytest.raises(BadDataset, match=r"in\.json"):
        write_transformed(head, tmp_path / "out.json", lambda _index, row, _annotation: row, {})
    assert (tmp_path / "out.json").read_text() == "old"
    with pytest.raises(OutputError):
        write_transformed(head, tmp_path / "no" / "out.json", lambda _index, row, _annotation: row, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(JSON, max_size=5), more=st.dictionaries(st.text(), JSON, max_size=4), read_bytes=st.integers(4, 60)
)
def test_any_json_is_copied_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], more: dict[str, Any], read_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("json")
    # Ids may not repeat.
    rows = [row for row in rows if not (isinstance(row, dict) and "id" in row)]
    raw = {**more, "images": [], "categories": [], "annotations": rows}
    path = write(folder / "in.json", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_READ_BYTES", read_bytes)
        head, _ = scan(path)
        write_transformed(head, folder / "out.json", lambda _index, row, _annotation: row, {"by": 1})
    expected = {key: value for key, value in raw.items() if key != "mask_auto_labeler"}
    assert json.loads((folder / "out.json").read_text()) == {**expected, "mask_auto_labeler": {"by": 1}}


def test_a_non_finite_number_is_the_error_of_its_row_alone(tmp_path: Path) -> None:
    raw = small()
    raw["annotations"][0]["bbox"][0] = float("nan")
    raw["annotations"][1]["bbox"][0] = float("-inf")
    _, rows = scan(write(tmp_path / "in.json", raw))
    assert [row.reason for row in rows[:3]] == [Reason.BAD_BOX, Reason.BAD_BOX, None]


def test_lone_surrogates_and_large_integers_are_kept(tmp_path: Path) -> None:
    rows = ["\ud800x", 10**40, -(2**63) - 1, 2**64]
    path = write(tmp_path / "in.json", {"annotations": rows})
    assert list(read_list(path, "annotations")) == rows


def test_a_member_is_found_by_its_exact_name(tmp_path: Path) -> None:
    raw = {"annotations.item": [1], "info": {"annotations": [2]}, "annotations": [3]}
    assert list(read_list(write(tmp_path / "in.json", raw), "annotations")) == [3]


def test_a_list_is_read_without_what_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('{"images": [1, 2], "annotations": [' + "3, " * 1000)
    assert list(read_list(path, "images")) == [1, 2]
    with pytest.raises(BadDataset):
        list(read_list(path, "annotations"))


def test_a_value_over_the_length_limit_is_rejected_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_reader, "_READ_BYTES", 64)
    monkeypatch.setattr(json_reader, "MAX_VALUE_CHARS", 1000)
    path = write(tmp_path / "in.json", {"annotations": ["x" * 999]})
    assert list(read_list(path, "annotations")) == ["x" * 999]
    # The missing quote would otherwise be reported only at the end of the file.
    path.write_text('{"annotations": ["' + "x" * 100_000)
    with pytest.raises(BadDataset, match=r"in\.json"):
        list(read_list(path, "annotations"))


def test_repeated_ids_can_be_reported_instead_of_rejected(tmp_path: Path) -> None:
    raw = small(images=[{"id": 1, "file_name": "a"}] * 2, categories=[{"id": 1}, {"id": [1]}])
    raw["annotations"] = [{"id": "x", "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}] * 3
    head = scan_coco(write(tmp_path / "in.json", raw), lambda *_: None, allow_repeated_ids=True)
    assert (head.repeated_image_ids, head.repeated_annotation_ids, head.count) == ((1,), ("x",), 3)
    (note,) = head.notes
    assert note.startswith("categories[1]: ")


def test_image_rows_and_notes_equal_those_of_parse_coco(tmp_path: Path) -> None:
    raw = small(images=[{"id": 1}, "not a row", {"id": None}, {"id": 2, "file_name": "c.png", "width": 1.5}])
    head, _ = scan(write(tmp_path / "in.json", raw))
    assert head.images == parse_coco(raw).images
    assert head.notes == parse_coco(raw).notes
    assert [note.split(":")[0] for note in head.notes] == ["images[1]", "images[2]"]
    assert isinstance(head.images[1], ImageInfo)
