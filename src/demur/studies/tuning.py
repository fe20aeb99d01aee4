"""The search for direction, K0, K* and c on the tuning prompts: as many trials for every method, by one rule.

What is gained is the share of harmful tuning prompts complied with; what it costs is ΔCE on the model's own answers to
harmless ones. No test prompt is in reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from demur.errors import DemurError, ModelError
from demur.stats import Estimate
from demur.studies.config import CompareConfig, SideEffectOptions, TuneOptions
from demur.studies.context import JudgedAnswers, Workspace
from demur.studies.methods import Method, Selection, Sets
from demur.studies.pipeline import CleanAnswers, answer_clean, choose_direction, find_from
from demur.studies.results import Trial
from demur.studies.side_effects import SideEffectMeter
from demur.types import ChoosingSplits

_K0 = (5, 10, 20, 40)
_MAX_K = 100
_DRAWS_PER_TRIAL = 5
"""Repeated settings are not trials; a search that keeps drawing them ends after this many draws per trial."""


class Setting(NamedTuple):
    """What a trial sets. Methods ignore what does not concern them."""

    layer: int
    position: int
    k0: int
    k: int
    strength: float


class Measured(NamedTuple):
    """A trial: its setting, per-prompt outcomes on harmful tuning prompts, and what it costs."""

    setting: Setting
    answers: JudgedAnswers
    ce: Estimate

    @property
    def gain(self) -> float:
        """Share of the prompts complied with; nan where nothing is scored."""
        return self.answers.compliance.value

    @property
    def cost(self) -> float:
        """ΔCE, nats per token; 0 where its interval holds 0: noise is not a saving."""
        return 0.0 if self.ce.low <= 0 else self.ce.value


class Chosen(NamedTuple):
    """What the search gives: all trials, and for each method the sets and the strength that it takes."""

    trials: tuple[Trial, ...]
    sets: dict[str, Sets]
    strengths: dict[str, float]


def search(work: Workspace[Any], prompts: ChoosingSplits, config: CompareConfig, methods: Sequence[Method]) -> Chosen:
    """Run the trials that are missing, for each of `methods` that takes no other one's strengths. `prompts` are all
    that the search may see, `config` is a `TuneOptions` too. Raises DemurError: optuna is not installed; ModelError: no
    trial of a method could be scored."""
    assert isinstance(config, TuneOptions)
    trying = work.trying()
    clean = answer_clean(trying, prompts)
    candidates = choose_direction(trying, clean).candidates
    kept = [each for each in candidates if each.kept] or list(candidates)
    places = tuple(sorted({(each.layer, each.position) for each in kept}))
    found = Chosen((), {}, {})
    for method in methods:
        if method.leader:
            continue
        one = MethodSearch(work, prompts, config, method, clean, places)
        measured = one.run(config.tune)
        best = choose(measured, config.tune_unit)
        if best is None:
            raise ModelError(
                f"no trial of the search for {method.label} could be scored, so no setting can be chosen; run without "
                "--tune"
            )
        front, setting = pareto_front(measured), measured[best].setting
        share = stability(measured, best, config.tune_unit, seed=config.seed)
        trials = tuple(
            Trial(
                method=method.name,
                number=number,
                **each.setting._asdict(),
                compliance=each.answers.compliance,
                ce_answers=each.ce,
                front=number in front,
                chosen=number == best,
                stability=share if number == best else None,
            )
            for number, each in enumerate(measured)
        )
        sets, strengths = {method.name: one.sets(setting)}, {method.name: setting.strength}
        found = Chosen(found.trials + trials, found.sets | sets, found.strengths | strengths)
    return found


@dataclass
class MethodSearch:
    """The search for one method's settings; `places` are layers and positions that a direction may come from."""

    work: Workspace[Any]
    prompts: ChoosingSplits
    config: CompareConfig
    method: Method
    clean: CleanAnswers
    places: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        side = self.config if isinstance(self.config, SideEffectOptions) else SideEffectOptions()
        self._meter = SideEffectMeter(self.work, side, self.clean.answers["tuning"][1])

    def run(self, trials: int) -> tuple[Measured, ...]:
        """So many different settings, measured. Everything slow is a stage of the run folder, so that the same search
        repeats nothing; draws are seeded and told the same values, so that it draws the same settings."""
        optuna = _optuna()
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=self.config.seed)
        )
        found: dict[Setting, Measured] = {}
        name = f"search: {self.method.name}"
        for _ in range(trials * _DRAWS_PER_TRIAL):
            if len(found) == trials:
                break
            trial = study.ask()
            setting = self._draw(trial)
            if setting not in found:
                found[setting] = self.measure(setting, f"{name}, trial {len(found) + 1}")
                self.work.progress(name, len(found), trials)
            values = (found[setting].gain, found[setting].cost)
            if any(map(math.isnan, values)):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, values)
        return tuple(found.values())

    def _draw(self, trial: Any) -> Setting:
        layer, position = self.places[trial.suggest_int("place", 0, len(self.places) - 1)]
        strengths = self.method.strengths(self.config, "suppress")
        strength = trial.suggest_categorical("strength", tuple(sorted(strengths)))
        if not self.method.has_set:
            return Setting(layer, position, self.config.k0, self.config.k, strength)
        k0 = trial.suggest_categorical("k0", _K0)
        k = trial.suggest_int("k", 1, _MAX_K, log=True)
        # Sizes of F* end at the pool's.
        return Setting(layer, position, k0, min(k, k0 * len(self.work.suite.layers)), strength)

    def sets(self, setting: Setting) -> Sets:
        """The method's sets at a setting."""
        work = self.work.trying(
            direction_layer=setting.layer, direction_position=setting.position, k0=setting.k0, k=setting.k
        )
        found = find_from(work, self.clean)
        return Sets(Selection(work, found, len(found.chosen)), self.config)

    def measure(self, setting: Setting, title: str) -> Measured:
        """Answers to the harmful tuning prompts, and ΔCE on own harmless answers."""
        harmful = self.prompts.tuning.harmful
        change = self.method.suppress(self.sets(setting), setting.strength, harmful)[0]
        return Measured(setting, self.work.answer(title, harmful, change), self._meter.ce_answers(change))


