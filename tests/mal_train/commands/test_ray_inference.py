"""`mal-train inference` with the engine ray; a stand-in for the cluster labels in this process."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mal_train.cli import main
from mal_train.commands import ray_inference
from mal_train.commands.inference import inference
from mal_train.commands.ray_inference import inference_on_ray
from mal_train.config.limits import LimitsConfig
from mal_train.core.coco.journal import journal_path
from mal_train.core.coco.stream import copy_coco, write_coco
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, ConfigError, LostProcess, OutputError, Terminated, WrongKey
from mal_train.core.numbers import counted
from tests.mal_train.commands.stand_in_cluster import Change, StandInCluster
from tests.mal_train.offline.part_jobs import FAILED, as_json, local_labels, overrides, spec_of, write_job
from tests.scenes import widen

SOME_FAILED = 3


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> type[StandInCluster]:
    monkeypatch.setattr(StandInCluster, "labeled", [])
    monkeypatch.setattr(StandInCluster, "sizes", [])
    monkeypatch.setattr(StandInCluster, "change", staticmethod(lambda messages: messages))
    monkeypatch.setattr(ray_inference, "RayCluster", StandInCluster)
    return StandInCluster


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder, 12)
    return folder


class Command:
    """The command on the files of `write_job`."""

    def __init__(self, files: Path, results: Path) -> None:
        self.files, self.results = files, results
        self.output = results / "inference" / "labels.parquet"

    def run(self, **section: Any) -> Any:
        fields = {"engine": "ray", "ray_part_boxes": 4, **section}
        return inference_on_ray(spec_of(self.files, self.results, "parquet", **fields), Console.silent())

    def main(self, **section: Any) -> int:
        fields = {"engine": "ray", "ray_part_boxes": 4, **section}
        return main(["inference", *overrides(self.files, self.results, "parquet", **fields)])


@pytest.fixture
def command(files: Path, tmp_path: Path, cluster: type[StandInCluster]) -> Command:
    return Command(files, tmp_path / "results")


def drop(*numbers: int) -> Change:
    """Loses the messages of some parts, as if their process had ended before it reported them."""
    return lambda messages: (text for text in messages if json.loads(text)["result"]["number"] not in numbers)


def test_the_input_may_not_be_in_the_output_where_a_restart_would_delete_it(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "parts.parquet" / "part-000000000.parquet"
    source.parent.mkdir()
    source.write_bytes((command.files / "boxes.parquet").read_bytes())
    with pytest.raises(ConfigError):
        command.run(ann_path=str(source), label_dump_path=str(source.parent), restart=True)
    assert source.exists()


def test_an_address_of_another_form_is_refused_without_its_secrets(command: Command) -> None:
    with pytest.raises(ConfigError) as caught:
        command.run(ann_path="https://me:pass-1@host/boxes.json?X-Amz-Signature=sig-1")
    assert "host/boxes.json" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("pass-1", "sig-1"))


def test_a_file_whose_categories_are_no_list_is_refused(command: Command, tmp_path: Path) -> None:
    raw = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": 5}
    write_coco(tmp_path / "in.parquet", raw)
    with pytest.raises(BadDataset):
        command.run(ann_path=str(tmp_path / "in.parquet"))
    assert not command.output.exists()


def test_the_output_is_that_of_the_local_engine_with_its_exit_code(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main() == SOME_FAILED
    assert as_json(command.output) == local_labels(command.files, tmp_path / "local")
    printed = capsys.readouterr()
    lines = [f"{counted(count, 'box')} without a mask: {reason}" for reason, count in FAILED.items()]
    assert all(line in printed.out for line in lines)
    assert printed.err.count("no mask") == sum(FAILED.values())
    status = (command.results / "inference" / "status.json").read_text()
    assert "SUCCESS" in status


def test_crowd_regions_are_counted_as_locally(command: Command, tmp_path: Path) -> None:
    local = inference(spec_of(command.files, tmp_path / "local", "json"), Console.silent())
    assert command.run().crowds == local.crowds == 1


def rename(folder: Path, names: Mapping[int, str]) -> None:
    """Gives images of the files of `write_job` other names, by their place."""
    content = json.loads((folder / "boxes.json").read_text())
    for index, name in names.items():
        content["images"][index]["file_name"] = name
    (folder / "boxes.json").write_text(json.dumps(content))
    (folder / "boxes.parquet").unlink()
    copy_coco(folder / "boxes.json", folder / "boxes.parquet", row_group_boxes=20)


def test_names_in_several_parts_that_can_mean_one_file_are_refused_as_locally(
    tmp_path: Path, cluster: type[StandInCluster]
) -> None:
    write_job(tmp_path / "job", 6)
    rename(tmp_path / "job", {1: "cam0/1.png", 4: "cam1/1.png"})
    command = Command(tmp_path / "job", tmp_path / "results")
    result = command.run()
    assert len(cluster.labeled) > 2
    assert result.failed["IMAGE_NOT_FOUND"] > FAILED["IMAGE_NOT_FOUND"] + 1
    assert as_json(command.output) == local_labels(command.files, tmp_path / "local")


def test_what_processes_found_about_images_is_reported(
    tmp_path: Path, cluster: type[StandInCluster], capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path / "job", 6)
    rename(tmp_path / "job", {1: "old/1.png", 4: "old/4.png"})
    for name in ("1.png", "3.png", "5.png"):
        widen(tmp_path / "job" / "images" / name)
    Command(tmp_path / "job", tmp_path / "results").main()
    assert len(cluster.labeled) > 2
    printed = "".join(capsys.readouterr())
    assert "2 images of another spelling" in printed
    assert printed.count("3 images with values beyond 8 bits") == 1


def test_test_time_augmentation_gives_the_local_labels_too(command: Command, tmp_path: Path) -> None:
    options = {"margins": [0.1, 0.4], "resolve_overlaps": True, "use_mixed_model_test": True}
    command.run(**options)
    assert as_json(command.output) == local_labels(command.files, tmp_path / "local", **options)


def test_a_run_that_ended_early_goes_on_with_the_missing_parts(
    command: Command, cluster: type[StandInCluster], tmp_path: Path
) -> None:
    def end(messages: Iterator[str]) -> Iterator[str]:
        yield next(messages)
        yield next(messages)
        raise Terminated("terminated by SIGTERM")

    cluster.change = staticmethod(end)
    with pytest.raises(Terminated):
        command.run()
    first, cluster.labeled, cluster.change = list(cluster.labeled), [], staticmethod(lambda messages: messages)
    result = command.run()
    assert [part.number for part in cluster.labeled] == [part.number for part in first[2:]]
    assert result.failed == FAILED
    assert as_json(command.output) == local_labels(command.files, tmp_path / "local")


def test_a_finished_job_is_repeated_without_a_cluster(
    command: Command, cluster: type[StandInCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = command.run()
    monkeypatch.delattr(ray_inference, "RayCluster")
    assert command.run() == result


def test_parts_of_lost_processes_are_labeled_in_further_rounds(
    command: Command, cluster: type[StandInCluster], tmp_path: Path
) -> None:
    rounds = iter([drop(1, 3, 4), drop(1, 3), drop()])
    cluster.change = staticmethod(lambda messages: iter(list(next(rounds)(messages))))
    command.run()
    assert [part.number for part in cluster.labeled[-2:]] == [1, 3]
    assert as_json(command.output) == local_labels(command.files, tmp_path / "local")


def test_a_lost_part_is_repeated_in_a_task_of_its_own(
    command: Command, cluster: type[StandInCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_inference, "TASKS_PER_ACTOR", 1)
    rounds = iter([drop(*range(99)), drop(1, 2), drop()])
    cluster.change = staticmethod(lambda messages: iter(list(next(rounds)(messages))))
    command.run()
    first = [size for size in cluster.sizes if size > 1]
    assert sum(first) > 2
    assert cluster.sizes[len(first) :] == [1] * (len(cluster.sizes) - len(first)), "every further round"
    assert [part.number for part in cluster.labeled[-2:]] == [1, 2]


def test_parts_that_are_lost_repeatedly_are_an_error_and_the_others_are_kept(
    command: Command, cluster: type[StandInCluster]
) -> None:
    cluster.change = staticmethod(drop(2))
    with pytest.raises(LostProcess, match="part-000000002"):
        command.run()
    cluster.labeled, cluster.change = [], staticmethod(lambda messages: messages)
    command.run()
    assert [part.number for part in cluster.labeled] == [2]


def test_a_part_that_is_reported_twice_counts_once(command: Command, cluster: type[StandInCluster]) -> None:
    cluster.change = staticmethod(lambda messages: (text for text in messages for _ in range(2)))
    result = command.run()
    assert result.failed == FAILED
    lines = journal_path(command.output).read_bytes().splitlines()[1:]
    assert len(lines) == len(cluster.labeled)


def test_a_lost_device_is_printed_and_its_part_repeated(
    command: Command, cluster: type[StandInCluster], capsys: pytest.CaptureFixture[str]
) -> None:
    error = json.dumps({"error": "DeviceLost", "message": "an illegal address"})
    rounds = iter([lambda messages: [error, *drop(0)(messages)], drop()])
    cluster.change = staticmethod(lambda messages: iter(next(rounds)(messages)))
    assert command.main() == SOME_FAILED
    assert "an illegal address" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind"), [("WrongKey", WrongKey), ("OutputError", OutputError), ("BadDataset", BadDataset)]
)
def test_an_error_of_a_process_ends_the_command(
    error: str, kind: type[Exception], command: Command, cluster: type[StandInCluster]
) -> None:
    cluster.change = staticmethod(lambda _: iter([json.dumps({"error": error, "message": "on a machine"})]))
    with pytest.raises(kind, match="on a machine"):
        command.run()


@pytest.mark.parametrize("change", [{"use_flip_test": True}, {"ray_part_boxes": 8}, {"precision": "auto"}])
def test_another_job_is_refused_in_the_same_folder(change: dict[str, Any], command: Command) -> None:
    command.run()
    written = {path.name: path.stat().st_mtime_ns for path in command.output.iterdir()}
    with pytest.raises(ConfigError, match="instead of"):
        command.run(**change)
    assert {path.name: path.stat().st_mtime_ns for path in command.output.iterdir()} == written
    command.run(restart=True, **change)


def test_raised_limits_are_another_job(command: Command) -> None:
    command.run()
    spec = spec_of(command.files, command.results, "parquet", engine="ray", ray_part_boxes=4)
    raised = spec.model_copy(update={"limits": LimitsConfig(max_side=20_000)})
    with pytest.raises(ConfigError, match="limits"):
        inference_on_ray(raised, Console.silent())


def test_another_file_and_another_checkpoint_are_refused_with_the_differences(command: Command, tmp_path: Path) -> None:
    command.run()
    write_job(tmp_path / "other", 6)
    for fields, difference in (
        ({"ann_path": str(tmp_path / "other" / "boxes.parquet")}, "input_sha256"),
        ({"img_dir": str(tmp_path / "other" / "images")}, "images"),
        ({"checkpoint": "builtin"}, "checkpoint_sha256"),
    ):
        with pytest.raises(ConfigError, match=difference):
            command.run(**fields)


@pytest.mark.parametrize(
    "section",
    [
        {"label_dump_path": "labels.json"},
        {"ann_path": "boxes.json"},
        {"load_mask": True},
        {"box_inputs": "detections.json"},
        {"num_gpus": 2},
        {"label_dump_path": "s3://bucket/labels.parquet"},
        {"img_dir": "https://host/images?signature=1"},
        {"img_dir": "nowhere"},
    ],
)
def test_a_setting_that_the_engine_does_not_support_is_refused(section: dict[str, Any], command: Command) -> None:
    with pytest.raises(ConfigError, match=f"inference.{next(iter(section))}"):
        command.run(**section)


def test_a_parquet_file_of_another_schema_is_refused(command: Command, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(BadDataset):
        command.run(ann_path=str(tmp_path / "other.parquet"))


def test_the_output_cannot_be_the_input(command: Command) -> None:
    with pytest.raises(ConfigError):
        command.run(label_dump_path=str(command.files / "boxes.parquet"))


def test_a_secret_in_the_spec_is_not_sent_to_other_machines(tmp_path: Path, cluster: type[StandInCluster]) -> None:
    from mal_train.kernel.checkpoint.keys import parse_key

    write_job(tmp_path / "sealed", 6, parse_key("correct horse battery", purpose="encryption", source="yaml"))
    spec = spec_of(tmp_path / "sealed", tmp_path, "parquet", engine="ray")
    with pytest.raises(ConfigError, match="file:PATH"):
        inference_on_ray(spec.model_copy(update={"decryption_key": "correct horse battery"}), Console.silent())
    assert cluster.labeled == []
    (tmp_path / "key").write_text("correct horse battery\n")
    result = inference_on_ray(spec.model_copy(update={"decryption_key": f"file:{tmp_path / 'key'}"}), Console.silent())
    assert result.labeled
