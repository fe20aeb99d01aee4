"""Ways to suppress and to induce refusal: sets of features however chosen, random controls, and the direction.

A new selection method is one class: derive from `FeatureMethod`, give it a name and a label, and write `select`. Add it
with `METHODS.register`, or from another package through the entry-point group `demur.methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from demur.method import activations, selection
from demur.method.direction import cluster_directions, residuals_at, singular_directions
from demur.method.interventions import PerPrompt, ScaleFeatures, SetFeatures
from demur.registry import Registry
from demur.studies.config import MAIN, CompareConfig
from demur.studies.context import Change
from demur.studies.pipeline import Attributor, Finding, Found
from demur.studies.results import Kind
from demur.types import FeatureSet, Form, PromptSet

if TYPE_CHECKING:
    from demur.model import Items


@dataclass(frozen=True)
class Selection:
    """What a selection method may look at. There is no test prompt in it."""

    work: Finding
    found: Found
    k: int
    """Features to choose: the size of F*."""

    @property
    def harmful(self) -> Items:
        """Harmful selection prompts that the clean model refuses."""
        return self.work.model.tokenize(self.found.clean.used("selection").harmful)

    @property
    def harmless(self) -> Items:
        """Harmless selection prompts that the clean model answers."""
        return self.work.model.tokenize(self.found.clean.used("selection").harmless)

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The refusal direction, unit norm."""
        return self.found.direction.vector

    @property
    def attributor(self) -> Attributor:
        return Attributor(self.work, self.found.clean, self.found.direction)

    def maxima(self, features: FeatureSet) -> tuple[float, ...]:
        """Mean maximum activation of each feature on harmful selection prompts, in the set's order."""
        work = self.work

        def compute() -> tuple[float, ...]:
            if not len(features):
                return ()
            found = activations.mean_max_activations(work.model, work.suite, self.harmful, features.features)
            return tuple(found.tolist())

        depends = {"prompts": self.found.clean.used("selection").harmful.digest, "features": features.features}
        return work.cached("maxima", depends, tuple[float, ...], compute)


class Method:
    """A way to suppress and to induce refusal.

    Attributes:
        name: in configurations and results.
        label: in tables and charts.
        control: drawn at random. A control takes F*'s strengths, and its rates are over several sets.
        follows: the method whose strengths this one takes (local sets take their global one's).
        has_set: features are chosen (or drawn) once for all prompts.
        local: a set of its own for each prompt; such methods cannot induce and have no side effects of their own.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    control: ClassVar[bool] = False
    follows: ClassVar[str | None] = None
    local: ClassVar[bool] = False
    has_set: ClassVar[bool] = False

    @property
    def leader(self) -> str | None:
        """The method whose strengths this one takes: the one that it follows, or of a control F*."""
        return self.follows or (MAIN if self.control else None)

    def strengths(self, config: CompareConfig, kind: Kind) -> tuple[float, ...]:
        """Strengths to try: scale factors c, or values (multiples of maximum activations, unless values are given)."""
        return config.suppress if kind == "suppress" else config.induce or config.induce_multiples

    def suppress(self, sets: Sets, strength: float, prompts: PromptSet) -> tuple[Change, ...]:
        """What suppresses refusal on these prompts: one change, or one for each set drawn."""
        raise NotImplementedError

    def induce(self, sets: Sets, strength: float) -> tuple[Change, ...]:
        """What induces refusal; nothing where the method cannot."""
        del sets, strength
        return ()

    def strength_text(self, config: CompareConfig, kind: Kind, strength: float) -> str:
        """A strength with its unit."""
        number = f"{strength:g}".replace("-", "−")
        if kind == "suppress":
            return f"c = {number}"
        return f"v = {number}" if config.induce is not None else f"{number} × max"


class FeatureMethod(Method):
    """One set of features for all prompts."""

    has_set: ClassVar[bool] = True

    def select(self, given: Selection) -> FeatureSet:
        """The method's set, best first."""
        raise NotImplementedError

    def suppress(self, sets: Sets, strength: float, prompts: PromptSet) -> tuple[Change, ...]:
        del prompts
        return tuple((ScaleFeatures(each.features, strength),) for each in sets[self.name])

    def induce(self, sets: Sets, strength: float) -> tuple[Change, ...]:
        config = sets.config

        def values(each: FeatureSet) -> float | tuple[float, ...]:
            # Each feature, a random one too, is set to a multiple of its own maximum activation.
            return strength if config.induce else tuple(strength * value for value in sets.given.maxima(each))

        return tuple((SetFeatures(each.features, values(each), config.induce_where),) for each in sets[self.name])


class Attributed(FeatureMethod):
    """F*: the features of the pool with the highest attribution (paper, section 3)."""

    name, label = MAIN, "F* (CosSim+AP)"

    def select(self, given: Selection) -> FeatureSet:
        return given.found.chosen


class WholeDictionary(FeatureMethod):
    """AP baseline: attribution over whole dictionaries, features that rise when refusal goes among them."""

    name, label = "ap", "AP"
    falling: ClassVar[bool] = False

    def select(self, given: Selection) -> FeatureSet:
        harmful = given.found.clean.used("selection").harmful
        return given.attributor.dictionary(harmful, falling=self.falling).overall.head(given.k)