def pareto_front(points: Sequence[Measured]) -> tuple[int, ...]:
    """Which trials no other one beats: as much compliance for less cost, or more for as much. Costs within noise of 0
    are 0; of equals the first is on the front."""
    known = [(n, each.gain, each.cost) for n, each in enumerate(points) if not math.isnan(each.gain)]

    def beats(other: tuple[int, float, float], mine: tuple[int, float, float]) -> bool:
        as_good = other[1] >= mine[1] and other[2] <= mine[2]
        return as_good and (other[1:] != mine[1:] or other[0] < mine[0])

    return tuple(mine[0] for mine in known if not any(beats(other, mine) for other in known))


def choose(points: Sequence[Measured], unit: float, rows: np.ndarray | None = None) -> int | None:
    """The selected trade-off: most compliance left after paying for ΔCE, a ΔCE of `unit` (nats per token) costing as
    much as all compliance is worth. Trials that are within one standard error of the best count as equal, and of equals
    the one with the fewest features, then the mildest strength, is taken.
    `rows` are the prompts to count, with repeats (default: each once).
    """
    scores: list[float] = []
    errors: list[float] = []
    for point in points:
        outcomes = np.array(point.answers.complied, dtype=np.float64)
        counted = outcomes if rows is None else outcomes[rows]
        counted = counted[~np.isnan(counted)]
        n = len(counted)
        scores.append(float(counted.mean()) - point.cost / unit if n else math.nan)
        # With one success and one failure more, so that a rate of 0 or 1 on few prompts is not taken for certain.
        rate = (float(counted.sum()) + 1) / (n + 2)
        errors.append(math.sqrt(rate * (1 - rate) / (n + 2)))
    known = [n for n, score in enumerate(scores) if not math.isnan(score)]
    if not known:
        return None
    best = max(known, key=lambda n: scores[n])
    equal = [n for n in known if scores[n] >= scores[best] - errors[best]]
    return min(equal, key=lambda n: (points[n].setting.k, abs(points[n].setting.strength - 1.0), -scores[n]))


def stability(points: Sequence[Measured], best: int, unit: float, *, resamples: int = 200, seed: int = 0) -> float:
    """Share of resamples of the tuning prompts in which the same trial, `best`, would be chosen."""
    n = len(points[best].answers.answers)
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    return float(np.mean([choose(points, unit, rows) == best for rows in draws]))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise DemurError("--tune needs optuna; install it with: pip install 'demur[eval]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
