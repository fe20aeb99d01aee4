"""Representations of prompts, and the probes that are fitted on them: poolings, layers and strengths are chosen on
validation prompts, never on test prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Self, get_args

import numpy as np
import torch
from torch import Tensor

from demur.errors import InputError
from demur.guard.probes import Labelled, Probe, best_probe, fit_centroids, fit_probe
from demur.guard.readings import Pooling, Reading, Values, read_prompts
from demur.guard.stats import threshold_at
from demur.method.likelihood import token_losses
from demur.method.selection import cossim_set, random_set
from demur.model import Region, TokenizedPrompt
from demur.stats import auroc
from demur.studies.context import Context
from demur.studies.gauge import Gauge
from demur.studies.methods import RandomMatched, Selection
from demur.studies.pipeline import Found
from demur.studies.probes import results
from demur.studies.probes.inputs import Chosen
from demur.studies.probes.results import ProbeRow, Target
from demur.types import FeatureId, FeatureSet, PromptSet

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
_ON_WORDS: tuple[Pooling, ...] = ("instruction", "mean", "max")
_OUTSIDE = Reading(kind="dense", layer=0)
"""Stands for what is no activation (keywords, perplexity): those probes are calibrated, never stored."""
_PLAIN = Probe(_OUTSIDE, np.ones(1, dtype=np.float32), 0.0)
"""Takes a score as it is."""


@dataclass(frozen=True)
class Arrays:
    """Arrays as a stage keeps them."""

    values: tuple[np.ndarray, ...]

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {str(n): torch.from_numpy(np.ascontiguousarray(v)) for n, v in enumerate(self.values)}, {}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: ARG003
        return cls(tuple(tensors[str(n)].numpy() for n in range(len(tensors))))


@dataclass(frozen=True)
class Representation:
    """What may be looked at under one name; `readings` are compared on validation prompts."""

    name: str
    readings: tuple[Reading, ...]
    centroids: bool = False
    l1: bool = False


@dataclass(frozen=True, eq=False)
class Fitted:
    """The probe of a representation for one target, with the log-odds of the validation negatives."""

    name: str
    target: Target
    probe: Probe
    row: ProbeRow
    negatives: np.ndarray
    positives: np.ndarray
    """The same of the validation positives."""
    losses: np.ndarray
    """Log loss on each validation prompt."""

    @property
    def usual(self) -> float:
        """Log-odds that 95 % of the validation positives are above: what is below is unlike them."""
        return float(np.quantile(self.positives, 0.05))

    def threshold(self, fpr: float) -> float:
        """Log-odds at which at most a share `fpr` of the validation negatives is flagged."""
        return threshold_at(self.negatives, fpr)


@dataclass
class Bench:
    """Reads prompts, once for each set, and fits probes."""

    context: Context[Any]
    found: Found
    gauge: Gauge
    train: Chosen
    """Fits."""
    choice: Chosen
    """Chooses layer, pooling and strength."""
    validation: Chosen
    """Calibrates and sets thresholds, and chooses nothing that is fitted: what chose would flatter itself."""
    keywords: dict[Target, Any] = field(default_factory=dict[Target, Any])

    def read(self, prompts: PromptSet, readings: Sequence[Reading], what: str) -> tuple[np.ndarray, ...]:
        """Values of several readings, from one pass that the run folder keeps."""
        if not readings:
            return ()
        context, wanted = self.context, tuple(readings)

        def compute() -> Arrays:
            progress = partial(context.progress, f"reading: {what}")
            return Arrays(tuple(read_prompts(context.model, prompts.prompts, wanted, context.suite, progress)))

        return context.cached("readings", {"prompts": prompts.digest, "readings": wanted}, Arrays, compute).values

    def perplexity(self, prompts: PromptSet) -> Values:
        """Mean loss (nats per token) of the user's words under the model, shape (prompt, 1)."""
        context, model = self.context, self.context.model

        def compute() -> list[float]:
            items = [_counted(item) for item in model.tokenize(prompts)]
            return [each.nats / max(each.tokens, 1) for each in token_losses(model, items)]

        found = context.cached("perplexity", {"prompts": prompts.digest}, list[float], compute, "perplexity")
        return np.array(found, dtype=np.float32)[:, None]

    # -- representations -------------------------------------------------------------------------------------------

    @cached_property
    def representations(self) -> tuple[Representation, ...]:
        """All that read activations but the one of whole dictionaries, whose layer the dense residual chooses. The
        dense residual at the last token, where refusal is encoded, is one of its own (the paper's)."""
        layers = range(self.context.model.n_layers)
        words = tuple(Reading(kind="dense", layer=layer, pooling=p) for p in _ON_WORDS for layer in layers)
        last = tuple(Reading(kind="dense", layer=layer, pooling="last") for layer in layers)
        sets = {
            results.HARM: self.gauge.harm,
            results.REFUSAL: self.gauge.refusal,
            results.BOTH: self.gauge.features if self.gauge.harm else (),
            results.COSSIM: cossim_set(
                self.context.suite, self.found.direction.vector, len(self.gauge.features)
            ).features,
            results.RANDOM: self._random(),
        }
        return (
            Representation(results.DENSE, words),
            Representation(results.DENSE_LAST, last),
            Representation(results.CENTROIDS, (*words, *last), centroids=True),
            *(Representation(name, _pooled(features)) for name, features in sets.items() if features),
        )

    def _random(self) -> tuple[FeatureId, ...]:
        """As many features as harm and refusal features, matched one by one in layer, firing rate and size."""
        features = self.gauge.features
        like = FeatureSet(features=features, scores=(0.0,) * len(features), scope="global", method="both")
        exclude = self.found.pool.features

        def compute() -> FeatureSet:
            given = Selection(self.context, self.found, len(features))
            measures = RandomMatched.measures(given, tuple(like.by_layer()))
            return random_set(like, measures, exclude=exclude, seed=self.context.config.seed)

        depends = {"like": features, "exclude": exclude, "seed": self.context.config.seed}
        try:
            return self.context.cached("random-features", depends, FeatureSet, compute, "random features").features
        except InputError as error:
            self.context.warn(f"there is no control of random features: {error}")
            return ()

    def all_features(self, layer: int | None) -> Representation:
        """The whole dictionary of the layer (or the nearest that has one)."""
        suite = self.context.suite
        near = min(suite.layers, key=lambda each: abs(each - (layer or 0)))
        features = tuple(FeatureId(near, index) for index in range(suite[near].spec.d_sae))
        return Representation(results.ALL_FEATURES, _pooled(features), l1=True)

    # -- fitting ---------------------------------------------------------------------------------------------------

    def fit(self, target: Target) -> dict[str, Fitted]:
        """The probes of all representations for one target, by name."""
        asked = [_read_at(target, each) for each in self.representations]
        found = self.context.each(partial(self.best, each, target) for each in asked)
        fitted = {each.name: each for each in found}
        whole = _read_at(target, self.all_features(fitted[results.DENSE].row.layer))
        fitted[whole.name] = self.best(whole, target)
        fitted[results.KEYWORDS] = self._keywords(target)
        fitted[results.PERPLEXITY] = self._perplexity(target)
        return fitted

    def labelled(self, chosen: Chosen, values: np.ndarray, target: Target) -> Labelled:
        """Values with the target's labels, without prompts that have none."""
        labels = chosen.harmful.astype(np.float64) if target == "harmful" else chosen.refuse
        known = ~np.isnan(labels)
        return Labelled(values[known], labels[known].astype(bool))

    def best(self, asked: Representation, target: Target) -> Fitted:
        """The probe of the reading with the least log loss on the validation prompts, fitted once per run folder."""
        parts = (self.train, self.choice)
        fit = fit_centroids if asked.centroids else partial(fit_probe, penalty="l1" if asked.l1 else "l2")

        def tried() -> Iterator[tuple[Probe, Labelled]]:
            read = [self.read(part.prompts, asked.readings, asked.name) for part in parts]
            for number, reading in enumerate(asked.readings):
                train, choice = (self.labelled(part, v[number], target) for part, v in zip(parts, read, strict=True))
                yield fit(reading, train, choice), choice

        used = (self.labelled(part, np.arange(len(part.texts)), target) for part in parts)
        depends: dict[str, Any] = {"readings": asked.readings, "fit": [asked.centroids, asked.l1]}
        depends |= {"prompts": [part.prompts.digest for part in parts]}
        depends |= {"labels": [[values.tolist(), labels.tolist()] for values, labels in used]}
        probe = self.context.cached(
            "probe", depends, Probe, lambda: best_probe(tried()), f"probe: {asked.name}, {target}"
        )
        (values,) = self.read(self.validation.prompts, [probe.reading], asked.name)
        held = self.labelled(self.validation, values, target)
        return self._fitted(asked.name, target, probe, held, len(asked.readings))

    def _keywords(self, target: Target) -> Fitted:
        """Words and pairs of words by tf-idf: the cheapest thing that could work."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        tried: list[tuple[float, Any]] = []
        for strength in (0.1, 1.0, 10.0, 100.0):
            model = make_pipeline(
                TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                LogisticRegression(C=strength, max_iter=5000),
            )
            model.fit(*self._texts(self.train, target))
            texts, truth = self._texts(self.choice, target)
            side = Labelled(_words(model, texts), truth)
            tried.append((float(_PLAIN.calibrated(side).log_losses(side).mean()), model))
        self.keywords[target] = min(tried, key=lambda each: each[0])[1]
        texts, truth = self._texts(self.validation, target)
        held = Labelled(_words(self.keywords[target], texts), truth)
        return self._fitted(results.KEYWORDS, target, _PLAIN, held, len(tried))

    def _texts(self, chosen: Chosen, target: Target) -> tuple[list[str], np.ndarray]:
        places, labels = self.labelled(chosen, np.arange(len(chosen.texts)), target)
        return [chosen.texts[place] for place in places.tolist()], labels

    def _perplexity(self, target: Target) -> Fitted:
        parts = (self.train, self.choice, self.validation)
        *sides, held = (self.labelled(part, self.perplexity(part.prompts), target) for part in parts)
        return self._fitted(results.PERPLEXITY, target, fit_probe(_OUTSIDE, *sides), held, 1)

    def _fitted(self, name: str, target: Target, probe: Probe, held: Labelled, tried: int) -> Fitted:
        """A probe calibrated on the validation prompts, `held`, and what it is worth there."""
        probe = probe.calibrated(held)
        losses, logits = probe.log_losses(held), probe.logit(held.values)
        reads = name not in (results.KEYWORDS, results.PERPLEXITY)
        row = ProbeRow(
            target=target,
            representation=name,
            pooling=probe.reading.pooling if reads else None,
            layer=probe.reading.layer if reads else None,
            dim=len(probe.weights),
            used=int((probe.weights != 0).sum()),
            loss=float(losses.mean()),
            auroc=auroc(logits[held.labels], logits[~held.labels], resamples=1).value,
            tried=tried,
        )
        return Fitted(name, target, probe, row, logits[~held.labels], logits[held.labels], losses)

    # -- scoring ---------------------------------------------------------------------------------------------------

    def values(self, prompts: PromptSet, fitted: Sequence[Fitted], what: str) -> dict[tuple[str, Target], np.ndarray]:
        """What each fitted probe looks at, by representation and target."""
        inside = [each for each in fitted if each.row.pooling is not None]
        readings = tuple(dict.fromkeys(each.probe.reading for each in inside))
        read = dict(zip(readings, self.read(prompts, readings, what), strict=True))
        found: dict[tuple[str, Target], np.ndarray] = {}
        found |= {(each.name, each.target): read[each.probe.reading] for each in inside}
        for each in fitted:
            if each.name == results.KEYWORDS:
                found[each.name, each.target] = _words(self.keywords[each.target], prompts.texts)
            elif each.name == results.PERPLEXITY:
                found[each.name, each.target] = self.perplexity(prompts)
        return found


def _read_at(target: Target, asked: Representation) -> Representation:
    """A representation as it is read for a target: refusal at the last token only, where it is encoded (Zhao et al.,
    2025). On plain prompts the labels of the two targets mostly coincide, so only where they are read tells them
    apart."""
    if target == "harmful" or asked.name == results.DENSE:
        return asked
    readings = (reading.model_copy(update={"pooling": "last"}) for reading in asked.readings)
    return replace(asked, readings=tuple(dict.fromkeys(readings)))


def _pooled(features: tuple[FeatureId, ...]) -> tuple[Reading, ...]:
    return tuple(Reading(kind="features", features=features, pooling=p) for p in POOLINGS)


def _words(model: Any, texts: Sequence[str]) -> Values:
    return np.asarray(model.decision_function(list(texts)), dtype=np.float32)[:, None]


def winner_of(fitted: Mapping[str, Fitted]) -> str:
    """The representation for the guard, among those that read activations, harm on the user's words and refusal at the
    last token: the first, in the order in which they stand, whose log loss on the validation prompts is no more than
    one standard error above the least. Dense residuals come first: they take one dot product and no SAE, so others must
    be clearly better."""

    def apart(each: Fitted) -> bool:
        return each.row.pooling is not None and (each.row.pooling == "last") == (each.target == "refuse")

    inside = [each for each in fitted.values() if apart(each)]
    best = min(inside, key=lambda each: each.row.loss)

    def near(each: Fitted) -> bool:
        gaps = each.losses - best.losses
        return float(gaps.mean()) <= float(gaps.std(ddof=1)) / len(gaps) ** 0.5

    return next(each.name for each in inside if each is best or near(each))


def _counted(item: TokenizedPrompt) -> TokenizedPrompt:
    """A prompt whose own words are what is scored."""
    last = max((n for n, region in enumerate(item.regions) if region == Region.INSTRUCTION), default=len(item) - 1)
    words = (Region.RESPONSE if region == Region.INSTRUCTION else region for region in item.regions[: last + 1])
    return TokenizedPrompt(item.prompt_id, item.ids[: last + 1], tuple(int(region) for region in words))
