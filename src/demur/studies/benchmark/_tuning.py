"""The search for direction, K0, K* and c on the tuning prompts: a Pareto front of suppression against damage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from demur.errors import DemurError, ModelError
from demur.method.interventions import ScaleFeatures
from demur.method.selection import global_set
from demur.studies._answers import Answering
from demur.studies._context import Baseline, Study
from demur.studies._finding import attribute_pool, choose_direction, make_pool
from demur.studies.benchmark._measure import Measures
from demur.studies.benchmark.config import BenchmarkConfig
from demur.studies.benchmark.results import Trial, TuningResult

_K0 = (5, 10, 20, 40)
_MAX_K = 100
_UNIT = 0.2
"""Damage that outweighs all suppression where no budget says, nats per token."""
_Setting = tuple[int, int, int, int, float]
"""Layer and position of the direction, K0, K*, c."""


def pareto_front(points: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Which of the points (suppression, damage) no other one beats: as much of the first for less of the second, or
    more for as much. nan points are never on it; of equal points the first one is."""
    known = [n for n, point in enumerate(points) if not any(map(math.isnan, point))]

    def beaten(n: int) -> bool:
        gain, cost = points[n]
        return any(
            (points[m][0] >= gain and points[m][1] <= cost) and (points[m] != points[n] or m < n)
            for m in known
            if m != n
        )

    return tuple(n for n in known if not beaten(n))


def knee(points: Sequence[tuple[float, float]], unit: float) -> int:
    """The point of a front with the most suppression left after paying for the damage; the more of equals.

    A damage of `unit` (nats per token) costs as much as all of the suppression is worth; below zero it costs nothing.
    So the knee is where the front becomes flatter than `1 / unit`, whatever the range that the trials happen to cover.

    Raises:
        ValueError: there is no point.
    """
    return max(range(len(points)), key=lambda n: (points[n][0] - max(points[n][1], 0.0) / unit, points[n][0]))


def search(study: Study, config: BenchmarkConfig, answering: Answering) -> tuple[TuningResult, BenchmarkConfig]:
    """Run the trials that are still missing, and give the front and the configuration of its knee.

    Harmful tuning prompts complied with are what is gained, the rise of cross-entropy on the model's own answers to
    harmless tuning prompts is what it costs; no test prompt is looked at. The strength of induction is chosen on the
    tuning prompts afterwards, for every method alike.

    Raises:
        DemurError: optuna is not installed.
        ModelError: no trial could be scored.
    """
    optuna = _optuna()
    # Notes on directions that are only tried are nobody's warnings, and what the run itself warns of comes later.
    tried = replace(study, warnings=[])
    baseline = Baseline.measure(tried, answering)
    trials = _Trials(tried, config, answering, baseline, _places(tried, baseline))
    stage = study.run.stage("search", trials.depends)
    found = optuna.create_study(
        study_name="search",
        directions=["maximize", "minimize"],
        storage=_storage(optuna, str(stage.folder / "optuna.jsonl")),
        load_if_exists=True,
    )
    # A search that goes on must not draw the numbers of its beginning again.
    found.sampler = optuna.samplers.TPESampler(seed=config.seed + len(found.trials))
    found.optimize(trials.objective, n_trials=max(0, config.tune - len(_complete(found))))
    # Measured again, from what is in the run folder: a verdict that was missing may have come since.
    return _result(
        [(each.number, *trials.setting(each.params)) for each in _complete(found)][: config.tune], trials, config
    )


def _complete(found: Any) -> list[Any]:
    return [each for each in found.trials if each.state.is_finished() and each.values]


