"""The ways to hold a model to refusal, or to repair over-refusal: what is changed, and at which strengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from demur.data import AttackPair, adversarial_prompts
from demur.studies.harden.results import Purpose
from demur.types import FeatureSet, Prompt, PromptSet

if TYPE_CHECKING:
    from demur.method.interventions import Intervention
    from demur.studies.context import Change
    from demur.studies.harden import Config
    from demur.studies.pipeline import Finding, Found

_Made = Callable[[float], "tuple[Change, ...]"]


@dataclass(frozen=True)
class Arm:
    """One way to change the model. `changes` gives what it does at a strength: one change, or one for each random set.
    A control takes the strengths that the arm `follows` was given."""

    purpose: Purpose
    name: str
    label: str
    unit: str
    """Of its strengths, with the hole `{}`."""
    strengths: tuple[float, ...]
    changes: _Made
    follows: str = ""

    def setting(self, strength: float) -> str:
        """A strength with its unit."""
        return self.unit.format(f"{strength:g}".replace("-", "−"))


def make_arms(work: Finding, found: Found, refusal: FeatureSet, contrast: FeatureSet) -> tuple[Arm, ...]:
    """Every arm, hardening first."""
    from demur.method import selection
    from demur.method.interventions import ScaleFeatures, SetFeatures
    from demur.studies.methods import RandomMatched, Selection

    config: Config = work.config  # pyright: ignore[reportAssignmentType]
    where, multiples = config.amplify_where, config.multiples
    given = Selection(work, found, len(refusal))

    def random() -> tuple[FeatureSet, ...]:
        known = {*found.pool.features, *refusal.features, *contrast.features}

        def compute() -> tuple[FeatureSet, ...]:
            matched = RandomMatched.measures(given, tuple(refusal.by_layer()))
            seeds = range(config.seed, config.seed + config.random_sets)
            return tuple(selection.random_set(refusal, matched, exclude=tuple(known), seed=seed) for seed in seeds)

        used = found.clean.used("selection")
        depends: dict[str, Any] = {"method": "harden", "features": refusal.features, "exclude": sorted(known)}
        depends |= {"prompts": [used.harmful.digest, used.harmless.digest]}
        depends |= {"seeds": [config.seed, config.random_sets]}
        return work.cached("feature_sets", depends, tuple[FeatureSet, ...], compute, "random features")

    drawn = random()

    def held(sets: Sequence[FeatureSet]) -> _Made:
        tops = [given.maxima(each) for each in sets]
        return lambda m: tuple(
            (SetFeatures(each.features, tuple(m * value for value in top), where),)
            for each, top in zip(sets, tops, strict=True)
        )

    def scaled(sets: Sequence[FeatureSet], place: Any) -> _Made:
        return lambda c: tuple((ScaleFeatures(each.features, c, place),) for each in sets)

    def alone(change: Callable[[float], Intervention]) -> _Made:
        return lambda strength: ((change(strength),),)

    by_max, by_factor = "{} × max", "c = {}"
    return (
        Arm("harden", "set", "refusal features set", by_max, multiples, held([refusal])),
        Arm("harden", "amplify", "refusal features scaled up", by_factor, config.amplify, scaled([refusal], where)),
        Arm("harden", "contrast", "features by contrast set", by_max, multiples, held([contrast])),
        Arm("harden", "direction", "direction added", "{} × length", multiples, alone(_added(found, where))),
        Arm("harden", "random-set", "random features set", by_max, (), held(drawn), "set"),
        Arm("harden", "random-up", "random features scaled up", by_factor, (), scaled(drawn, where), "amplify"),
        Arm(
            "repair", "turn-down", "refusal features scaled down", by_factor, config.turn_down, scaled([refusal], "all")
        ),
        Arm("repair", "ablate", "direction ablated", "", (1.0,), alone(lambda _: found.direction.ablate())),
        Arm("repair", "random-down", "random features scaled down", by_factor, (), scaled(drawn, "all"), "turn-down"),
    )


def _added(found: Found, where: Any) -> Callable[[float], Intervention]:
    return lambda multiple: found.direction.add(multiple, where)


def refusal_set(work: Finding, found: Found) -> FeatureSet:
    """The refusal features of F* (all of F* where no feature's role is clear), in its order."""
    from demur.studies.roles import find_roles

    roles = find_roles(work, found)
    features = roles.of("refusal") or roles.of("refusal", "mixed") or found.chosen.features
    if not roles.of("refusal"):
        work.warn("no feature of F* is clearly a refusal feature, so those that are no harm features stand for them")
    scores = tuple(score for f, score in zip(found.chosen.features, found.chosen.scores, strict=True) if f in features)
    return FeatureSet(features=features, scores=scores, scope="global", method="refusal features")


def contrast_set(work: Finding, pairs: Sequence[AttackPair], k: int) -> FeatureSet:
    """The `k` features that these attacks suppress most: mean activation on the plain prompts less that on the
    adversarial ones, on the template's tokens after the request, over whole dictionaries (CC-Delta, 2602.12418)."""
    from demur.method.attribution import ScoredTokens
    from demur.method.selection import actdiff_set
    from demur.model import Region

    plain = PromptSet(
        name="plain", prompts=tuple(Prompt(id=pair.id, text=pair.plain) for pair in pairs if pair.plain is not None)
    )
    attacked = adversarial_prompts([pair for pair in pairs if pair.plain is not None], "attacked")

    def compute() -> FeatureSet:
        items, others = work.model.tokenize(plain), work.model.tokenize(attacked)
        after = ScoredTokens(regions=(Region.POST_INSTRUCTION,))
        return actdiff_set(work.model, work.suite, items, others, k, reduce="mean", scoring=after)

    depends = {"contrast": [plain.digest, attacked.digest], "k": k}
    return work.cached("contrast", depends, FeatureSet, compute, "features by contrast")
