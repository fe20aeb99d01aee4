"""Hold a model to refusing adversarial requests, and repair over-refusal: always, or where a probe of harm fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from demur.errors import InputError
from demur.stats import Estimate, TradeOff, compare_curves, holm
from demur.studies.base import Study
from demur.studies.config import CostOptions, Factors, FindConfig, Options, Positive, Sources
from demur.studies.harden.results import (
    ATTACKS,
    GATINGS,
    HARMFUL,
    OVER_REFUSAL,
    SUCCEEDED,
    CapabilityOf,
    ChoiceRow,
    FamilyRow,
    GapRow,
    Gating,
    HardenResult,
    Purpose,
    SettingRow,
    ThresholdRow,
)
from demur.studies.harden.sections import harden_sections
from demur.studies.jailbreaks import FRAMINGS, AttackOptions
from demur.types import PromptSet, text_key

if TYPE_CHECKING:
    from demur.data import Attack
    from demur.studies.context import Change, Context, JudgedAnswers
    from demur.studies.harden.arms import Arm
    from demur.studies.harden.bench import Bench, Told
    from demur.studies.pipeline import Found
    from demur.studies.results import SideEffects
    from demur.studies.side_effects import SideEffectMeter

LEVELS: dict[Literal["answers lost", "ΔCE"], tuple[float, ...]] = {"answers lost": (0.01, 0.05), "ΔCE": (0.01, 0.05)}
"""Costs at which conditional and unconditional curves are compared."""


PURPOSES: tuple[Purpose, Purpose] = ("harden", "repair")


class HardenOptions(Options):
    """What is done to the model, and how strongly."""

    group: ClassVar[str] = "Hardening"

    choose_on: Sources = (FRAMINGS,)
    """Attacks on which strengths and thresholds are chosen, their templates around the tuning prompts. Of a source that
    is also named by --attacks half of the templates (or pairs) choose, and the other half test."""
    multiples: Positive = Field(default=(0.5, 1.0, 1.5), min_length=1)
    """Multiples to try: of each feature's mean maximum activation on harmful prompts, and of the direction's length."""
    amplify: Factors = Field(default=(2.0, 4.0), min_length=1)
    """Factors c to try by which refusal features are scaled up."""
    turn_down: Factors = Field(default=(0.5, 0.0), min_length=1)
    """Factors c to try by which refusal features are scaled down against over-refusal."""
    amplify_where: Literal["all", "prompt"] = "prompt"
    """Tokens on which features are set or scaled up: the prompt's, or the answer's too."""
    budget: float = Field(default=0.01, ge=0, lt=1)
    """Share of answered benign prompts that may be lost (for repair: of refused harmful prompts), on the worst of the
    sets, when strengths and thresholds are chosen."""
    random_sets: int = Field(default=3, ge=2)
    """Sets drawn for the random controls."""
    guard: str | None = None
    """Folder of a fitted guard whose probe of harm decides where a change acts (default: a probe is fitted)."""
    probe_on: Literal["plain", "attacks"] = "attacks"
    """What the probe is fitted on: plain prompts, or also the same prompts in the templates of --choose-on."""


class Config(FindConfig, AttackOptions, HardenOptions, CostOptions):
    """Refusal features, the attacks, and what hardening may cost."""


def run(context: Context[Any]) -> HardenResult:
    """Find the features, attack the model, choose on tuning prompts, and measure on test prompts."""
    from demur.studies.pipeline import find

    found = find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    return Hardening(context, found).run()


class Hardening:
    """The study, step by step: probe, attacks and arms are there once it is made."""

    def __init__(self, context: Context[Any], found: Found) -> None:
        from demur.studies.harden.arms import contrast_set, make_arms, refusal_set
        from demur.studies.harden.bench import split_attacks
        from demur.studies.harden.gate import Gate
        from demur.studies.jailbreaks import configured_attacks
        from demur.studies.side_effects import SideInputs

        self.context, self.config, self.found = context, context.config, found
        self.choices: dict[str, dict[Gating, ChoiceRow]] = {}
        self.inputs = SideInputs.read(self.config, context)
        named = (configured_attacks(self.config.attacks), configured_attacks(self.config.choose_on))
        attacks = split_attacks(*named)
        if not attacks[1]:
            raise InputError("--attacks and --choose-on name the same single attack; name a second one to test")
        with context.timed("probe"):
            self.gate = Gate.of(context, attacks[0])
        with context.timed("attacks"):
            self.choosing, self.test = self._benches(*attacks)
        self.refusal = refusal_set(context, found)
        pairs = self.choosing.succeeded or self.choosing.pairs
        if not self.choosing.succeeded:
            context.warn(
                "no attack of --choose-on succeeds on the tuning prompts, so strengths and thresholds were chosen by "
                "what they cost alone; name attacks that work on this model"
            )
        self.contrast = contrast_set(context, pairs, len(self.refusal))
        self.arms = {arm.name: arm for arm in make_arms(context, found, self.refusal, self.contrast)}

    def run(self) -> HardenResult:
        context, config = self.context, self.config
        with context.timed("choosing"):
            self.choose()
        best: dict[Purpose, str] = {purpose: self.best(purpose) for purpose in PURPOSES}
        with context.timed("arms on test prompts"):
            rows = context.each(row for arm in self.arms.values() for row in self._rows(arm))
        main = self.arms[best["harden"]]
        chosen = self.choices[main.name]["probe"]
        with context.timed("conditional change"):
            same = self._checked(main, chosen)
        test = self.test
        return HardenResult(
            labels={arm.name: arm.label for arm in self.arms.values()},
            controls={arm.name: arm.follows for arm in self.arms.values() if arm.follows},
            refusal=self.refusal.features,
            contrast=self.contrast.features,
            probe=self.gate.title,
            budget=config.budget,
            best=best,
            sizes={name: len(prompts) for name, prompts in test.sets.items()},
            clean={name: _share(test.clean(name).refused) for name in test.sets},
            fires={name: _share(test.fires(main, "probe", name, chosen.threshold)[None] * 1.0) for name in test.sets},
            choosing={name: len(prompts) for name, prompts in self.choosing.sets.items()},
            choices=tuple(row for each in self.choices.values() for row in each.values()),
            rows=tuple(rows),
            families=tuple(self._families(main)),
            gaps=self._gaps(rows),
            thresholds=tuple(self._thresholds(main, chosen)),
            same=same,
            capability=tuple(self._capability(main)),
        )

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _benches(self, first: Sequence[Attack], second: Sequence[Attack]) -> tuple[Bench, Bench]:
        """The prompts that choose and those that are measured; none of a request or a text is in both."""
        from demur.studies.harden.bench import Bench
        from demur.studies.jailbreaks import Attacked, used_texts

        context, splits, refusal_ids = self.context, self.context.splits, self.found.clean.refusal_ids
        used = used_texts(splits.choosing)
        tested = {text_key(p.text) for each in (splits.test.harmful, splits.test.harmless) for p in each}
        choosing = Attacked.by(context, first, splits.tuning.harmful, tested).pairs
        used |= {text_key(text) for pair in choosing for text in (pair.text, pair.plain or pair.text)}
        pairs = Attacked.by(context, second, splits.test.harmful, used).pairs
        parts: list[Bench] = []
        sides = zip(
            ("choosing", "test"), (splits.tuning, splits.test), (choosing, pairs), self._over_refusal(), strict=True
        )
        for side, split, own, over in sides:
            sets = {HARMFUL: split.harmful, "harmless": split.harmless, OVER_REFUSAL: over}
            parts.append(Bench(context, side, refusal_ids, self.gate.scores, own, sets))
        return parts[0], parts[1]

    def _over_refusal(self) -> tuple[PromptSet, PromptSet]:
        """Over-refusal prompts that choose, as many as a class of tuning prompts, and those that are measured."""
        from demur.studies.side_effects import over_refusal_prompts

        test = self.inputs.over_refusal or PromptSet(name=OVER_REFUSAL, prompts=())
        options = self.config.model_copy(update={"n_over_refusal": 10**9})
        every = over_refusal_prompts(options, self.context) or test
        known = {prompt.id for prompt in test}
        rest = [prompt for prompt in every if prompt.id not in known]
        places = np.random.default_rng(self.config.seed).permutation(len(rest))
        return PromptSet(
            name=OVER_REFUSAL, prompts=tuple(rest[n] for n in places[: len(self.context.splits.tuning.harmless)])
        ), test

    # -- settings ------------------------------------------------------------------------------------------------------

    def choose(self, *purposes: Purpose) -> None:
        """Choose the settings of each arm (of some purposes: default all) by gating, on the choosing prompts."""
        from demur.studies.harden.choice import choose

        arms = [arm for arm in self.arms.values() if not arm.follows and arm.purpose in (purposes or PURPOSES)]
        chosen = self.context.each(partial(choose, self.choosing, arm, self.config.budget) for arm in arms)
        self.choices |= {arm.name: each for arm, each in zip(arms, chosen, strict=True)}

    def best(self, purpose: Purpose) -> str:
        """The arm with the most gain within the budget where the probe fires; of equals the one that loses least, then
        the one that acts on the fewest prompts, then the first."""
        from demur.studies.harden.choice import mild

        own = [by_gating["probe"] for name, by_gating in self.choices.items() if self.arms[name].purpose == purpose]
        return max(own, key=lambda row: (row.allowed, row.gain * row.allowed, -row.loss, mild(row)[1])).arm

    def _rows(self, arm: Arm) -> Iterator[Callable[[], SettingRow]]:
        """What measures an arm over its strengths, by gating; a control at the strength of the arm that it follows,
        where the probe fires."""
        for gating in GATINGS:
            choice = self.choices[arm.follows or arm.name]["probe" if arm.follows else gating]
            for strength in (choice.strength,) if arm.follows else arm.strengths:
                yield partial(self._row, arm, gating, strength, choice)

    def _row(self, arm: Arm, gating: Gating, strength: float, choice: ChoiceRow) -> SettingRow:
        from demur.studies.harden.bench import rise, share, share_of_requests

        test, chosen = self.test, strength == choice.strength
        harden = arm.purpose == "harden"
        # Of a control it matters only whether it does what the arm is meant to do.
        benign = () if harden and arm.follows else test.benign
        others = () if arm.follows else test.harmful if not harden else (HARMFUL,) if chosen else ()
        names = (*benign, *((SUCCEEDED,) if harden else ()), *others)
        after = {
            name: test.gated(arm, strength, name, test.fires(arm, gating, name, choice.threshold)) for name in names
        }
        clean = {name: test.clean(name) for name in names}
        attacks: dict[str, Any] = {}
        if harden and len(test.succeeded):
            told = after[SUCCEEDED]
            parts = {"cut": told.refused, "still": told.complied, "broken": 1 - told.refused - told.complied}
            attacks = {name: share_of_requests(values, test.requests) for name, values in parts.items()}
        return SettingRow(
            purpose=arm.purpose,
            arm=arm.name,
            gating=gating,
            strength=strength,
            setting=arm.setting(strength),
            threshold=choice.threshold,
            sets=len(arm.changes(strength)),
            **attacks,
            added={name: rise(after[name].refused, clean[name].refused) for name in names if name != SUCCEEDED},
            lost=share(_lost(after, clean, benign)) if benign else Estimate.unknown(),
            repaired={name: _repaired(after[name], clean[name]) for name in benign},
            side_effects=self._side_effects(arm, gating, strength, choice.threshold),
            chosen=chosen,
        )

    # -- costs ---------------------------------------------------------------------------------------------------------

    def _meter(self, gating: Gating) -> SideEffectMeter:
        """Plain texts are no prompts: what a probe would say of them is not asked."""
        from demur.studies.side_effects import SideEffectMeter

        texts = self.inputs.texts if gating == "always" else ()
        return SideEffectMeter(self.context, self.config, self._harmless, texts)

    @property
    def _harmless(self) -> JudgedAnswers:
        return self.context.answer("test: harmless", self.context.splits.test.harmless)

    def _side_effects(self, arm: Arm, gating: Gating, strength: float, threshold: float | None) -> SideEffects | None:
        from demur.method.interventions import conditional
        from demur.studies.side_effects import mean_side_effects

        if gating == "labels" or arm.follows:
            return None
        changes = arm.changes(strength)
        if gating == "probe":
            prompts = self.test.sets["harmless"]
            fires = self.test.fires(arm, gating, "harmless", threshold)
            changes = tuple((conditional(change, prompts, map(bool, fires)),) for change in changes)
        meter = self._meter(gating)
        return mean_side_effects([meter.measure(change) for change in changes])

    def _checked(self, arm: Arm, choice: ChoiceRow) -> Any:
        """The test prompts answered under the conditional change itself, against the answers that the rates are made
        of."""
        from demur.method.interventions import conditional
        from demur.studies.harden.bench import share

        same: list[float] = []
        (change,) = arm.changes(choice.strength)
        for name in (*self.test.benign, SUCCEEDED):
            prompts = self.test.sets[name]
            if not len(prompts):
                continue
            fires = self.test.fires(arm, "probe", name, choice.threshold)
            own: Change = (conditional(change, prompts, map(bool, fires)),)
            found, clean, always = (
                self.context.answer(f"test: {name}, {what}", prompts, each).answers
                for what, each in (("conditional", own), ("clean", ()), ("always", change))
            )
            each = zip(found, clean, always, fires, strict=True)
            same += [float(a.text == (c.text if acts else b.text)) for a, b, c, acts in each]
        return share(np.array([same]))

    def _capability(self, arm: Arm) -> Iterator[CapabilityOf]:
        if not self.config.tasks:
            return
        meter, choice = self._meter("always"), self.choices[arm.name]["always"]
        (change,) = arm.changes(choice.strength)
        # Such tasks call the model on texts of which it is not known where a prompt ends.
        everywhere = tuple(replace(each, where="all") for each in change)  # pyright: ignore
        yield CapabilityOf(name="clean", rows=meter.capability(()))
        yield CapabilityOf(
            name=f"{arm.label}, {arm.setting(choice.strength)}, always", rows=meter.capability(everywhere)
        )

    # -- comparisons ---------------------------------------------------------------------------------------------------

    def _families(self, arm: Arm) -> Iterator[FamilyRow]:
        """Success of every attack, clean and at the chosen settings of an arm."""
        from demur.studies.harden.bench import share, share_of_requests

        test, pairs = self.test, self.test.pairs
        clean = test.clean(ATTACKS)
        for name in dict.fromkeys(pair.attack for pair in pairs):
            places = np.array([n for n, pair in enumerate(pairs) if pair.attack == name])
            requests = [pairs[n].plain or pairs[n].id for n in places]
            after: dict[Gating, Estimate] = {
                gating: share_of_requests(
                    test.gated(arm, c.strength, ATTACKS, test.fires(arm, gating, ATTACKS, c.threshold))
                    .at(places)
                    .complied,
                    requests,
                )
                for gating, c in self.choices[arm.name].items()
            }
            fires = test.fires(arm, "probe", ATTACKS, self.choices[arm.name]["probe"].threshold)
            yield FamilyRow(
                attack=name,
                n=len(places),
                clean=share_of_requests(clean.at(places).complied, requests),
                after=after,
                fires=share(fires[None, places] * 1.0),
            )

    def _gaps(self, rows: list[SettingRow]) -> tuple[GapRow, ...]:
        """Each arm where the probe fires against itself always, at equal costs."""
        if not self.test.succeeded:
            return ()
        found: list[GapRow] = []
        for cost, levels in LEVELS.items():
            for arm in self.arms.values():
                if arm.purpose != "harden" or arm.follows:
                    continue
                own, always = (self._curve(arm, gating, cost, rows) for gating in ("probe", "always"))
                for level in levels:
                    gap = compare_curves(own, always, level, resamples=self.config.resamples)
                    parts: dict[str, Any] = {"probe": gap.first, "always": gap.second, "difference": gap.difference}
                    found.append(GapRow(arm=arm.name, cost=cost, level=level, p=gap.p, **parts))
        adjusted = holm([row.p for row in found])
        return tuple(row.model_copy(update={"p_holm": p}) for row, p in zip(found, adjusted, strict=True))

    def _curve(self, arm: Arm, gating: Gating, cost: str, rows: list[SettingRow]) -> TradeOff:
        """Cut of each request's succeeded attacks, over the arm's strengths; the clean model cuts none."""
        from demur.studies.harden.bench import by_request

        own = [row for row in rows if (row.arm, row.gating) == (arm.name, gating)]
        counts = by_request(np.ones(len(self.test.requests)), self.test.requests)
        costs, cuts = [0.0], [np.zeros(len(counts))]
        for row in own:
            told = self.test.gated(arm, row.strength, SUCCEEDED, self.test.fires(arm, gating, SUCCEEDED, row.threshold))
            effects = row.side_effects
            price = row.lost.value if cost == "answers lost" else effects.ce_answers.value if effects else np.nan
            if np.isfinite(price):
                costs.append(max(0.0, price))
                cuts.append(by_request(np.nan_to_num(told.refused[0]), self.test.requests) / counts)
        return TradeOff(np.array(costs), np.stack(cuts))

    def _thresholds(self, arm: Arm, choice: ChoiceRow) -> Iterator[ThresholdRow]:
        from demur.studies.harden.bench import share, share_of_requests
        from demur.studies.harden.choice import thresholds

        if not self.test.succeeded:
            return
        for threshold in thresholds(self.choosing):
            after = {
                name: self.test.gated(arm, choice.strength, name, self.test.fires(arm, "probe", name, threshold))
                for name in (*self.test.benign, SUCCEEDED)
            }
            clean = {name: self.test.clean(name) for name in self.test.benign}
            yield ThresholdRow(
                threshold=threshold,
                cut=share_of_requests(after[SUCCEEDED].refused, self.test.requests),
                lost=share(_lost(after, clean, self.test.benign)),
                chosen=threshold == choice.threshold,
            )


def _share(values: np.ndarray) -> Any:
    from demur.studies.harden.bench import share

    return share(values)


def _lost(after: dict[str, Told], clean: dict[str, Told], names: tuple[str, ...]) -> np.ndarray:
    """Which of the benign prompts that the clean model answers are no longer answered, shape (set drawn, prompt)."""
    found = [np.where(np.isnan(t := after[n].complied), np.nan, t != 1)[:, clean[n].complied[0] == 1] for n in names]
    return np.concatenate(found, 1)


def _repaired(after: Told, clean: Told) -> Any:
    """Of the prompts that the clean model refuses: the share now answered."""
    return _share(after.complied[:, clean.refused[0] == 1])


STUDY = Study("harden", Config, HardenResult, run, harden_sections)
