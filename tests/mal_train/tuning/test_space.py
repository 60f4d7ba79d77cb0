"""Searched fields: what the schema refuses, Optuna's distributions, and the specs of trials."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mal_train.config.spec import Spec, load_spec
from mal_train.core.errors import ConfigError
from mal_train.tuning.space import decoded, distributions, trial_spec, with_values


def spec_with(space: str, *overrides: str) -> Spec:
    return load_spec(None, [f"tune.space={{{space}}}", *overrides])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("train.lr: {low: 1e-6, high: 1e-3, log: true}", FloatDistribution(1e-6, 1e-3, log=True)),
        ("train.wd: {low: 0, high: 1}", FloatDistribution(0, 1)),
        ("train.loss_crf_weight: {low: 1, high: 4, step: 0.5}", FloatDistribution(1, 4, step=0.5)),
        ("train.batch_size: {low: 2, high: 16}", IntDistribution(2, 16)),
        ("train.crf_kernel_size: {low: 3, high: 7, step: 2}", IntDistribution(3, 7, step=2)),
        ("train.loss_logit_weight: {low: 0.0, high: 0.1}", FloatDistribution(0.0, 0.1)),
        ("dataset.crop_size: {choices: [160, 224]}", CategoricalDistribution([160, 224])),
        ("train.color_augmentation: {choices: [true, false]}", CategoricalDistribution([True, False])),
    ],
)
def test_a_field_has_the_distribution_of_its_type(space: str, expected: object) -> None:
    assert list(distributions(spec_with(space)).values()) == [expected]


def test_choices_may_be_lists() -> None:
    spec = spec_with("train.margin_rate: {choices: [[0, 1.2], [0, 0.5]]}, train.mask_thres: {choices: [[0.1], [0.5]]}")
    found = distributions(spec)
    for distribution in found.values():
        assert isinstance(distribution, CategoricalDistribution)
        assert all(isinstance(choice, str) for choice in distribution.choices)  # Optuna stores no lists
    (_, narrow), (_, high) = (d.choices for d in found.values() if isinstance(d, CategoricalDistribution))
    assert decoded(narrow) == [0, 0.5]
    changed = with_values(spec, {"train.margin_rate": narrow, "train.mask_thres": high})
    assert (changed.train.margin_rate, changed.train.mask_thres) == ((0, 0.5), (0.5,))


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ("", "tune.space"),
        ("train.lrr: {low: 1, high: 2}", "train.lr"),
        ("training.lr: {low: 1, high: 2}", "training"),
        ("train.save_every_k_epoch: {choices: [1]}", "train.checkpoint_interval"),
        ("train: {choices: [1]}", "train"),
        ("train.lr: {low: -1.0, high: 2}", "train.lr"),
        ("train.lr: {low: 1.0, high: 2e3}", "train.lr"),
        ("train.batch_size: {low: 0, high: 4}", "train.batch_size"),
        ("train.batch_size: {low: 1, high: 4.5}", "train.batch_size"),
        ("train.crf_kernel_size: {low: 3, high: 7}", "train.crf_kernel_size"),
        ("train.crf_kernel_size: {low: 3, high: 7, log: true}", "train.crf_kernel_size"),
        ("train.batch_size: {choices: [4, many]}", "train.batch_size"),
        ("train.margin_rate: {low: 0, high: 1}", "train.margin_rate"),
        ("train.use_amp: {low: 0, high: 1}", "train.use_amp"),
        ("train.num_epochs: {choices: [5], low: 1, high: 3}", "train.num_epochs"),
        ("train.lr: {low: 1}", "train.lr"),
        ("train.lr: {low: 2, high: 1}", "train.lr"),
        ("train.lr: {low: 0, high: 1, log: true}", "train.lr"),
        ("train.lr: {low: 0, high: 1, step: 0.3}", "train.lr"),
        ("train.lr: {high: 1, low: 0, steps: 3}", "train.lr.steps"),
        ("train.gpu_ids: {choices: [[0]]}", "train.gpu_ids"),
        ("train.results_dir: {choices: [a, b]}", "train.results_dir"),
        ("dataset.val_ann_path: {choices: [a, b]}", "dataset.val_ann_path"),
        ("evaluate.batch_size: {low: 1, high: 2}", "evaluate.batch_size"),
        ("tune.trials: {low: 1, high: 2}", "tune.trials"),
        ("encryption_key: {choices: [a]}", "encryption_key"),
    ],
)
def test_a_field_or_value_that_cannot_be_searched_is_refused_by_name(space: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        distributions(spec_with(space))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_spec_of_a_trial_has_its_values_its_folder_and_its_devices() -> None:
    spec = spec_with(
        "train.lr: {low: 0.1, high: 0.9}", "train.results_dir=elsewhere", "train.num_gpus=2", "publish_to=s3://a/b"
    )
    trial = trial_spec(spec, {"train.lr": 0.25}, "out/0003", (3,))
    assert (trial.train.lr, trial.results_dir, trial.train.results_dir) == (0.25, "out/0003", None)
    assert (trial.train.gpus, trial.train.num_gpus) == ((3,), 1)
    assert (trial.tune, trial.publish_to) == (Spec().tune, "")
    on_cpu = trial_spec(spec, {"train.lr": 0.25}, "out/0003", ())
    assert (on_cpu.train.gpus, on_cpu.train.num_gpus) == ((), 2)


def test_the_spec_of_a_trial_has_no_address_that_only_other_commands_read() -> None:
    signed = "https://host/a.json?sig=hunter2"
    spec = spec_with(
        "train.lr: {low: 0.1, high: 0.9}", f"inference.ann_path='{signed}'", f"evaluate.results_dir='{signed}'"
    )
    assert spec.inference.ann_path == signed
    trial = trial_spec(spec, {"train.lr": 0.25}, "out/0003", ())
    assert (trial.inference, trial.evaluate) == (Spec().inference, Spec().evaluate)


def test_values_that_contradict_the_spec_are_refused() -> None:
    spec = spec_with("train.num_epochs: {low: 2, high: 9}", "train.validation_interval=3")
    with pytest.raises(ConfigError, match="validation_interval 3"):
        distributions(spec)