class FallingOnly(WholeDictionary):
    """AP without features that rise when refusal goes, whose scaling down does the opposite."""

    name, label, falling = "ap-falling", "AP falling", True


class ActivationDifference(FeatureMethod):
    """ActDiff baseline: activations on harmful less those on harmless prompts."""

    name, label = "actdiff", "ActDiff"

    def select(self, given: Selection) -> FeatureSet:
        work = given.work
        reduce = work.config.actdiff_tokens if isinstance(work.config, CompareConfig) else "max"
        return selection.actdiff_set(work.model, work.suite, given.harmful, given.harmless, given.k, reduce=reduce)


class Cosine(FeatureMethod):
    """CosSim baseline: decoder rows nearest to the direction, over all layers."""

    name, label = "cossim", "CosSim"

    def select(self, given: Selection) -> FeatureSet:
        return selection.cossim_set(given.work.suite, given.direction, given.k)


class RandomMatched(FeatureMethod):
    """Control: random features outside the pool, matched to F* one by one in layer, firing rate and size of what they
    move."""

    name, label, control = "random", "random features", True

    def draw(self, given: Selection, seeds: Sequence[int]) -> tuple[FeatureSet, ...]:
        """One set for each seed."""
        main = given.found.chosen
        matched, exclude = self.measures(given, tuple(main.by_layer())), given.found.pool.features
        return tuple(selection.random_set(main, matched, exclude=exclude, seed=seed) for seed in seeds)

    @staticmethod
    def measures(given: Selection, layers: Sequence[int]) -> tuple[selection.Measure, selection.Measure]:
        """What random features are matched by: firing rate, and size of what a feature moves. Both classes count
        alike."""
        work = given.work
        rates: dict[int, Tensor] = {}
        sizes: dict[int, Tensor] = {}
        norms = {layer: work.suite[layer].decoder_norms() for layer in layers}
        groups = [given.harmful, given.harmless]
        for found in activations.dictionary_means(work.model, work.suite, groups, ["rate", "mean"], layers=layers):
            for layer in layers:
                rates[layer] = rates.get(layer, 0.0) + found["rate"][layer] / 2
                sizes[layer] = sizes.get(layer, 0.0) + found["mean"][layer] * norms[layer] / 2
        return rates, sizes


class RandomPool(RandomMatched):
    """Control: random features of the pool outside F*. They are as near to the direction as F*; only attribution tells
    them apart."""

    name, label = "random-pool", "random pool features"

    def draw(self, given: Selection, seeds: Sequence[int]) -> tuple[FeatureSet, ...]:
        rest = [feature for feature in given.found.pool.features if feature not in given.found.chosen.features]
        size = min(given.k, len(rest))
        if size == 0:
            given.work.warn("F* holds the whole pool, so there is no control from the pool; raise --k0 or lower --k")
            return ()
        if size < given.k:
            given.work.warn(
                f"the pool holds {len(rest)} features outside F*, so the control from the pool has sets of {size} "
                f"instead of {given.k}; raise --k0"
            )

        def one(seed: int) -> FeatureSet:
            order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:size].tolist()
            features = tuple(rest[place] for place in order)
            return FeatureSet(features=features, scores=(0.0,) * size, scope="global", method=f"pool-{seed}")

        return tuple(map(one, seeds))


class LocalAttributed(Method):
    """F* of each prompt: the pool's features with the highest attribution on that prompt. A local set is chosen for a
    refusal, so it induces none."""

    name, label, follows, local = "cossim+ap-local", "F* per prompt", MAIN, True

    def per_prompt(self, sets: Sets, prompts: PromptSet) -> Sequence[FeatureSet]:
        """One set for each prompt, attributed on the prompt itself: that is what makes it local."""
        given = sets.given
        attribution = given.attributor.pool(given.found.pool, given.work.config.estimator, prompts)
        return selection.local_sets(attribution, given.k)

    def suppress(self, sets: Sets, strength: float, prompts: PromptSet) -> tuple[Change, ...]:
        found = self.per_prompt(sets, prompts)
        own = {str(each.prompt_id): (ScaleFeatures(each.features, strength),) for each in found}
        return ((PerPrompt(own, self.name),),)


class LocalWholeDictionary(LocalAttributed):
    """AP of each prompt."""

    name, label, follows = "ap-local", "AP per prompt", "ap"

    def per_prompt(self, sets: Sets, prompts: PromptSet) -> Sequence[FeatureSet]:
        return [each.head(sets.given.k) for each in sets.given.attributor.dictionary(prompts).local]


