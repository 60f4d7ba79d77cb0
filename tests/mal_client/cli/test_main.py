"""Tests of the command `mal-client`: exit codes, output and files."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from mal.v1 import types_pb2
from mal_client.cli.common import failures_message, read_secret
from mal_client.cli.main import main
from mal_client.client import Client
from mal_client.dataset.progress import ProgressDisplay
from mal_client.types import Progress

from mal_train.core.errors import ConfigError
from tests.mal_client.datasets import Dataset, make_dataset, with_masks
from tests.mal_client.fake_server import FakeServer, Faults, Limits, serving


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return with_masks(make_dataset(tmp_path))


@pytest.fixture
def address() -> Iterator[str]:
    with serving(FakeServer()) as server:
        yield server


def arguments(command: str, address: str, dataset: Dataset, *more: str) -> list[str]:
    given = ["--server", address, "--annotations", str(dataset.json_path), "--images", str(dataset.images_dir)]
    output = ["--output", str(dataset.output)] if command == "label" else []
    return [command, *given, *output, *more]


def test_label_writes_the_file_and_exits_0(address: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("label", address, dataset, "--agreement", "--branch", "mixed", "--threshold", "0.3")) == 0
    assert len(dataset.labeled()) == 6
    assert dataset.labeled()[100]["agreement"] == 0.5
    printed = capsys.readouterr()
    assert "6 annotations labeled, 0 failed" in printed.out
    assert all(text in printed.err for text in ("label: image 3/3", "6 boxes", "0 failed"))


def test_failed_items_are_listed_beside_the_output_and_exit_3(
    address: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.images_dir / "image_1.png").unlink()
    assert main(arguments("label", address, dataset)) == 3
    errors_file = dataset.folder / "out.errors.jsonl"
    assert [json.loads(line)["annotation_id"] for line in errors_file.read_text().splitlines()] == [102, 103]
    assert failures_message(2, errors_file) in capsys.readouterr().err
    assert len(dataset.labeled()) == 6
    dataset.coco["annotations"].pop()
    for row in dataset.coco["annotations"][3:]:
        row["image_id"] = dataset.coco["annotations"][0]["image_id"]
    dataset.save()
    assert main(arguments("label", address, dataset)) == 3
    assert failures_message(1, errors_file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "content"), [("label", "boxes"), ("evaluate", "the true masks"), ("export", "masks"), ("review", "masks")]
)
def test_the_help_states_whether_the_input_has_boxes_or_masks(
    verb: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert f"COCO file with {content}" in " ".join(capsys.readouterr().out.split())


def test_an_image_that_cannot_be_read_is_printed_once(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    first = dataset.coco["images"][0]
    for row in dataset.coco["annotations"]:
        row["image_id"] = first["id"]
    dataset.save()
    (dataset.images_dir / first["file_name"]).unlink()
    with serving(FakeServer()) as address:
        assert main(arguments("label", address, dataset)) == 3
    assert capsys.readouterr().err.count("IMAGE_NOT_FOUND") == 1


def test_label_keeps_the_score_that_a_row_came_with(address: str, dataset: Dataset) -> None:
    dataset.coco["annotations"][0]["score"] = 0.876543
    dataset.save()
    assert main(arguments("label", address, dataset)) == 0
    first, second = list(dataset.labeled().values())[:2]
    assert first["score"] == 0.876543
    assert 0 <= first["mask_score"] <= 1
    assert "mask_score" not in second


def test_an_invalid_file_exits_2_before_any_call(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.coco["annotations"][1]["id"] = 100
    dataset.save()
    fake = FakeServer()
    with serving(fake) as address:
        assert main(arguments("label", address, dataset)) == 2
    assert "100" in capsys.readouterr().err
    assert not fake.calls


@pytest.mark.parametrize("scheme", ["", "ipv4:"])
def test_selected_ids_are_labeled_on_two_servers_with_a_json_log(
    address: str, dataset: Dataset, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = dataset.folder / "ids.txt"
    wanted.write_text('101\n\n "box" \n', encoding="utf-16", newline="\r\n")
    dataset.coco["annotations"][5]["id"] = "box"
    dataset.save()
    with serving(FakeServer()) as other:
        both = ["--server", f"{scheme}{address},{other}", "--only", "ids", "--ids", str(wanted), "--log", "json"]
        assert main(arguments("label", address, dataset, *both, "--format", "uncompressed", "--update-bbox")) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (events[-1]["event"], events[-1]["labeled"], events[-1]["copied"]) == ("done", 2, 4)
    assert {event["event"] for event in events} == {"progress", "done"}


@pytest.mark.parametrize("content", ["s3crét", "s3cret\ufeff"])
def test_a_secret_that_is_not_ascii_is_refused_and_not_quoted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_secret(path, "--api-key-file")
    assert str(caught.value).startswith(f"--api-key-file: {path}: ")
    assert "s3cr" not in str(caught.value)
    path.write_text("s3cret\n")
    assert read_secret(path, "--api-key-file") == "s3cret"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--threshold", "2"],
        ["--branch", "both"],
        ["--timeout", "0"],
        ["--only", "some"],
        ["--only", "ids"],
        ["--ids", "absent.txt"],
        ["--server", "nowhere"],
    ],
)
def test_a_wrong_argument_exits_2(address: str, dataset: Dataset, wrong: list[str]) -> None:
    try:
        code: Any = main(arguments("label", address, dataset, *wrong))
    except SystemExit as ended:
        code = ended.code
    assert code == 2


def test_an_output_that_cannot_be_written_exits_4(address: str, dataset: Dataset) -> None:
    assert main(arguments("label", address, dataset, "--output", str(dataset.folder / "no" / "out.json"))) == 4


def test_an_unavailable_server_exits_1_with_its_address(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("label", "127.0.0.1:9", dataset)) == 1
    assert "127.0.0.1:9" in capsys.readouterr().err
    assert not dataset.output.exists()


def test_a_name_without_an_address_exits_1_with_the_name(
    dataset: Dataset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for address in ("mal-server.invalid:50051", "dns:///mal-server.invalid:50051"):
        assert main(arguments("label", address, dataset)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "mal-server.invalid" in line
    assert not dataset.output.exists()


def test_a_list_with_a_name_is_refused_for_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--server", "gpu-1:50051,gpu-2:50051"]) == 2
    assert "dns:///" in capsys.readouterr().err


def test_evaluate_prints_the_metrics_and_writes_json_and_html(
    address: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics, page = dataset.folder / "metrics.json", dataset.folder / "page.html"
    assert main(arguments("evaluate", address, dataset, "--output", str(metrics), "--report", str(page))) == 0
    printed = capsys.readouterr()
    assert "mIoU" in printed.out
    assert "6 boxes, 0 not sent" in printed.err
    assert json.loads(metrics.read_text())["count"] == 6
    assert page.read_text().startswith("<!doctype html>")


def test_info_prints_the_server_as_json(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--server", address]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["arch"], printed["branches"]) == ("box-filler", None)


def test_info_lists_the_branches_of_the_model_that_this_client_knows(capsys: pytest.CaptureFixture[str]) -> None:
    newer: Any = max(types_pb2.Branch.values()) + 1
    with serving(FakeServer(limits=Limits(branches=[types_pb2.BRANCH_STUDENT, newer]))) as address:
        assert main(["info", "--server", address]) == 0
    assert json.loads(capsys.readouterr().out)["branches"] == ["student"]


@pytest.mark.parametrize(
    ("more", "option"),
    [(["--agreement"], "agreement"), (["--branch", "mixed"], "branch"), (["--branch", "teacher"], "branch")],
)
def test_options_that_need_two_networks_exit_2_before_any_work_if_the_model_has_one(
    dataset: Dataset, more: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeServer(limits=Limits(branches=[types_pb2.BRANCH_STUDENT]))
    with serving(fake) as address:
        assert main(arguments("label", address, dataset, *more)) == 2
        assert fake.calls == ["GetServerInfo"]
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f"{option}: " in message
        assert f"--{option}" in message
        assert not list(dataset.folder.glob("out*"))
        assert main(arguments("label", address, dataset, "--branch", "student")) == 0


def test_options_that_need_two_networks_are_sent_if_the_model_has_both(dataset: Dataset) -> None:
    both = [types_pb2.BRANCH_STUDENT, types_pb2.BRANCH_TEACHER, types_pb2.BRANCH_MIXED]
    with serving(FakeServer(limits=Limits(branches=both))) as address:
        assert main(arguments("label", address, dataset, "--agreement", "--branch", "mixed")) == 0


def test_a_closed_stdout_exits_141_without_a_message(address: str) -> None:
    command = [sys.executable, "-m", "mal_client.cli.main", "info", "--server", address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment())
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(120) == 141
    process.stderr.close()


def test_ctrl_c_exits_130_and_leaves_nothing(dataset: Dataset) -> None:
    fake = FakeServer(Faults(hold_after=0))
    with serving(fake) as address:
        # A background job ignores SIGINT, and its children inherit that.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from mal_client.cli.main import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, *arguments("label", address, dataset)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=_environment(), text=True)
        while "LabelImages" not in fake.calls and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in printed
    assert "Traceback" not in printed
    assert sorted(path.name for path in dataset.folder.iterdir()) == ["images", "in.json"]


@pytest.mark.parametrize(
    ("options", "resumable", "without"),
    [([], True, ""), (["--restart"], True, "--restart"), (["--dry-run"], False, "")],
)
def test_ctrl_c_of_a_cvat_job_says_how_to_resume(
    options: list[str],
    resumable: bool,
    without: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mal_client.cli.cvat._cvat", interrupt)
    assert main(["cvat", "--server", "here:1", "--cvat", "http://there", "--task", "1", *options]) == 130
    message = capsys.readouterr().err
    assert ("resume" in message) is resumable
    assert ("--restart" in message) is bool(without)


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        ("review", "--by", "--sort-by"),  # former name
        ("review", "--picture-prefix", "--image-prefix"),  # former name
        ("label-studio", "--picture-host", "--image-host"),  # former name
        ("cvat", "--ledger", "--journal"),  # former name
    ],
)
def test_the_former_name_of_an_option_is_refused_with_the_new_one(
    command: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, old, "value"])
    assert ended.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert old in message
    assert new in message


@pytest.mark.parametrize("module", ["mal_client.client", "mal_client.cli.main"])
def test_the_client_imports_without_torch_and_without_server_packages(module: str) -> None:
    code = (
        "import sys\n"
        "absent = ('torch', 'timm', 'lightning', 'pydantic', 'pyrage', 'mal_server', 'grpc_health')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        f"import {module}, mal_client.evaluation.report_page, mal_client.evaluation.run\n"
        "import mal_train.core.report.overlays, mal_client.review.pages\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


@pytest.mark.parametrize(("module", "needed"), [("mal_client.client", ()), ("mal_client.cli.main", ("numpy", "tqdm"))])
def test_importing_the_client_imports_no_heavy_library(module: str, needed: tuple[str, ...]) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'numpy', 'cv2', 'pycocotools', 'PIL', 'matplotlib', 'torch', 'tqdm', 'pyarrow', 'fsspec'}\n"
        f"heavy &= set(sys.modules) - {set(needed)}\n"
        "sys.exit(', '.join(heavy) or None)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def test_without_a_terminal_progress_is_a_line_every_few_seconds() -> None:
    stream, now = io.StringIO(), [0.0]
    display = ProgressDisplay("label", stream, lambda: now[0])
    with display:
        for done in range(1, 21):
            now[0] = float(done)
            display(Progress(done, 20, 2 * done, 1))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "label: image 6/20, 1.00 s/image, 00:14 left, 12 boxes, 1 failed"
    assert len(lines) == 4
    assert lines[-1].startswith("label: image 20/20,")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_of_an_unfinished_run_do_not_count_into_the_rate() -> None:
    stream, now = io.StringIO(), [0.0]
    with ProgressDisplay("evaluate", stream, lambda: now[0]) as display:
        for before in range(1, 801):
            display(Progress(before, 1000, before, 0, images_before=before))
        now[0] = 10.0
        display(Progress(820, 1000, 820, 0, images_before=800))
    assert stream.getvalue() == "evaluate: image 820/1000, 2.00 image/s, 01:30 left, 820 boxes, 0 failed\n"


def test_without_a_terminal_the_replay_of_an_unfinished_run_prints_lines() -> None:
    stream, now = io.StringIO(), [0.0]
    with ProgressDisplay("evaluate", stream, lambda: now[0]) as display:
        for before in range(1, 13):
            now[0] = float(before)
            display(Progress(before, 1000, before, 0, images_before=before))
    lines = stream.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["evaluate: image 6/1000", "evaluate: image 11/1000"]


def test_the_bar_starts_after_the_results_of_an_unfinished_run() -> None:
    display = ProgressDisplay("evaluate", Terminal())
    for before in range(1, 801):
        display(Progress(before, 1000, before, 0, images_before=before))
    display(Progress(803, 1000, 803, 0, images_before=800))
    bar = display.bar
    assert bar is not None
    assert (bar.n, bar.initial, bar.total) == (803, 800, 1000)
    display(Progress(1, 1000, 1, 0, images_before=1))  # the stream restarted from the beginning
    assert (bar.n, bar.initial) == (1, 1)


def test_on_a_terminal_progress_is_a_bar() -> None:
    stream = Terminal()
    with ProgressDisplay("label", stream) as display:
        for done in range(1, 4):
            display(Progress(done, 3, 2 * done, 0, running_miou=0.5))
    assert "3/3" in stream.getvalue()
    assert "6 boxes, 0 failed, mIoU 0.500" in stream.getvalue()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_options_that_need_tls_name_it_as_the_command_and_as_python_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    for options in (["--token-file", str(token)], ["--client-cert", "cert.pem"]):
        assert main(["info", "--server", "mal.example:1", *options]) == 2
        printed = capsys.readouterr().err
        assert "--tls-ca" in printed
        assert "tls_ca=" in printed
        assert "secret" not in printed


def test_a_token_may_be_sent_to_this_machine_inside_an_ipv6_address() -> None:
    Client("[::ffff:127.0.0.1]:1", token="secret").close()
    with pytest.raises(ConfigError):
        Client("127.1:1", token="secret")


@pytest.mark.parametrize(
    ("options", "spellings"),
    [
        (["--min-component-area", "-1"], ("--min-component-area", "min_component_area_px=")),
        (["--threshold", "2"], ("--threshold", "threshold=")),
        (["--polygon-tolerance", "2"], ("--polygon-tolerance", "polygon_tolerance_px=", "--format", "mask_format=")),
        (["--only", "missing", "--resolve-overlaps"], ("--resolve-overlaps", "--only")),
    ],
)
def test_options_that_are_refused_are_named_as_the_command_and_as_python_does(
    dataset: Dataset, address: str, options: list[str], spellings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("label", address, dataset, *options)) == 2
    printed = capsys.readouterr().err
    assert all(spelling in printed for spelling in spellings)
