"""Writes the page of a study, report.html, and the spec with the best values, best.yaml."""

import json
import math
import shlex
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from mal_train.config.spec import Spec
from mal_train.config.tune import TuneConfig
from mal_train.core.atomic_io import write_text
from mal_train.core.report.charts import ParallelAxis, history_chart, parallel_coordinates
from mal_train.core.report.page import (
    Html,
    build_report,
    folded,
    format_metric,
    fraction_bars,
    preformatted,
    section,
    side_by_side,
    table,
)
from mal_train.core.yaml_config import dump
from mal_train.tuning.objective import PROXY, TRUE, Objective, RankAgreement, rank_agreement
from mal_train.tuning.space import decoded, shown_value, shown_values, with_values
from mal_train.tuning.study import ATTEMPT, ENDED, METRICS, REASON, SECONDS, SharedStudy

MIN_FOR_IMPORTANCE = 10
"""Complete trials below which no importances are computed; a few trials say nothing of a field."""
MAX_TICKS = 12
_METRICS = (TRUE, "AP@score", PROXY, "tightness", "stability")


def write_report(
    folder: Path, spec: Spec, study: SharedStudy, objective: Objective, space: Mapping[str, BaseDistribution]
) -> None:
    """Writes <folder>/report.html, and with a complete trial <folder>/best.yaml.

    Args:
        folder: output folder of the study.
        spec: the spec of the study.
        study: the study.
        objective: its objective.
        space: distribution of each field.

    Raises:
        OutputError: a file cannot be written.
    """
    trials, best = study.trials(), study.best()
    sections = [_overview(spec, study, objective, trials, best)]
    if best is not None:
        text = best_spec(spec, best, objective)
        write_text(folder / "best.yaml", text)
        sections.append(_best(folder, best, text))
    sections += [
        _charts(trials, best, objective, space),
        _importances(study),
        _agreement(trials),
        _table(trials, objective),
    ]
    write_text(folder / "report.html", build_report(f"Search: {spec.tune.study}", sections, str(folder)))


def best_spec(spec: Spec, best: FrozenTrial, objective: Objective) -> str:
    """Returns the spec with the values of the best trial, without section `tune` and without secrets."""
    chosen = with_values(spec, best.params).model_copy(update={"tune": TuneConfig()}).without_secrets()
    values = "\n".join(f"#   {name}: {shown_value(value)}" for name, value in best.params.items())
    return (
        f"# Trial {best.number} of the study {spec.tune.study}: {objective.metric} {format_metric(best.value)}. "
        f"Searched fields:\n{values}\n{dump(chosen)}"
    )


def _best(folder: Path, best: FrozenTrial, text: str) -> Html:
    """Returns the best values as overrides to copy, and the complete spec."""
    overrides = " \\\n    ".join(shlex.quote(f"{name}={_as_yaml(value)}") for name, value in best.params.items())
    body = preformatted(f"mal-train train -e spec.yaml \\\n    {overrides}") + folded("best.yaml: all fields", text)
    return section("Best spec", body, f"Trial {best.number}. {folder / 'best.yaml'} is the complete spec.")


def agreement_of(trials: Sequence[FrozenTrial]) -> RankAgreement:
    """Compares proxy and mIoU over the complete trials; pruned ones ended after different epochs."""
    return rank_agreement(_metrics(trial) for trial in trials if trial.state is TrialState.COMPLETE)


def _overview(
    spec: Spec, study: SharedStudy, objective: Objective, trials: Sequence[FrozenTrial], best: FrozenTrial | None
) -> Html:
    states = Counter(_state(trial) for trial in trials)
    rows = [
        ("objective", f"{objective.metric}{', chosen by auto' if objective.chosen else ''}"),
        ("best", "-" if best is None else f"{format_metric(best.value)}, trial {best.number}"),
        ("trials", f"{len(study.done())} of {spec.tune.trials}: " + ", ".join(f"{n} {s}" for s, n in states.items())),
        ("sampler, pruner, seed", f"{spec.tune.sampler}, {spec.tune.pruner}, {spec.tune.seed}"),
    ]
    return section("The study", table(["property", "value"], rows))


def _charts(
    trials: Sequence[FrozenTrial],
    best: FrozenTrial | None,
    objective: Objective,
    space: Mapping[str, BaseDistribution],
) -> Html:
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE and trial.value is not None]
    history = history_chart([(trial.number, trial.value or 0.0) for trial in complete], "trial", objective.metric)
    values = [trial.value or 0.0 for trial in complete]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)

    def strength(trial: FrozenTrial) -> float:
        if best is not None and trial.number == best.number:
            return 1.0
        return 0.9 * _place(trial.value or 0.0, low, high)

    axes = [ParallelAxis(name, _ticks(distribution)) for name, distribution in space.items()]
    axes.append(ParallelAxis(objective.metric, [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]))
    lines = [
        (
            [*(_position(trial.params[name], space[name]) for name in space), _place(trial.value or 0.0, low, high)],
            strength(trial),
        )
        for trial in complete
        if trial.params.keys() == space.keys()
    ]
    note = "A line is a complete trial; the better it is, the stronger its line; the best one has a color of its own."
    return section("Trials", parallel_coordinates(axes, lines), note) + section("History", side_by_side(history))


