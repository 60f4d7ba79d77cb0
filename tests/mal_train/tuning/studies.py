"""Studies of tests: a spec with one searched field, and tuners whose trainings are stand-ins."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mal_train.config.spec import Spec, load_spec
from mal_train.core.console import Console
from mal_train.tuning.objective import Objective
from mal_train.tuning.space import distributions
from mal_train.tuning.storage import open_storage
from mal_train.tuning.study import SharedStudy
from mal_train.tuning.tuner import Tuner

TRAINER = Path(__file__).with_name("trainer.py")
SPACE = "tune.space={train.lr: {low: 0.1, high: 0.9}}"


def spec_with(*overrides: str) -> Spec:
    return load_spec(None, [SPACE, "train.num_epochs=4", "tune.trials=3", *overrides])


def study_of(
    spec: Spec, folder: Path, storage: str = "sqlite", *, setup: Mapping[str, Any] | None = None, **options: Any
) -> SharedStudy:
    url = f"{storage}:///{folder / 'study'}"
    common = {"objective": "miou"} if setup is None else setup
    return SharedStudy(open_storage(url), spec.tune, distributions(spec), common, **options)


def program(**behaviors: str) -> tuple[str, ...]:
    """Returns the command of the stand-in: `t0001="fail"` is for the training in folder 0001, `rest` for all others."""
    named = {"*" if name == "rest" else name.removeprefix("t"): value for name, value in behaviors.items()}
    return sys.executable, str(TRAINER), json.dumps(named)


def tuner_of(
    study: SharedStudy, spec: Spec, folder: Path, *, at_a_time: int = 1, console: Console | None = None, **options: Any
) -> Tuner:
    return Tuner(
        study,
        spec,
        Objective("miou"),
        [()] * at_a_time,
        folder=folder,
        console=console or Console.silent(),
        **options,
    )