class DirectionAblated(Method):
    """The refusal direction: projected out of every layer, or added after its own (Arditi et al., 2024)."""

    name, label = "direction", "direction"
    form: ClassVar[Form] = "linear"

    def strengths(self, config: CompareConfig, kind: Kind) -> tuple[float, ...]:
        # An ablation has no strength; the direction has a length, whatever features are set to.
        return (1.0,) if kind == "suppress" else config.induce_multiples

    def suppress(self, sets: Sets, strength: float, prompts: PromptSet) -> tuple[Change, ...]:
        del strength, prompts
        return ((sets.given.found.direction.ablate(self.form),),)

    def induce(self, sets: Sets, strength: float) -> tuple[Change, ...]:
        return ((sets.given.found.direction.add(strength, sets.config.induce_where),),)

    def strength_text(self, config: CompareConfig, kind: Kind, strength: float) -> str:
        del config
        return "" if kind == "suppress" else f"{strength:g} × length"


class DirectionAffine(DirectionAblated):
    """The direction's projection set to that of harmless prompts."""

    name, label, form = "direction-affine", "affine direction", "affine"

    def induce(self, sets: Sets, strength: float) -> tuple[Change, ...]:
        del sets, strength
        return ()  # Both forms add the same direction.


class Singular(DirectionAblated):
    """A refusal subspace: the k directions along which harmful prompts lie furthest from harmless ones. Its strength is
    k."""

    name, label = "subspace", "refusal subspace"

    def strengths(self, config: CompareConfig, kind: Kind) -> tuple[float, ...]:
        del kind
        return tuple(map(float, config.dimensions))

    def suppress(self, sets: Sets, strength: float, prompts: PromptSet) -> tuple[Change, ...]:
        del prompts
        direction, residuals = sets.given.found.direction, sets.residuals
        k = min(int(strength), len(residuals))
        basis = self.basis(residuals, direction.harmless_mean[direction.layer], k)
        return ((replace(direction.ablate(), vector=basis),),)

    def basis(
        self, harmful: Float[Tensor, "prompt d_model"], harmless_mean: Float[Tensor, " d_model"], k: int
    ) -> Float[Tensor, "_ d_model"]:
        """Vectors that span the subspace."""
        return singular_directions(harmful, harmless_mean, k)

    def induce(self, sets: Sets, strength: float) -> tuple[Change, ...]:
        del sets, strength
        return ()  # A subspace has no side that means refusal.

    def strength_text(self, config: CompareConfig, kind: Kind, strength: float) -> str:
        del config, kind
        return f"{strength:g} dimension{'' if strength == 1 else 's'}"


class Clustered(Singular):
    """A refusal subspace: the directions of k clusters of harmful prompts."""

    name, label = "subspace-clusters", "directions of clusters"

    def basis(
        self, harmful: Float[Tensor, "prompt d_model"], harmless_mean: Float[Tensor, " d_model"], k: int
    ) -> Float[Tensor, "_ d_model"]:
        return cluster_directions(harmful, harmless_mean, k)


_BUILTIN: tuple[type[Method], ...] = (
    Attributed, LocalAttributed, WholeDictionary, FallingOnly, LocalWholeDictionary, ActivationDifference, Cosine,
    RandomMatched, RandomPool, DirectionAblated, DirectionAffine, Singular, Clustered,
)  # fmt: skip
METHODS: Registry[Method] = Registry(
    "demur.methods", "selection method", {each.name: f"{__name__}:{each.__name__}" for each in _BUILTIN}
)


def get_method(name: str) -> Method:
    """The method of that name; a class in the registry is made into an instance. Raises InputError: there is none;
    names those that exist."""
    entry: Any = METHODS[name]
    return entry() if isinstance(entry, type) else entry


class Sets:
    """The sets of features of every method, each computed once per run folder when it is first asked for."""

    def __init__(self, given: Selection, config: CompareConfig) -> None:
        self.given = given
        self.config = config
        self._sets: dict[str, tuple[FeatureSet, ...]] = {}

    def __getitem__(self, name: str) -> tuple[FeatureSet, ...]:
        """One set, or several of a control."""
        if name not in self._sets:
            self._sets[name] = self._choose(name)
        return self._sets[name]

    def _choose(self, name: str) -> tuple[FeatureSet, ...]:
        method, given, config, found = get_method(name), self.given, self.config, self.given.found
        assert isinstance(method, FeatureMethod)
        if name == MAIN:
            return (found.chosen,)
        used = found.clean.used("selection")
        depends: dict[str, object] = {
            "method": name,
            "prompts": [used.harmful.digest, used.harmless.digest],
            "direction": found.direction.difference.tolist(),
            "pool": found.pool.features,
            "features": found.chosen.features,
            "k": given.k,
            "layers": given.work.suite.layers,
            "actdiff_tokens": config.actdiff_tokens,
        }
        if method.control:
            depends["seeds"] = [config.seed, config.random_sets]

        def compute() -> tuple[FeatureSet, ...]:
            if isinstance(method, RandomMatched):
                return method.draw(given, range(config.seed, config.seed + config.random_sets))
            return (method.select(given),)

        return given.work.cached("feature_sets", depends, tuple[FeatureSet, ...], compute, f"features: {name}")

    @cached_property
    def residuals(self) -> Float[Tensor, "prompt d_model"]:
        """Residuals of the harmful prompts that made the direction, where it was read."""
        work, found = self.given.work, self.given.found
        harmful = work.model.tokenize(found.clean.used("direction").harmful)
        return residuals_at(work.model, harmful, found.direction.layer, found.direction.position)
