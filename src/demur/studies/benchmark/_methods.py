"""The methods that are compared: their sets of features, and what they do at each strength (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from demur.method.interventions import Intervention, PerPrompt, ScaleFeatures, SetFeatures
from demur.method.selection import actdiff_set, cossim_set, firing_rates, local_sets, mean_peaks, mean_rates, random_set
from demur.studies._context import Study
from demur.studies._finding import Found, attribute_everything, attribute_pool
from demur.studies.benchmark.config import DIRECTIONS, LOCAL, MAIN, BenchmarkConfig, MethodName
from demur.types import FeatureSet, PromptSet, Value

Change = tuple[Intervention, ...]


class _Peaks(Value):
    peaks: tuple[float, ...]


class Methods:
    """Sets of features by method. Each is a stage of the run folder, computed when it is first asked for."""

    def __init__(self, study: Study, config: BenchmarkConfig, found: Found) -> None:
        self._study = study
        self._config = config
        self._found = found
        self._k = len(found.chosen)
        """All sets have the size of F*, which a small pool may limit."""
        self._peaks: dict[MethodName, tuple[float, ...]] = {}

    @property
    def shared(self) -> tuple[MethodName, ...]:
        """Those with one set, or direction, for all prompts, chosen rather than drawn."""
        return tuple(name for name in self._config.methods if name not in LOCAL and name != "random")

    @cached_property
    def sets(self) -> dict[MethodName, FeatureSet]:
        """The global sets, F* first."""
        found: dict[MethodName, FeatureSet] = {MAIN: self._found.chosen}
        for name in self._config.methods:
            if name in ("ap", "ap-falling", "actdiff", "cossim"):
                found[name] = self._global(name)
        return found

    def _global(self, name: MethodName) -> FeatureSet:
        study, config = self._study, self._config
        used = self._found.baseline.used("selection")
        if name in ("ap", "ap-falling"):
            baseline, direction = self._found.baseline, self._found.direction
            scored = attribute_everything(study, baseline, direction, used.harmful, falling=name == "ap-falling")
            return scored.overall.head(self._k)
        depends = study.depends | {"method": name, "k": self._k, "layers": study.inputs.suite.layers}
        if name == "cossim":
            depends |= {"direction": self._found.direction.difference.tolist()}
        else:
            depends |= {"prompts": [used.harmful.digest, used.harmless.digest], "reduce": config.actdiff}
        stage = study.run.stage("baseline_set", depends)
        if not stage.done:
            study.progress(f"features: {name}", 0, 1)
            model, suite = study.inputs.model, study.inputs.suite
            if name == "cossim":
                chosen = cossim_set(suite, self._found.direction.vector, self._k)
            else:
                harmful, harmless = study.rendered(used.harmful), study.rendered(used.harmless)
                chosen = actdiff_set(model, suite, harmful, harmless, self._k, reduce=config.actdiff)
            stage.save("set", chosen)
            stage.finish()
            study.progress(f"features: {name}", 1, 1)
        return stage.load("set", FeatureSet)

    @cached_property
    def randoms(self) -> tuple[FeatureSet, ...]:
        """Sets matched to F* one by one, one for each seed."""
        study, config, pool, main = self._study, self._config, self._found.pool, self._found.chosen
        used = self._found.baseline.used("selection")
        depends = study.depends | {
            "prompts": [used.harmful.digest, used.harmless.digest],
            "features": main.features,
            "exclude": pool.features,
            "seeds": [config.seed, config.random_seeds],
        }
        stage = study.run.stage("random_sets", depends)
        if not stage.done:
            study.progress("features: random", 0, 1)
            layers = tuple(main.by_layer())
            high, low = (
                firing_rates(study.inputs.model, study.inputs.suite, study.rendered(prompts), layers=layers)
                for prompts in (used.harmful, used.harmless)
            )
            rates = mean_rates(high, low)
            seeds = range(config.seed, config.seed + config.random_seeds)
            drawn = [random_set(main, rates, exclude=pool.features, seed=seed) for seed in seeds]
            stage.save("sets", drawn)
            stage.finish()
            study.progress("features: random", 1, 1)
        return tuple(stage.load("sets", list[FeatureSet]))

    def _local(self, name: MethodName, harmful: PromptSet) -> Sequence[FeatureSet]:
        study, found = self._study, self._found
        if name == "ap-local":
            scored = attribute_everything(study, found.baseline, found.direction, harmful)
            return [each.head(self._k) for each in scored.local]
        method = self._config.estimator
        attribution = attribute_pool(study, found.baseline, found.direction, found.pool, method, harmful)
        return local_sets(attribution, self._k)

    def suppress(self, name: MethodName, factor: float, prompts: PromptSet) -> tuple[Change, ...]:
        """What the method does to these prompts to suppress refusal: one change, or one for each random set."""
        direction = self._found.direction
        if name in DIRECTIONS:
            return ((direction.ablate("linear" if name == "direction" else "affine"),),)
        if name in LOCAL:
            sets = self._local(name, prompts)
            own = {str(each.prompt_id): (ScaleFeatures(each.features, factor),) for each in sets}
            return ((PerPrompt(own, name),),)
        return tuple(self.scaled(each, factor) for each in self._runs(name))

    def scaled(self, features: FeatureSet, factor: float) -> Change:
        """Suppression by any set of features."""
        return (ScaleFeatures(features.features, factor),)

    def induce(self, name: MethodName, strength: float) -> tuple[Change, ...]:
        """What the method does to induce refusal."""
        where = self._config.induce_where
        if name in DIRECTIONS:
            return ((self._found.direction.add(strength, where),),)
        values: float | tuple[float, ...] = strength
        if self._config.induce is None:
            # A random feature is set to what the feature it stands for is set to.
            values = tuple(strength * peak for peak in self._peak(MAIN if name == "random" else name))
        return tuple((SetFeatures(each.features, values, where),) for each in self._runs(name))

    def _runs(self, name: MethodName) -> tuple[FeatureSet, ...]:
        return self.randoms if name == "random" else (self.sets[name],)

    def _peak(self, name: MethodName) -> tuple[float, ...]:
        """Mean peak activation on harmful selection prompts of each feature of a global set."""
        if name not in self._peaks:
            study, features = self._study, self.sets[name].features
            harmful = self._found.baseline.used("selection").harmful
            stage = study.run.stage("peaks", study.depends | {"prompts": harmful.digest, "features": features})
            if not stage.done:
                peaks = mean_peaks(study.inputs.model, study.inputs.suite, study.rendered(harmful), features)
                stage.save("peaks", _Peaks(peaks=tuple(peaks.tolist())))
                stage.finish()
            self._peaks[name] = stage.load("peaks", _Peaks).peaks
        return self._peaks[name]


__all__ = ["Change", "Methods"]
