"""Claims about COCO files that are passed through row by row."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.coco import stream
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, parse_coco, read_coco
from mal_train.core.coco.output import answer_fields, labeled_file, labeled_row, write_json_atomic
from mal_train.core.coco.stream import scan_coco, write_changed
from mal_train.core.errors import BadDataset, OutputError


def small(**more: Any) -> dict[str, Any]:
    rows = [
        {"id": at, "image_id": 1, "category_id": 1, "bbox": [at, 0, 4.5e0, 4], "note": "ä\u2028"} for at in range(7)
    ]
    return {
        "info": {"made": "by hand", "n": [1, -2.5e-3, None, True]},
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}, {"id": "b", "file_name": "b.png"}],
        "annotations": [*rows, {"id": 99, "image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}, "no row", 1.5e3],
        "categories": [{"id": 1, "name": "cup"}],
        "licenses": [],
        "scale": 1.25,
        **more,
    }


def written(path: Path, raw: Any, **how: Any) -> Path:
    path.write_text(json.dumps(raw, **how))
    return path


def scanned(path: Path) -> tuple[stream.CocoHead, list[Annotation]]:
    rows: list[Annotation] = []
    head = scan_coco(path, lambda _, row: rows.append(row))
    return head, rows


@pytest.mark.parametrize("read_bytes", [1, 3, 17, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_are_read_as_by_the_reader_of_whole_files_wherever_the_text_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, indent: int | None
) -> None:
    monkeypatch.setattr(stream, "_READ_BYTES", read_bytes)
    path = written(tmp_path / "in.json", small(), indent=indent, ensure_ascii=False)
    whole = read_coco(path)
    if read_bytes < 4:
        # The encoding is told by the first four bytes.
        monkeypatch.setattr(json, "detect_encoding", lambda _: "utf-8")
    head, rows = scanned(path)
    assert rows == whole.annotations
    assert head.images == whole.images
    assert (head.category_names, head.count) == (whole.category_names, len(rows))
    assert head.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_of_json_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(json.dumps(small(), ensure_ascii=False).encode(encoding))
    assert scanned(path)[1] == parse_coco(small()).annotations


def test_lists_may_stand_in_any_order(tmp_path: Path) -> None:
    raw = small()
    path = written(tmp_path / "in.json", {key: raw[key] for key in reversed(raw)})
    assert scanned(path)[1] == parse_coco(raw).annotations


@pytest.mark.parametrize("with_old_provenance", [False, True])
def test_the_written_file_is_that_of_the_writer_of_whole_files(tmp_path: Path, with_old_provenance: bool) -> None:
    raw = small(**({"mask_auto_labeler": {"old": 1}} if with_old_provenance else {}))
    path = written(tmp_path / "in.json", raw)
    answers: dict[JsonId, Any] = {at: answer_fields({"size": [30, 40], "counts": "x"}, 3, 0.5) for at in range(4)}
    write_json_atomic(tmp_path / "whole.json", labeled_file(read_coco(path), answers, {"by": "test"}))
    head, _ = scanned(path)

    def change(at: int, row: Any, annotation: Annotation) -> Any:
        return labeled_row(row, annotation, head.images, answers.get(at))

    write_changed(head, tmp_path / "out.json", change, {"by": "test"})
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


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
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadDataset, match=r"broken\.json"):
        scanned(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadDataset, match=r"absent\.json"):
        scanned(tmp_path / "absent.json")


def test_a_file_that_changed_since_its_scan_is_noticed_and_an_old_output_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "in.json", small())
    head, _ = scanned(path)
    (tmp_path / "out.json").write_text("old")
    written(path, small(scale=2))
    with pytest.raises(BadDataset, match="changed while"):
        write_changed(head, tmp_path / "out.json", lambda _at, row, _annotation: row, {})
    assert (tmp_path / "out.json").read_text() == "old"
    with pytest.raises(OutputError):
        write_changed(head, tmp_path / "no" / "out.json", lambda _at, row, _annotation: row, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(JSON, max_size=5), more=st.dictionaries(st.text(), JSON, max_size=4), read=st.integers(4, 60))
def test_any_json_passes_through_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], more: dict[str, Any], read: int
) -> None:
    folder = tmp_path_factory.mktemp("json")
    # Ids may not repeat; everything else may be anything.
    rows = [row for row in rows if not (isinstance(row, dict) and "id" in row)]
    raw = {**more, "images": [], "categories": [], "annotations": rows}
    path = written(folder / "in.json", raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_READ_BYTES", read)
        head, _ = scanned(path)
        write_changed(head, folder / "out.json", lambda _at, row, _annotation: row, {"by": 1})
    expected = {key: value for key, value in raw.items() if key != "mask_auto_labeler"}
    assert json.loads((folder / "out.json").read_text()) == {**expected, "mask_auto_labeler": {"by": 1}}


def test_a_report_may_look_at_a_file_with_repeated_ids(tmp_path: Path) -> None:
    raw = small(images=[{"id": 1, "file_name": "a"}] * 2, categories=[{"id": 1}, {"id": [1]}])
    raw["annotations"] = [{"id": "x", "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}] * 3
    head = scan_coco(written(tmp_path / "in.json", raw), lambda *_: None, allow_repeated_ids=True)
    assert (head.repeated_images, head.repeated_annotations, head.count) == ((1,), ("x",), 3)
    assert head.notes == ("categories[1]: no id that is a number or a string",)


def test_image_rows_are_those_of_the_whole_reader(tmp_path: Path) -> None:
    raw = small(images=[{"id": 1}, "no row", {"id": None}, {"id": 2, "file_name": "c.png", "width": 1.5}])
    head, _ = scanned(written(tmp_path / "in.json", raw))
    assert head.images == parse_coco(raw).images
    assert isinstance(head.images[1], ImageInfo)
