from pathlib import Path

import pytest
import yaml

from mal_train.config.spec import REDACTED, RETIRED, Spec, load_spec
from mal_train.core.errors import ConfigError
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.core.yaml_config import apply_overrides, dump, field_paths, load_yaml, validate
from mal_train.core.yaml_text import parse_yaml
from tests.paths import ROOT

TAO_SPEC = """
strategy: ddp
results_dir: /results
encryption_key: ''
dataset:
  train_ann_path: /datasets/coco/annotations/instances_train2017.json
  train_img_dir: /datasets/coco/raw-data/train2017
  val_ann_path: /datasets/coco/annotations/instances_val2017.json
  val_img_dir: /datasets/coco/raw-data/val2017
  load_mask: True
  crop_size: 512
  min_obj_size: 2048
  max_obj_size: 1e10
  num_workers_per_gpu: 2
model:
  arch: 'vit-mae-base/16'
  frozen_stages: [-1]
  mask_head_num_convs: 4
  mask_head_hidden_channel: 256
  mask_head_out_channel: 256
  teacher_momentum: 0.996
train:
  num_gpus: 1
  gpu_ids: [0]
  seed: 1234
  num_epochs: 10
  checkpoint_interval: 5
  validation_interval: 5
  resume_training_checkpoint_path: null
  results_dir: ''
  batch_size: 4
  use_amp: True
  optim_momentum: 0.9
  lr: 1e-6
  min_lr_rate: 0.2
  wd: 0.0005
  warmup_epochs: 1
  crf_kernel_size: 3
  crf_num_iter: 100
  loss_mil_weight: 4
  loss_crf_weight: 0.5
evaluate:
  num_gpus: 1
  gpu_ids: [0]
  checkpoint: /results/train/mal_model_latest.pth
  batch_size: 3
  use_mixed_model_test: False
  use_teacher_test: False
inference:
  num_gpus: 1
  gpu_ids: [0]
  checkpoint: /results/train/mal_model_latest.pth
  ann_path: /datasets/coco/annotations/instances_val2017.json
  img_dir: /datasets/coco/raw-data/val2017
  label_dump_path: instances_val2017_mal.json
  batch_size: 3
  load_mask: False
"""


def spec_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    return path


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_spec(None, list(overrides))
    return str(caught.value)


def test_the_documented_spec_of_tao_is_accepted_unchanged(tmp_path: Path) -> None:
    spec = load_spec(spec_file(tmp_path, TAO_SPEC), [])
    assert spec.train.lr == 1e-6
    assert spec.train.batch_size == 4
    assert spec.task_dir("train") == Path("/results/train")
    assert spec.encryption_key is None


def test_without_a_file_all_fields_have_the_documented_defaults() -> None:
    spec = load_spec(None, [])
    assert (spec.train.lr, spec.train.batch_size, spec.dataset.crop_size) == (1.5e-6, 3, None)
    assert spec.labeler_config(512) == LabelerConfig(512, 0.6, (0.1, 0.1, 0.1), Compat.NONE)


def test_a_dumped_spec_reads_back_equal() -> None:
    spec = load_spec(None, ["train.lr=1e-7", "train.mask_thres=[0.2,0.3,0.4]", "results_dir='a: b'", "compat=tao"])
    assert validate(Spec, parse_yaml(dump(spec))) == spec


def test_every_field_is_described() -> None:
    text = dump(Spec())
    assert text.count("# ") >= len(list(field_paths(Spec)))


def test_a_rule_of_two_fields_names_the_file_and_the_field_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("train: {checkpoint_interval: 3}")
    with pytest.raises(ConfigError) as refused:
        load_spec(path, ["train.num_epochs=1", "train.lr=1e-4"])
    assert str(refused.value).startswith(f"{path}: train: checkpoint_interval 3")
    assert str(refused.value).endswith("(from the command line: train.num_epochs)")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.batchsize=3", ["train.batchsize", "train.batch_size"]),
        ("train.crop_size=256", ["train.crop_size", "dataset.crop_size"]),
        ("epochs=3", ["epochs", "train.num_epochs"]),
        ("train.num_epochs=0", ["train.num_epochs: 0", " 1"]),
        ("train.num_epochs='3'", ['train.num_epochs: "3"', "integer"]),
        ("train.lr=.nan", ["train.lr: NaN", "finite"]),
        ("train.use_amp=1", ["train.use_amp: 1", "boolean"]),
        ("train.gpu_ids=[0,1]", ["train: ", "num_gpus 1", "gpu_ids [0, 1]"]),
        ("inference.num_nodes=2", ["inference.num_nodes: 2", "mal-client label --server"]),
        ("evaluate.num_nodes=2", ["evaluate.num_nodes: 2", "mal-client label --server"]),
        ("train.margin_rate=[1.2,0]", ["train: ", "margin_rate [1.2, 0.0]"]),
        ("train.mask_thres=[0.1,0.2]", ["train.mask_thres: [0.1, 0.2]"]),
        ("train.crf_kernel_size=4", ["train.crf_kernel_size: 4", "odd"]),
        ("train.checkpoint_interval=11", ["train: ", "checkpoint_interval 11", "num_epochs 10"]),
        ("dataset=3", ["dataset: 3", "section"]),
        ("wandb.enable=true", ["wandb"]),
        ("evaluate.gpus=[0]", ["evaluate.gpus: ", "evaluate.gpu_ids"]),
        ("inference.gpus=[0]", ["inference.gpus: ", "inference.gpu_ids"]),
        ("strategy=dp", ["strategy", "'auto', 'ddp' or 'fsdp'"]),
        ("train.lr", ["'train.lr'", "section.field=value"]),
        ("results_dir.x.y=3", ["results_dir: ", "string"]),
    ],
)
def test_an_invalid_field_is_named_with_its_value_and_rule_or_nearest_name(override: str, named: list[str]) -> None:
    message = error_of(override)
    for part in named:
        assert part in message