@dataclass
class _Trials:
    """Measures settings, each step a stage of the run folder."""

    study: Study
    config: BenchmarkConfig
    answering: Answering
    baseline: Baseline
    places: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        self._measures = Measures(self.study, self.config, self.baseline.answers["tuning"][1])

    @property
    def depends(self) -> dict[str, Any]:
        """What the search's results depend on."""
        study, config = self.study, self.config
        fields = {
            "layers",
            "estimator",
            "steps",
            "pool",
            "suppress",
            "direction_form",
            "kl_threshold",
            "max_new_tokens",
        }
        return study.depends | {
            "prompts": [
                getattr(getattr(study.inputs.splits, purpose), label).digest
                for purpose in ("direction", "selection", "tuning")
                for label in ("harmful", "harmless")
            ],
            "judge": dict(study.inputs.judge.identity),
            "settings": config.model_dump(include=fields),
            "places": self.places,
            "seed": config.seed,
        }

    def setting(self, params: Mapping[str, Any]) -> _Setting:
        """A trial's parameters as a setting; sizes of F* end at the pool's."""
        layer, position = self.places[params["place"]]
        largest = params["k0"] * len(self.study.inputs.suite.layers)
        return layer, position, params["k0"], min(params["k"], largest), params["factor"]

    def objective(self, trial: Any) -> tuple[float, float]:
        """Suppression and damage of the setting that the sampler draws."""
        trial.suggest_int("place", 0, len(self.places) - 1)
        trial.suggest_categorical("k0", _K0)
        trial.suggest_int("k", 1, _MAX_K, log=True)
        trial.suggest_categorical("factor", tuple(sorted(self.config.suppress)))
        values = self.measure(self.setting(trial.params), f"search: trial {trial.number}")
        self.study.progress("search", trial.number + 1, self.config.tune)
        return values

    def measure(self, setting: _Setting, title: str) -> tuple[float, float]:
        """Share of harmful tuning prompts complied with, and the rise of cross-entropy on own harmless answers."""
        layer, position, k0, k, factor = setting
        update = {"direction_layer": layer, "direction_position": position, "k0": k0, "k": k}
        part = replace(self.study, config=self.config.model_copy(update=update))
        direction = choose_direction(part, self.baseline)
        pool = make_pool(part, self.baseline, direction)
        scored = self.baseline.used("selection").harmful
        attribution = attribute_pool(part, self.baseline, direction, pool, self.config.estimator, scored)
        change = (ScaleFeatures(global_set(attribution, k).features, factor),)
        answers = self.answering.answer(title, self.study.inputs.splits.tuning.harmful, change)
        return answers.compliance.value, self._measures.answers_rise(change).value


def _result(
    rows: Sequence[tuple[int, int, int, int, int, float]], trials: _Trials, config: BenchmarkConfig
) -> tuple[TuningResult, BenchmarkConfig]:
    points = [
        trials.measure(setting, f"search: trial {number}") for number, setting in ((row[0], row[1:]) for row in rows)
    ]
    front = pareto_front(points)
    if not front:
        raise ModelError("no trial of the search could be scored, so no setting can be chosen; run without --tune")
    found = [
        Trial(
            number=number,
            layer=layer,
            position=position,
            k0=k0,
            k=k,
            factor=factor,
            suppression=points[n][0],
            damage=points[n][1],
            front=n in front,
        )
        for n, (number, layer, position, k0, k, factor) in enumerate(rows)
    ]
    best = found[front[knee([points[n] for n in front], max(config.damage_budgets, default=_UNIT))]]
    update = {"direction_layer": best.layer, "direction_position": best.position, "k0": best.k0, "k": best.k}
    return TuningResult(trials=tuple(found), knee=best.number), config.model_copy(update=update)


def _places(study: Study, baseline: Baseline) -> tuple[tuple[int, int], ...]:
    """Layers and positions whose direction meets the criteria (all candidates, where none does)."""
    candidates = choose_direction(study, baseline).candidates
    kept = [each for each in candidates if each.kept] or list(candidates)
    return tuple(sorted({(each.layer, each.position) for each in kept}))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise DemurError("--tune needs optuna; install it with: pip install 'demur[eval]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(optuna: Any, path: str) -> Any:
    """A journal in the run folder: appended to trial by trial, so that a kill loses the trial that ran."""
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(path))


__all__ = ["knee", "pareto_front", "search"]
