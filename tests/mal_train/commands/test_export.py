"""`mal-train export`, checkpoints with one network, and the model in the package."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mal_train.cli import main
from mal_train.commands import export
from mal_train.commands.label import open_labeling_job
from mal_train.commands.training_setup import build_network
from mal_train.config.spec import Spec, load_spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, Untrusted
from mal_train.core.settings import Branch, LabelerConfig
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, read_header, save_checkpoint, sha256_of
from mal_train.kernel.checkpoint.lineage import NOT_STATED
from mal_train.kernel.convert.pretrained import load_pretrained
from mal_train.kernel.labeler.load import build_labeler, load_labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.quantization import quantizable
from tests.scenes import write_scenes

MICRO = ModelConfig("vit-micro/16", mask_head_hidden_channel=4, mask_head_out_channel=4)
X, BRANCH = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)), torch.tensor([0, 2])


@pytest.fixture
def network() -> MalNetwork:
    torch.manual_seed(3)
    both = MalNetwork(MICRO).eval()
    with torch.no_grad():
        for parameter in both.teacher.parameters():
            parameter.mul_(1.1)
    return both


@pytest.fixture
def trained(tmp_path: Path, network: MalNetwork) -> Path:
    path = tmp_path / "trained.malckpt"
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), network.state_dict()), None)
    return path


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_selected_network_is_exported_with_equal_logits_up_to_float16(
    tmp_path: Path, network: MalNetwork, trained: Path, which: str
) -> None:
    out = tmp_path / "small.malckpt"
    overrides = [f"evaluate.checkpoint={trained}", f"evaluate.use_teacher_test={which == 'teacher'}"]
    assert main(["export", "-o", str(out), "--license", "Apache-2.0", *overrides]) == 0
    assert trained.stat().st_size / out.stat().st_size > 3
    loaded = load_checkpoint(out, None)
    assert {tensor.dtype for tensor in loaded.weights.values()} == {torch.float32}
    assert (loaded.provenance["network"], loaded.provenance["licence"]) == (which, "Apache-2.0")
    labeler, _ = load_labeler(out, precision="float32")
    with torch.inference_mode():
        before = network.logits(X, BRANCH, Branch(which))
        after = labeler.network.logits(X, BRANCH, Branch.STUDENT)
    assert torch.allclose(before, after, rtol=0.02, atol=0.02)
    assert not torch.equal(before, after)


def test_the_mean_of_two_checkpoints_is_written(tmp_path: Path, network: MalNetwork, trained: Path) -> None:
    doubled = {name: weight * 3 for name, weight in network.state_dict().items()}
    other, out = tmp_path / "other.malckpt", tmp_path / "mean.malckpt"
    save_checkpoint(other, Checkpoint(MICRO, LabelerConfig(crop_size=64), doubled), None)
    assert main(["export", "-o", str(out), "--average", str(other), f"evaluate.checkpoint={trained}"]) == 0
    written = load_checkpoint(out, None)
    for name, weight in written.weights.items():
        assert torch.allclose(weight, 2 * network.state_dict()[name], rtol=1e-3, atol=1e-6)
    assert written.provenance["mean_of_checkpoints"] == 2


def test_the_provenance_of_a_mean_lists_all_sources_and_licenses(
    tmp_path: Path, network: MalNetwork, trained: Path
) -> None:
    known = {"tool": "mine", "starting_weights": "a", "starting_weights_licence": "Apache-2.0", "steps": 10}
    bare = {"tool": "mine", "starting_weights": "b", "starting_weights_licence": NOT_STATED, "steps": 20}
    paths = [tmp_path / "known.malckpt", tmp_path / "bare.malckpt"]
    for path, provenance in zip(paths, (known, bare), strict=True):
        save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(), network.state_dict(), [], provenance), None)
    out = tmp_path / "mean.malckpt"
    assert main(["export", "-o", str(out), "--average", str(paths[1]), f"evaluate.checkpoint={paths[0]}"]) == 0
    written = load_checkpoint(out, None).provenance
    assert [(source["checkpoint"], source["steps"], source["sha256"]) for source in written["sources"]] == [
        (path.name, steps, sha256_of(path)) for path, steps in zip(paths, (10, 20), strict=True)
    ]
    assert written["starting_weights_licence"] == f"Apache-2.0 and {NOT_STATED}"
    assert (written["starting_weights"], written["tool"]) == ("a and b", "mine")
    assert "steps" not in written


@pytest.mark.parametrize(
    ("overrides", "is_kept"),
    [([], True), (["dataset.test_crop_size=96"], False), (["evaluate.use_teacher_test=true"], False)],
)
def test_a_calibration_is_kept_only_for_the_network_and_crop_it_was_fitted_to(
    tmp_path: Path, network: MalNetwork, overrides: list[str], is_kept: bool
) -> None:
    source, out = tmp_path / "fitted.malckpt", tmp_path / "small.malckpt"
    config = LabelerConfig(crop_size=64, calibration=((0.0, 0.0), (1.0, 1.0)))
    save_checkpoint(source, Checkpoint(MICRO, config, network.state_dict()), None)
    assert main(["export", "-o", str(out), f"evaluate.checkpoint={source}", *overrides]) == 0
    header = read_header(out, None).content
    assert header is not None
    assert (header.labeler.calibration is not None) == is_kept


def test_integer_buffers_are_exported_unchanged(tmp_path: Path) -> None:
    model = ModelConfig("fan_tiny_12_p16_224", mask_head_hidden_channel=4, mask_head_out_channel=4)
    fan, out = tmp_path / "fan.malckpt", tmp_path / "small.malckpt"
    weights = MalNetwork(model).state_dict()
    save_checkpoint(fan, Checkpoint(model, LabelerConfig(crop_size=64), weights), None)
    assert main(["export", "-o", str(out), f"evaluate.checkpoint={fan}", "--average", str(fan)]) == 0
    counts = {
        name: tensor for name, tensor in load_checkpoint(out, None).weights.items() if tensor.dtype is torch.int64
    }
    assert counts
    assert all(torch.equal(count, weights[name]) for name, count in counts.items())


def test_the_mean_of_two_different_networks_is_refused(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig("vit-micro/16", mask_head_hidden_channel=8, mask_head_out_channel=4)
    other = tmp_path / "other.malckpt"
    save_checkpoint(other, Checkpoint(model, LabelerConfig(crop_size=64), MalNetwork(model).state_dict()), None)
    out = tmp_path / "mean.malckpt"
    assert main(["export", "-o", str(out), "--average", str(other), f"evaluate.checkpoint={trained}"]) == 2
    assert f"--average: {other}" in capsys.readouterr().err


def test_the_missing_network_of_an_export_is_refused(tmp_path: Path, trained: Path) -> None:
    out = tmp_path / "small.malckpt"
    assert main(["export", "-o", str(out), f"evaluate.checkpoint={trained}"]) == 0
    labeler, _ = load_labeler(out)
    assert not labeler.network.has_teacher
    for which in (Branch.TEACHER, Branch.MIXED):
        with pytest.raises(ConfigError):
            labeler.network.logits(X, BRANCH, which)


def test_thresholds_and_calibration_are_fitted_to_the_exported_network(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes", images=40)
    out = tmp_path / "small.malckpt"
    overrides = [
        f"evaluate.checkpoint={trained}",
        f"dataset.val_ann_path={annotations}",
        f"dataset.val_img_dir={images}",
        "dataset.test_crop_size=96",
        "train.test_margin_rate=[0.2]",
        "evaluate.precision=float32",
    ]
    assert main(["export", "-o", str(out), *overrides]) == 0
    assert "80 masks" in capsys.readouterr().out
    header = read_header(out, None).content
    assert header is not None
    assert (header.labeler.crop_size, header.labeler.margin_rate) == (96, 0.2)
    assert header.labeler.calibration is not None
    assert header.labeler.resolved_score is None
    assert 0 < header.provenance["validation"]["mIoU"] < 1


def widen_boxes(coco: dict[str, Any]) -> None:
    """Lets the boxes of each image reach into each other."""
    for row in coco["annotations"]:
        row["bbox"] = [4, 4, 88, 72]


def test_the_score_of_resolved_overlaps_is_fitted_and_kept(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mal_train.training.score_fit.ranks_better", lambda *_: True)
    monkeypatch.setattr("mal_train.training.score_regression.MIN_MASKS", 50)
    annotations, images = write_scenes(tmp_path / "scenes", images=40, change=widen_boxes)
    fitted, again = tmp_path / "fitted.malckpt", tmp_path / "again.malckpt"
    data = [f"dataset.val_ann_path={annotations}", f"dataset.val_img_dir={images}", "train.fit_thresholds=false"]
    assert main(["export", "-o", str(fitted), f"evaluate.checkpoint={trained}", *data]) == 0
    assert "overlaps resolved: mIoU" in capsys.readouterr().err
    header = read_header(fitted, None).content
    assert header is not None
    assert header.labeler.resolved_score is not None
    assert 0 < header.provenance["validation_overlaps_resolved"]["mIoU"] < 1
    assert main(["export", "-o", str(again), f"evaluate.checkpoint={fitted}"]) == 0
    kept = read_header(again, None).content
    assert kept is not None
    assert kept.labeler == header.labeler


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluate.use_mixed_model_test=true", "evaluate.use_mixed_model_test: true"),
        ("dataset.test_crop_size=100", "crop_size: 100"),
    ],
)
def test_an_invalid_export_is_refused_and_writes_no_file(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    out = tmp_path / "small.malckpt"
    assert main(["export", "-o", str(out), f"evaluate.checkpoint={trained}", override]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_the_former_license_option_is_refused_with_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "--licence", "MIT", "-o", "small.malckpt"])  # former name
    assert caught.value.code == 2
    assert "--license" in capsys.readouterr().err


def test_builtin_resolves_to_the_file_in_the_package_and_paths_to_themselves() -> None:
    assert builtin.resolve("some/file.malckpt") == Path("some/file.malckpt")
    path = builtin.resolve(builtin.BUILTIN)
    assert path.is_file()
    assert path.stat().st_size <= 20_000_000


def test_inspect_shows_the_license_of_the_model_in_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert sha256_of(builtin.resolve(builtin.BUILTIN)) == builtin.SHA256
    assert main(["inspect", "builtin"]) == 0
    assert "starting_weights_licence: Apache-2.0" in capsys.readouterr().out
    content = read_header(builtin.resolve("builtin"), None).content
    assert content is not None
    assert load_pretrained(MalNetwork(content.model), "builtin").lineage.license == "Apache-2.0"


@pytest.mark.parametrize("task", ["evaluate", "inference"])
def test_labels_state_the_hash_of_the_loaded_weights_even_if_the_file_has_changed(
    trained: Path, task: Literal["evaluate", "inference"]
) -> None:
    sha256 = sha256_of(trained)
    job = open_labeling_job(Spec.model_validate({task: {"checkpoint": str(trained)}}), task, Console.silent())
    trained.write_bytes(b"a newer file of the same name")
    assert job.provenance()["checkpoint_sha256"] == sha256


def test_a_mean_states_the_hashes_of_the_loaded_files_even_if_they_have_changed(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_replace(path: Path, *args: Any, **options: Any) -> Checkpoint:
        loaded = load_checkpoint(path, *args, **options)
        path.write_bytes(b"a newer file of the same name")
        return loaded

    monkeypatch.setattr(export, "load_checkpoint", load_and_replace)
    sha256, other, out = sha256_of(trained), tmp_path / "other.malckpt", tmp_path / "mean.malckpt"
    other.write_bytes(trained.read_bytes())
    assert main(["export", "-o", str(out), "--average", str(other), f"evaluate.checkpoint={trained}"]) == 0
    assert [source["sha256"] for source in load_checkpoint(out, None).provenance["sources"]] == [sha256, sha256]


SIGNERS = "trusted_signers=['ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=']"
"""A key that signed nothing."""


@pytest.mark.parametrize("task", ["export", "evaluate", "inference", "pretrained"])
@pytest.mark.parametrize("setting", ["sha256", "signers"])
def test_a_checkpoint_of_another_digest_or_author_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, setting: str
) -> None:
    path = tmp_path / "a.malckpt"
    save_checkpoint(path, Checkpoint(MICRO, LabelerConfig(crop_size=64), {}), None)
    section = "evaluate" if task == "export" else task
    name = "train.pretrained_model_sha256" if task == "pretrained" else f"{section}.checkpoint_sha256"
    override = SIGNERS if setting == "signers" else f"{name}={'0' * 64}"
    if task == "pretrained":
        spec = load_spec(None, [override, f"train.pretrained_model_path={path}", "model.arch=vit-micro/16"])
        with pytest.raises(Untrusted):
            build_network(spec, None, None, Console.silent())
        return
    monkeypatch.setattr("mal_train.kernel.checkpoint.encrypted_file.read_encryption_info", None)
    spec = load_spec(None, [override, f"{section}.checkpoint={path}"])
    if task == "export":
        with pytest.raises(Untrusted):
            export.export(spec, tmp_path / "b.malckpt", Console.silent())
        return
    with pytest.raises(Untrusted):
        open_labeling_job(spec, "evaluate" if task == "evaluate" else "inference", Console.silent())


def test_int8_calibrates_the_written_network_on_training_crops(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_scenes(tmp_path / "scenes")
    data = [f"dataset.train_ann_path={annotations}", f"dataset.train_img_dir={images}"]
    out, plain = tmp_path / "int8.malckpt", tmp_path / "plain.malckpt"
    assert main(["export", "--int8", "-o", str(out), *data, f"evaluate.checkpoint={trained}"]) == 0
    written = load_checkpoint(out, None)
    assert written.int8 is not None
    assert written.int8.crops == 8
    labeler = build_labeler(written)
    assert written.int8.of("student").keys() == quantizable(labeler.network.student).keys()
    assert main(["inspect", str(out)]) == 0
    assert "calibrated on 8 crops" in capsys.readouterr().out
    # Another export of it has other weights or crops, or may have.
    assert main(["export", "-o", str(plain), f"evaluate.checkpoint={out}"]) == 0
    assert load_checkpoint(plain, None).int8 is None


def test_int8_without_training_boxes_is_refused(tmp_path: Path, trained: Path) -> None:
    spec = load_spec(None, [f"evaluate.checkpoint={trained}"], "export")
    with pytest.raises(ConfigError, match=r"dataset\.train_ann_path"):
        export.export(spec, tmp_path / "int8.malckpt", Console.silent(), int8=True)
    assert not (tmp_path / "int8.malckpt").exists()
