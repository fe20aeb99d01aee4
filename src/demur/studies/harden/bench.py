"""Prompts and what became of them: clean, under an arm at a strength, and under the arm where a gate fires.

Prompts do not act on each other, so an arm's answers to all prompts and the clean model's say what the same arm does
where it acts on some of them only: nothing is generated twice, whatever the gate and its threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.data import Attack, AttackPair, adversarial_prompts
from demur.stats import Estimate, bootstrap_of, clustered_rate, crossed_difference, wilson
from demur.studies.harden.results import ATTACKS, BENIGN, HARMFUL, SUCCEEDED, WRAPPED, Gating
from demur.types import Prompt, PromptSet

if TYPE_CHECKING:
    from demur.studies.context import Change, Context
    from demur.studies.harden.arms import Arm

Scores = Callable[[PromptSet], np.ndarray]
"""P(harmful) of each prompt."""


@dataclass(frozen=True)
class Told:
    """What became of prompts, shape (set drawn, prompt): 1, 0 or nan (unscored). Of an attack `complied` says that it
    succeeded (`jailbreaks.outcome_of`)."""

    refused: np.ndarray
    complied: np.ndarray

    def where(self, fires: np.ndarray, other: Told) -> Told:
        """This where a gate fires (shape (prompt,)), the other elsewhere."""
        pairs = ((self.refused, other.refused), (self.complied, other.complied))
        return Told(*(np.where(fires, mine, theirs) for mine, theirs in pairs))

    def at(self, places: np.ndarray) -> Told:
        """Some of the prompts."""
        return Told(self.refused[:, places], self.complied[:, places])

    @classmethod
    def joined(cls, parts: Iterable[Told]) -> Told:
        """Several sets of prompts as one."""
        refused, complied = zip(*((part.refused, part.complied) for part in parts), strict=True)
        return cls(np.concatenate(refused, 1), np.concatenate(complied, 1))


@dataclass
class Bench:
    """One side's prompts: those that choose, or those that are measured.

    `sets` are the prompts by name, the attacks that succeed on the clean model (`SUCCEEDED`) among them; `requests` is
    the plain request of each of these.
    """

    context: Context[Any]
    side: str
    refusal_ids: tuple[int, ...]
    scores: Scores
    pairs: tuple[AttackPair, ...]
    sets: dict[str, PromptSet]
    known: dict[tuple[str, str], Told] = field(default_factory=dict["tuple[str, str]", Told])
    """Set and id of the change → what became of it."""

    def __post_init__(self) -> None:
        from demur.studies.jailbreaks import fits

        pairs, harmless = self.pairs, self.sets["harmless"].prompts
        around = [pair for pair in pairs if pair.around is not None]
        # The same texts around as many harmless requests, spread over all attacks.
        chosen = [around[n * len(around) // len(harmless)] for n in range(len(harmless))] if around else []
        texts = [
            Prompt(id=f"{ask.id}@{pair.id}", text=pair.with_request(ask.text), label="harmless")
            for ask, pair in zip(harmless, chosen, strict=False)
        ]
        wrapped = tuple(prompt for prompt in texts if fits(self.context, prompt.text))
        self.sets |= {WRAPPED: PromptSet(name=WRAPPED, prompts=wrapped), ATTACKS: adversarial_prompts(pairs, ATTACKS)}
        self.sets = {name: prompts for name, prompts in self.sets.items() if len(prompts)}
        places = np.flatnonzero(self.clean(ATTACKS).complied[0] == 1)
        self.succeeded = tuple(pairs[n] for n in places)
        self.sets[SUCCEEDED] = adversarial_prompts(self.succeeded, SUCCEEDED)
        self.requests = tuple(pair.plain or pair.id for pair in self.succeeded)

    @property
    def benign(self) -> tuple[str, ...]:
        """The sets of benign prompts."""
        return tuple(name for name in BENIGN if name in self.sets)

    @property
    def harmful(self) -> tuple[str, ...]:
        """The sets of harmful prompts on which refusal is wanted."""
        return (HARMFUL, ATTACKS)

    def clean(self, name: str) -> Told:
        """What the clean model does with a set."""
        return self._told(f"{self.side}: {name}", name, ())

    def under(self, arm: Arm, strength: float, name: str) -> Told:
        """What becomes of a set under an arm, acting always."""
        label = f"{self.side}: {arm.label}, {arm.setting(strength)}, {name}".replace(", ,", ",")
        each = [self._told(label, name, change) for change in arm.changes(strength)]
        return Told(np.concatenate([t.refused for t in each]), np.concatenate([t.complied for t in each]))

    def gated(self, arm: Arm, strength: float, name: str, fires: np.ndarray) -> Told:
        """What becomes of a set under an arm that acts where a gate fires."""
        return self.under(arm, strength, name).where(fires, self.clean(name))

    def fires(self, arm: Arm, gating: Gating, name: str, threshold: float | None) -> np.ndarray:
        """On which prompts of a set an arm acts: hardening on what is judged harmful, repair on what is not."""
        if gating == "always":
            return np.full(len(self.sets[name]), True)
        if gating == "labels" or threshold is None:
            harmful = np.full(len(self.sets[name]), name not in BENIGN)
        else:
            harmful = self.scores(self.sets[name]) >= threshold
        return harmful if arm.purpose == "harden" else ~harmful

    def _told(self, label: str, name: str, change: Change) -> Told:
        from demur.method.interventions import intervention_id

        if (key := (name, intervention_id(change))) not in self.known:
            self.known[key] = self._answered(label, name, change)
        return self.known[key]

    def _answered(self, label: str, name: str, change: Change) -> Told:
        from demur.studies.jailbreaks import outcomes_of

        prompts = self.sets[name]
        if not len(prompts):
            return Told(np.zeros((1, 0)), np.zeros((1, 0)))
        answers = self.context.answer(label, prompts, change)
        refused, complied = (np.array([each], dtype=np.float64) for each in (answers.refused, answers.complied))
        if name in (ATTACKS, SUCCEEDED):
            told = outcomes_of(self.context, answers, prompts, self.refusal_ids, change)
            complied = np.where(np.isnan(complied), np.nan, np.array([[each == "succeeded" for each in told]]))
        return Told(refused, complied)


def split_attacks(attacks: Sequence[Attack], choosing: Sequence[Attack]) -> tuple[list[Attack], list[Attack]]:
    """Attacks that choose, and attacks that test. Of one that is named for both, every second template (or pair)
    chooses and the others test."""

    def half(attack: Attack, start: int) -> Attack:
        return Attack(attack.name, attack.templates[start::2], attack.pairs[start::2])

    both = {attack.name for attack in attacks} & {attack.name for attack in choosing}
    first = [half(attack, 0) if attack.name in both else attack for attack in choosing]
    second = [half(attack, 1) if attack.name in both else attack for attack in attacks]
    return first, [attack for attack in second if attack.templates or attack.pairs]


# -- estimates -----------------------------------------------------------------------------------------------------


def share(values: np.ndarray) -> Estimate:
    """A share of prompts, over all sets drawn, shape (set drawn, prompt)."""
    return clustered_rate(list(values)) if values.shape[1] else Estimate.unknown()


def share_of_requests(values: np.ndarray, requests: Sequence[str]) -> Estimate:
    """A share of attacks. Attacks on one request are alike: the interval is the wider, at each end, of Wilson's and
    that of resampling requests, which has no width where all agree."""
    found = share(values)
    if len(values) > 1 or not found.n:
        return found
    k, n = int(np.nansum(values)), found.n
    table = by_request(np.stack([np.nan_to_num(values[0]), ~np.isnan(values[0])], -1), requests)
    drawn = bootstrap_of(lambda means: means[:, 0] / np.maximum(means[:, 1], 1e-12), table)
    rate = wilson(k, n, found.unscored)
    return found.model_copy(update={"low": min(rate.low, drawn.low), "high": max(rate.high, drawn.high)})


def by_request(values: np.ndarray, requests: Sequence[str]) -> np.ndarray:
    """Sums over the attacks on each request, shape (request, ...)."""
    names = list(dict.fromkeys(requests))
    found = np.zeros((len(names), *values.shape[1:]))
    np.add.at(found, [names.index(each) for each in requests], values)
    return found


def rise(after: np.ndarray, before: np.ndarray) -> Estimate:
    """A share less that of the clean model on the same prompts, with Newcombe's paired interval."""
    if not before.shape[1]:
        return Estimate.unknown()
    found = crossed_difference(before[0], list(after))[0]
    return found.model_copy(update={"value": -found.value + 0.0, "low": -found.high + 0.0, "high": -found.low + 0.0})
