"""Commands on annotations, images and outputs in a real S3 server, and on images at their URLs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mal_client.cli.main import main
from mal_client.client import Client

from mal_train.core.coco import image_urls
from mal_train.core.coco.annotations import read_coco
from mal_train.core.coco.parquet_reader import refuse_hidden_parts
from mal_train.core.coco.stream import copy_coco
from mal_train.core.errors import ConfigError
from mal_train.core.storage import retry
from mal_train.core.storage.addresses import Location
from mal_train.distributed.launch import free_port
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.fake_server import FakeServer, Faults, serving
from tests.mal_train.core.storage.test_web import Server
from tests.mal_train.core.storage.test_web import serving as serving_web
from tests.object_store import S3, SECRET_KEY, private_temporary_files


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with private_temporary_files(tmp_path / "tmp", monkeypatch):
        yield
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path, images=5)


def stored(dataset: Dataset, s3: S3) -> list[str]:
    """Puts a data set into the store; returns the options that name it."""
    s3.put("in.json", dataset.json_path.read_bytes())
    return ["--annotations", s3.address("in.json"), "--images", s3.put_folder(dataset.images_dir, "images")]


def local(dataset: Dataset) -> list[str]:
    return ["--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]


def label(address: str, given: list[str], output: str, *more: str) -> int:
    return main(["label", "--server", address, *given, "--output", output, *more])


def work_dir(dataset: Dataset) -> list[str]:
    return ["--work-dir", str(dataset.folder / "work")]


def rows(content: bytes | None) -> list[dict[str, object]]:
    assert content is not None
    return json.loads(content)["annotations"]  # type: ignore[no-any-return]


def test_label_writes_the_bytes_of_a_local_run(s3: S3, dataset: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(FakeServer()) as address:
        assert label(address, local(dataset), str(dataset.output)) == 0
        assert label(address, stored(dataset, s3), s3.address("out/masks.json"), *work_dir(dataset)) == 0
    assert s3.get("out/masks.json") == dataset.output.read_bytes()
    assert list((dataset.folder / "work").iterdir()) == []
    assert s3.names() == ["images/" + path.name for path in sorted(dataset.images_dir.iterdir())] + [
        "in.json",
        "out/masks.json",
    ]
    captured = capfd.readouterr()
    assert s3.address("out/masks.json") in captured.out
    assert SECRET_KEY not in captured.out + captured.err


def test_missing_and_broken_images_are_listed_beside_the_output(
    s3: S3, dataset: Dataset, capfd: pytest.CaptureFixture[str]
) -> None:
    given = stored(dataset, s3)
    s3.fail("images/image_0.png", status=404, code="NoSuchKey")
    s3.fail("images/image_1.png", status=403, code="AccessDenied")
    s3.put("images/image_2.png", b"no image")
    with serving(FakeServer()) as address:
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 3
    failures = [json.loads(line) for line in (s3.get("out.errors.jsonl") or b"").splitlines()]
    assert [row["reason"] for row in failures] == ["IMAGE_NOT_FOUND"] * 4 + ["IMAGE_FORMAT"] * 2
    assert sum("error" in row for row in rows(s3.get("out.json"))) == 6
    assert s3.address("out.errors.jsonl") in capfd.readouterr().err


def test_errors_file_of_an_earlier_run_is_deleted(s3: S3, dataset: Dataset) -> None:
    given = stored(dataset, s3)
    s3.put("out.errors.jsonl", b"old")
    with serving(FakeServer()) as address:
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 0
    assert s3.get("out.errors.jsonl") is None


def test_upload_that_failed_is_repeated_without_labeling_again(s3: S3, dataset: Dataset) -> None:
    given = stored(dataset, s3)
    server = FakeServer()
    with serving(server) as address:
        s3.put("out.json", b"old")
        s3.fail("out.json", status=403, code="AccessDenied", method="PUT", times=1)
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 4
        assert s3.get("out.json") == b"old"
        assert (dataset.folder / "work" / "out.json.ledger").exists()
        answered = len(server.item_ids)
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 0
    assert len(server.item_ids) == answered == 5
    assert len(rows(s3.get("out.json"))) == 10
    assert list((dataset.folder / "work").iterdir()) == []


def test_store_that_goes_away_ends_the_job_which_resumes(
    s3: S3, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = stored(dataset, s3)
    monkeypatch.setattr("mal_train.core.storage.read_ahead.READERS", 1)
    server = FakeServer()
    with serving(server) as address:
        s3.fail("images/image_4.png", status=503, code="SlowDown", times=retry.ATTEMPTS)
        s3.delay("images/image_4.png", 0.5, times=1)
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 1
        assert s3.get("out.json") is None
        assert label(address, given, s3.address("out.json"), *work_dir(dataset)) == 0
    assert all("error" not in row for row in rows(s3.get("out.json")))


def test_credentials_that_expire_end_the_job_which_resumes(s3: S3, dataset: Dataset) -> None:
    given = stored(dataset, s3)
    for index in range(2, 5):
        s3.fail(f"images/image_{index}.png", status=403, code="ExpiredToken", times=1)
    with serving(FakeServer()) as address:
        assert label(address, given, str(dataset.output)) == 2
        assert label(address, given, str(dataset.output)) in (0, 2)
        assert label(address, given, str(dataset.output)) in (0, 2)
        assert label(address, given, str(dataset.output)) == 0
    assert all("error" not in row for row in dataset.labeled().values())


def test_python_client_reads_by_address(s3: S3, dataset: Dataset) -> None:
    places = stored(with_masks(dataset), s3)[1::2]
    with serving(FakeServer()) as address, Client(address) as client:
        assert client.label_dataset(places[0], places[1], dataset.output).labeled == 10
        assert client.evaluate(places[0], places[1]).images == 5
        with pytest.raises(ConfigError):
            client.label_dataset(places[0], places[1], s3.address("out.json"))


def test_shards_meet_in_the_work_dir(s3: S3, dataset: Dataset) -> None:
    given, output = stored(dataset, s3), s3.address("out.json")
    with serving(FakeServer()) as address:
        assert label(address, local(dataset), str(dataset.output)) == 0
        for index in range(2):
            assert label(address, given, output, *work_dir(dataset), "--shard", f"{index}/2") == 0
        assert s3.get("out.json") is None
    merge = ["merge", "--annotations", s3.address("in.json"), "--output", output, "--shards", "2", *work_dir(dataset)]
    assert main(merge) == 0
    assert s3.get("out.json") == dataset.output.read_bytes()


def test_png_masks_are_uploaded_before_the_file_that_names_them(s3: S3, dataset: Dataset) -> None:
    given = stored(dataset, s3)
    with serving(FakeServer()) as address:
        assert label(address, given, s3.address("out.json"), *work_dir(dataset), "--format", "png") == 0
    names = {row["mask_file"] for row in rows(s3.get("out.json"))}
    assert names == {key for key in s3.names() if key.startswith("out.masks/")}
    puts = [line for line in s3.requests if line.startswith("PUT")]
    assert puts[-1] == "PUT out.json"


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (["s3://photos/out.json"], 2),
        (["https://example.org/out.json", "--work-dir", "."], 4),
        (["s3://no-such-bucket/out.json", "--work-dir", "."], 4),
        (["s3://photos/in.json", "--work-dir", "."], 2),
        (["out.json", "--work-dir", "."], 2),
        (["s3://photos/out.json", "--work-dir", "s3://photos/work"], 2),
        (["s3://photos/out.json", "--work-dir", "in.json"], 4),
    ],
)
def test_unusable_output_is_refused_before_any_work(
    s3: S3, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, output: list[str], code: int
) -> None:
    monkeypatch.chdir(dataset.folder)
    server = FakeServer()
    with serving(server) as address:
        try:
            actual = label(address, stored(dataset, s3), *output)
        except SystemExit as stop:  # argparse
            actual = int(str(stop.code))
    assert actual == code
    assert server.item_ids == []


@pytest.mark.parametrize(
    ("annotations", "code"),
    [("s3://photos/nothing.json", 2), ("s3://no-such-bucket/in.json", 2), ("ftp://host/in.json", 2)],
)
def test_unusable_annotations_are_one_error(
    s3: S3, dataset: Dataset, capfd: pytest.CaptureFixture[str], annotations: str, code: int
) -> None:
    given = ["--annotations", annotations, "--images", str(dataset.images_dir)]
    try:
        actual = main(["check", *given])
    except SystemExit as stop:
        actual = int(str(stop.code))
    assert actual == code
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert annotations in error


def test_store_that_is_not_there_is_one_error(
    s3: S3, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert main(["check", "--annotations", s3.address("in.json"), "--images", str(dataset.images_dir)]) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_check_reads_and_writes_by_address(s3: S3, dataset: Dataset) -> None:
    assert main(["check", *local(dataset), "--output", str(dataset.folder / "issues.json")]) == 0
    given = stored(dataset, s3)
    s3.put("images/extra.png", (dataset.images_dir / "image_0.png").read_bytes())
    outputs = ["--output", s3.address("issues.json"), "--report", s3.address("page.html")]
    assert main(["check", *given, *outputs]) == 0
    issues = json.loads(s3.get("issues.json") or b"")
    assert [issue["kind"] for issue in issues["findings"]] == ["FILE_NOT_LISTED"]
    assert b"extra.png" in (s3.get("page.html") or b"")
    s3.fail("images/image_0.png", status=404, code="NoSuchKey")
    assert main(["check", *given]) == 3


def test_evaluate_reads_and_writes_by_address(s3: S3, dataset: Dataset) -> None:
    with_masks(dataset)
    with serving(FakeServer()) as address:
        command = ["evaluate", "--server", address]
        assert main([*command, *local(dataset), "--output", str(dataset.output)]) == 0
        outputs = ["--output", s3.address("metrics.json"), "--report", s3.address("page.html")]
        assert main([*command, *stored(dataset, s3), *outputs]) == 0
        on_server = ["--annotations", s3.address("in.json"), "--images", "folder", "--on-server"]
        assert main([*command, *on_server]) == 2
    assert s3.get("metrics.json") == dataset.output.read_bytes()
    assert s3.get("page.html") is not None


def test_review_reads_and_writes_by_address(s3: S3, dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        assert label(address, local(dataset), str(dataset.output)) == 0
    s3.put("masks.json", dataset.output.read_bytes())
    images = s3.put_folder(dataset.images_dir, "images")
    command = ["review", "--annotations", s3.address("masks.json"), "--images", images, "--worst", "3"]
    names = {"--output": "queue.json", "--export": "worst.json", "--report": "page.html", "--label-studio": "t.json"}
    outputs = [word for option, name in names.items() for word in (option, s3.address(f"review/{name}"))]
    assert main([*command, *outputs, "--cvat", s3.address("review/cvat")]) == 0
    written = {key.removeprefix("review/") for key in s3.names() if key.startswith("review/")}
    cvat = {f"cvat/{name}" for name in ("annotations.xml", "images.txt", "labels.json")}
    assert written == {*names.values(), "t.config.xml", *cvat}
    assert len(rows(s3.get("review/worst.json"))) == 3
    assert (s3.get("review/page.html") or b"").count(b"data:image/png") >= 3
    assert s3.address("images/image_0.png") in (s3.get("review/cvat/images.txt") or b"").decode()


def test_convert_reads_tables_folders_and_sizes_by_address(s3: S3, dataset: Dataset) -> None:
    images = s3.put_folder(dataset.images_dir, "images")
    s3.put("boxes.csv", b"image,x,y,width,height,label\nimage_0.png,1,2,3,4,cup\nmissing.png,1,2,3,4,cup\n")
    command = ["convert", "--images", images, "--output", s3.address("out/coco.json")]
    assert main([*command, "--from", "csv", "--labels", s3.address("boxes.csv")]) == 3
    coco = json.loads(s3.get("out/coco.json") or b"")
    assert [(image["file_name"], image["width"]) for image in coco["images"]] == [("image_0.png", 40)]
    assert b"BAD_IMAGE" in (s3.get("out/coco.errors.jsonl") or b"")
    s3.put("labels/image_1.txt", b"0 0.5 0.5 0.2 0.2\n")
    (dataset.folder / "names.txt").write_text("cup\n")
    yolo = ["--from", "yolo", "--labels", s3.address("labels"), "--names", str(dataset.folder / "names.txt")]
    assert main([*command, *yolo]) == 0
    assert len(json.loads(s3.get("out/coco.json") or b"")["images"]) == 5
    assert s3.get("out/coco.errors.jsonl") is None


def test_export_reads_and_writes_by_address(s3: S3, dataset: Dataset) -> None:
    with serving(FakeServer()) as address:
        assert label(address, local(dataset), str(dataset.output)) == 0
    s3.put("masks.json", dataset.output.read_bytes())
    images = s3.put_folder(dataset.images_dir, "images")
    command = ["export", "--annotations", s3.address("masks.json"), "--images", images]
    assert main([*command, "--to", "labelme", "--output", s3.address("labelme")]) == 0
    content = json.loads(s3.get("labelme/image_0.json") or b"")
    assert content["imagePath"] == s3.address("images/image_0.png")
    assert main([*command, "--to", "yolo-seg", "--output", s3.address("yolo")]) == 2


def test_image_name_cannot_leave_the_prefix(s3: S3, dataset: Dataset) -> None:
    s3.put("private.png", (dataset.images_dir / "image_0.png").read_bytes())
    dataset.coco["images"][0]["file_name"] = "../private.png"
    dataset.save()
    with serving(FakeServer()) as address:
        assert label(address, stored(dataset, s3), str(dataset.output)) == 3
    assert "GET private.png" not in s3.requests


def test_remote_images_are_read_in_parallel_and_once(s3: S3, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, images=24)
    given = stored(dataset, s3)
    for path in dataset.images_dir.iterdir():
        s3.delay(f"images/{path.name}", 0.1)
    with serving(FakeServer()) as address:
        assert label(address, given, str(dataset.output)) == 0
    assert sorted(line for line in s3.requests if "images/" in line) == sorted(
        f"GET images/{path.name}" for path in dataset.images_dir.iterdir()
    )
    assert s3.most_at_once >= 8


class TestUrls:
    """Images at the coco_url of their rows."""

    @pytest.fixture
    def web(self) -> Iterator[Server]:
        with serving_web() as server:
            yield server

    @pytest.fixture
    def given(self, dataset: Dataset, web: Server) -> list[str]:
        for row in dataset.coco["images"]:
            name = row["file_name"]
            web.files[f"/{name}"] = (dataset.images_dir / name).read_bytes()
            row["coco_url"] = web.url(f"/{name}?X-Amz-Signature=0f3c")
        dataset.save()
        return ["--annotations", str(dataset.json_path)]

    def test_images_of_named_hosts_are_fetched(self, dataset: Dataset, given: list[str]) -> None:
        expected = dataset.folder / "local.json"
        with serving(FakeServer()) as address:
            assert label(address, [*given, "--coco-url-hosts", "127.0.0.1"], str(dataset.output)) == 0
            assert label(address, local(dataset), str(expected)) == 0
        assert dataset.output.read_bytes() == expected.read_bytes()

    def test_urls_are_read_once_for_all_outputs(
        self, dataset: Dataset, given: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = []

        def image_urls_counted(annotations: Location) -> dict[str, str]:
            read.append(annotations)
            return original(annotations)

        original = image_urls.image_urls
        monkeypatch.setattr(image_urls, "image_urls", image_urls_counted)
        with_masks(dataset)
        hosts, page = ["--coco-url-hosts", "127.0.0.1"], ["--report", str(dataset.folder / "page.html")]
        with serving(FakeServer()) as address:
            assert main(["evaluate", "--server", address, *given, *hosts, *page]) == 0
            assert len(read) == 1
            assert label(address, [*given, *hosts], str(dataset.output)) == 0
        outputs = [*page, "--label-studio", str(dataset.folder / "t.json"), "--cvat", str(dataset.folder / "cvat")]
        assert main(["review", "--annotations", str(dataset.output), *hosts, *outputs]) == 0
        assert read == [dataset.json_path, dataset.json_path, dataset.output]

    @pytest.mark.parametrize("hosts", ["images.example.org", "*"])
    def test_other_hosts_are_not_contacted(
        self, dataset: Dataset, given: list[str], web: Server, hosts: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with serving(FakeServer()) as address:
            assert label(address, [*given, "--coco-url-hosts", hosts], str(dataset.output)) == 3
        errors = dataset.output.with_name("out.errors.jsonl").read_text()
        assert {json.loads(line)["reason"] for line in errors.splitlines()} == {"IMAGE_NOT_FOUND"}
        assert web.requests == []
        assert "0f3c" not in errors
        assert "0f3c" not in "".join(capfd.readouterr())

    def test_url_of_another_scheme_is_not_read(self, s3: S3, dataset: Dataset, given: list[str]) -> None:
        s3.put("private.png", (dataset.images_dir / "image_0.png").read_bytes())
        dataset.coco["images"][0]["coco_url"] = s3.address("private.png")
        dataset.coco["images"][1]["coco_url"] = "file:///etc/passwd"
        dataset.coco["images"][2]["coco_url"] = "http://me:word@127.0.0.1/a.png"
        dataset.save()
        with serving(FakeServer()) as address:
            assert label(address, [*given, "--coco-url-hosts", "127.0.0.1"], str(dataset.output)) == 3
        assert sum("error" in row for row in rows(dataset.output.read_bytes())) == 6
        assert s3.requests == []

    def test_file_without_urls_is_refused(self, dataset: Dataset) -> None:
        with serving(FakeServer()) as address:
            given = ["--annotations", str(dataset.json_path), "--coco-url-hosts", "*"]
            assert label(address, given, str(dataset.output)) == 2

    def test_signed_queries_reach_no_journal(self, dataset: Dataset, given: list[str]) -> None:
        with serving(FakeServer(Faults(kill_after=2))) as address:
            code = label(address, [*given, "--coco-url-hosts", "127.0.0.1"], str(dataset.output))
        assert code in (1, 3)
        journal = (dataset.folder / "out.json.ledger").read_text()
        assert "0f3c" not in journal


def test_signed_prefix_reaches_no_output_and_no_message(dataset: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    with serving_web() as web, serving(FakeServer()) as address:
        for path in dataset.images_dir.iterdir():
            web.files[f"/data/{path.name}"] = path.read_bytes()
        web.files["/data/in.json"] = dataset.json_path.read_bytes()
        query = "?sig=0f3c9a"
        given = ["--annotations", web.url(f"/data/in.json{query}"), "--images", web.url(f"/data{query}")]
        del web.files["/data/image_0.png"]
        assert label(address, given, str(dataset.output), "--shard", "0/1") == 3
        assert all(query in path for path in web.requests)
        assert main(["check", *given, "--report", str(dataset.folder / "page.html")]) == 3
    captured = capfd.readouterr()
    texts = [path.read_text(errors="replace") for path in dataset.folder.iterdir() if path.is_file()]
    assert any("[redacted]" in text for text in texts)
    assert [
        line for text in [*texts, captured.out, captured.err] for line in text.splitlines() if "0f3c9a" in line
    ] == []


def test_shards_of_parquet_read_their_row_groups_and_write_parts(s3: S3, dataset: Dataset) -> None:
    packed = dataset.folder / "in.parquet"
    copy_coco(dataset.json_path, packed, row_group_boxes=2)
    s3.put("in.parquet", packed.read_bytes())
    given = ["--annotations", s3.address("in.parquet"), "--images", str(dataset.images_dir)]
    with serving(FakeServer()) as address:
        assert label(address, local(dataset), str(dataset.output)) == 0
        for shard in range(2):
            more = ["--shard", f"{shard}/2", *work_dir(dataset)]
            assert label(address, given, s3.address("out.parquet"), *more) == 0
    assert s3.names() == [
        "in.parquet",
        "out.parquet/part-00000-of-00002.parquet",
        "out.parquet/part-00001-of-00002.parquet",
    ]
    assert list((dataset.folder / "work").iterdir()) == []
    assert read_coco(s3.address("out.parquet")).raw == json.loads(dataset.output.read_text())
    fake = FakeServer()
    with serving(fake) as address:
        assert label(address, given, s3.address("out.parquet"), "--shard", "1/2", *work_dir(dataset)) == 0
    assert fake.item_ids == [], "a complete part is not labeled again"
    # The parts are one input of the next command.
    back = dataset.folder / "back.json"
    assert main(["convert", "--from", "coco", "--labels", s3.address("out.parquet"), "--output", str(back)]) == 0
    assert back.read_bytes() == dataset.output.read_bytes()


def test_a_file_and_a_folder_of_one_name_hide_no_parts(
    s3: S3, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_coco(dataset.json_path, dataset.folder / "in.parquet", row_group_boxes=2)
    given = ["--annotations", str(dataset.folder / "in.parquet"), "--images", str(dataset.images_dir)]
    s3.put("folder.parquet/part-00000-of-00001.parquet", b"of an earlier job")
    s3.put("file.parquet", b"of an earlier job")
    before = s3.names()
    fake = FakeServer()
    with serving(fake) as address:
        for output, more in (("folder.parquet", []), ("file.parquet", ["--shard", "0/2"])):
            assert label(address, given, s3.address(output), *more, *work_dir(dataset)) == 4
            assert s3.address(output) in capsys.readouterr().err
    convert = ["convert", "--from", "coco", "--labels", str(dataset.json_path), "--output"]
    assert main([*convert, s3.address("folder.parquet")]) == 4
    assert (s3.names(), fake.item_ids) == (before, [])
    # Neither a file in place of one, nor a part beside others.
    assert main([*convert, s3.address("file.parquet")]) == 0
    with serving(FakeServer()) as address:
        assert label(address, given, s3.address("folder.parquet"), "--shard", "0/2", *work_dir(dataset)) == 0


@pytest.mark.parametrize("output", ["out.parquet", "out.parquet/part-00000-of-00002.parquet"])
def test_credentials_that_may_only_write_write_parquet(s3: S3, output: str) -> None:
    for key in ("out.parquet", ""):
        for method in ("GET", "HEAD"):
            s3.fail(key, status=403, code="AccessDenied", method=method)
    refuse_hidden_parts(s3.address(output))