def _importances(study: SharedStudy) -> Html:
    complete = [trial for trial in study.trials() if trial.state is TrialState.COMPLETE]
    note = "PED-ANOVA: how much a field decides whether a trial is among the best tenth. The sum is 1."
    if len(complete) < MIN_FOR_IMPORTANCE:
        note = f"Needs {MIN_FOR_IMPORTANCE} complete trials; there are {len(complete)}."
        return section("Importance of the fields", "", note)
    with warnings.catch_warnings():
        # Of equal values, which then have equal importances.
        warnings.simplefilter("ignore", UserWarning)
        values = get_param_importances(study.optuna, evaluator=PedAnovaImportanceEvaluator())
    return section("Importance of the fields", fraction_bars(values), note)


def _agreement(trials: Sequence[FrozenTrial]) -> Html:
    found = agreement_of(trials)
    note = (
        f"Rank correlation (Spearman) of {PROXY} with {TRUE} over {found.count} complete trials: "
        f"{format_metric(found.spearman)}. 1: the proxy without masks orders the trials as {TRUE} does."
    )
    if not found.count:
        note = f"The validation set has no masks, so {PROXY} could not be compared with {TRUE}."
    return section("Proxy and true masks", "", note)


def _table(trials: Sequence[FrozenTrial], objective: Objective) -> Html:
    names = [name for name in _METRICS if any(_metrics(trial).get(name) is not None for trial in trials)]
    header = ["trial", "state", objective.metric, *(name for name in names if name != objective.metric)]
    rows = [
        [
            trial.number,
            _state(trial),
            _value(trial, objective),
            *(_metrics(trial).get(name) for name in names if name != objective.metric),
            max(trial.intermediate_values, default=0),
            _seconds(trial),
            shown_values(trial.params),
            str(trial.user_attrs.get(REASON, "")),
        ]
        for trial in sorted(trials, key=lambda trial: (-(_value(trial, objective) or -math.inf), trial.number))
    ]
    note = "Best first. A trial that was interrupted is repeated by a later one in the same folder."
    return section("All trials", table([*header, "epochs", "s", "values", "reason"], rows), note)


def _value(trial: FrozenTrial, objective: Objective) -> float | None:
    return trial.value if trial.state is TrialState.COMPLETE else objective.value(_metrics(trial))


def _seconds(trial: FrozenTrial) -> int | None:
    seconds = trial.user_attrs.get(SECONDS)
    return None if seconds is None else round(seconds)


def _metrics(trial: FrozenTrial) -> Mapping[str, float | None]:
    return trial.user_attrs.get(METRICS) or {}


def _state(trial: FrozenTrial) -> str:
    """Returns the state of a trial in words."""
    if trial.state is TrialState.FAIL:
        return str(trial.user_attrs.get(ENDED, "failed"))
    attempt = f", attempt {trial.user_attrs[ATTEMPT]}" if ATTEMPT in trial.user_attrs else ""
    return f"{trial.state.name.lower()}{attempt}"


def _as_yaml(value: Any) -> str:
    """Returns the value of a parameter as YAML, with all digits."""
    value = decoded(value)
    return json.dumps(value) if isinstance(value, (list, bool)) or value is None else str(value)


def _place(value: float, low: float, high: float) -> float:
    """Returns the position in [0, 1] of a value between two others; 0.5 if they are equal."""
    return (value - low) / (high - low) if high > low else 0.5


def _position(value: Any, distribution: BaseDistribution) -> float:
    """Returns the position in [0, 1] of a value on the axis of its field."""
    if isinstance(distribution, CategoricalDistribution):
        return _place(distribution.choices.index(value), 0, len(distribution.choices) - 1)
    low, high, is_log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
    if is_log:
        return _place(math.log(value), math.log(low), math.log(high))
    return _place(value, low, high)


def _ticks(distribution: BaseDistribution) -> list[tuple[float, str]]:
    if isinstance(distribution, CategoricalDistribution):
        values: Sequence[Any] = distribution.choices[:MAX_TICKS]
    else:
        values = (distribution.low, distribution.high)  # type: ignore[attr-defined]
    return [(_position(value, distribution), shown_value(value)) for value in values]