def test_all_invalid_fields_are_named_at_once() -> None:
    message = error_of("train.lr=-1", "model.arch=3")
    assert "train.lr" in message
    assert "model.arch" in message


def test_a_secret_on_the_command_line_is_refused_and_not_shown() -> None:
    assert "hunter2" not in error_of("encryption_key=hunter2")
    assert load_spec(None, ["encryption_key=env:MAL_KEY"]).encryption_key == "env:MAL_KEY"


def test_a_key_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_spec(spec_file(tmp_path, "encryption_key: 123456789"), [])
    assert "123456789" not in str(caught.value)


def test_a_dumped_spec_has_no_passphrase(tmp_path: Path) -> None:
    spec = load_spec(spec_file(tmp_path, "encryption_key: hunter2\ndecryption_key: file:/k"), [])
    assert "hunter2" not in dump(spec.without_secrets()) + repr(spec)
    assert spec.without_secrets().encryption_key == REDACTED
    assert spec.without_secrets().decryption_key == "file:/k"


@pytest.mark.parametrize("address", ["s3://k:hunter2@b/a", "s3a://k:hun/ter2@b/a", "ftp://me:hunter2@h/a?sig=ter2"])
def test_a_dumped_spec_has_no_password_of_an_address(address: str) -> None:
    spec = load_spec(None, [f"inference.ann_path={address}", f"inference.img_dir={address}"])
    assert "ter2" not in dump(spec.without_secrets())


def test_optim_betas_take_precedence_over_optim_momentum() -> None:
    assert load_spec(None, ["train.optim_momentum=0.8"]).train.betas == (0.8, 0.9)
    assert load_spec(None, ["train.optim_momentum=0.8", "train.optim_betas=[0.7,0.99]"]).train.betas == (0.7, 0.99)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\na: 2", "'a'"),
        ("- 1", "list"),
        ("a: [", "YAML"),
        ("a: !!python/object/apply:os.system [true]", "python/object/apply:os.system"),
    ],
)
def test_a_file_that_is_not_a_settings_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=rf"spec\.yaml.*{named}"):
        load_yaml(spec_file(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_yaml(tmp_path / "nowhere.yaml")


def test_numbers_may_have_an_exponent_without_a_point() -> None:
    assert parse_yaml("[1e-4, 5E3, 1.5e-6, .5, 3, -2.]") == [1e-4, 5e3, 1.5e-6, 0.5, 3, -2.0]
    assert parse_yaml("2020-01-01") == "2020-01-01"
    assert yaml.safe_load(dump(Spec()))["train"]["lr"] == 1.5e-6


def test_an_override_does_not_change_its_argument() -> None:
    data = {"train": {"lr": 1.0}}
    assert apply_overrides(data, ["train.lr=2"]) == {"train": {"lr": 2}}
    assert data == {"train": {"lr": 1.0}}


def test_a_file_given_as_an_override_is_refused_with_the_option_to_use() -> None:
    with pytest.raises(ConfigError, match=r"'server\.yaml'.* -c \(mal-server\)"):
        apply_overrides({}, ["server.yaml"])


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], (0,)),
        (["train.gpu_ids=[]"], ()),
        (["train.num_gpus=3"], (0, 1, 2)),
        (["train.num_gpus=2", "train.gpu_ids=[]"], ()),
        (["train.num_gpus=2", "train.gpu_ids=[3,1]"], (3, 1)),
        (["train.gpu_ids=[2]"], (2,)),
    ],
)
def test_each_process_has_its_own_gpu(overrides: list[str], gpus: tuple[int, ...]) -> None:
    assert load_spec(None, overrides).train.gpus == gpus


def test_two_processes_cannot_share_a_gpu() -> None:
    message = error_of("train.num_gpus=2", "train.gpu_ids=[1,1]")
    assert "num_gpus 2" in message
    assert "gpu_ids [1, 1]" in message


def test_an_interval_in_steps_may_exceed_the_number_of_epochs() -> None:
    longer = ["train.checkpoint_interval=1000", "train.checkpoint_interval_unit=step"]
    assert load_spec(None, longer).train.checkpoint_interval == 1000


@pytest.mark.parametrize("field", sorted(RETIRED))
def test_a_retired_field_of_tao_is_refused_with_its_remedy(field: str) -> None:
    assert f"{field}: {RETIRED[field]}" in error_of(f"{field}=1")


def test_the_json_schema_accepts_the_shipped_specs_and_locates_wrong_fields() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(Spec.model_json_schema())
    for path in (ROOT / "mal_train" / "specs").glob("*.yaml"):
        assert list(validator.iter_errors(load_yaml(path))) == [], path.name
    errors = list(validator.iter_errors({"train": {"batchsize": 2, "num_epochs": 0}}))
    assert sorted(error.validator for error in errors) == ["additionalProperties", "minimum"]
