"""What drives refusal: harm features upstream, refusal features downstream, the edges between them (section 4.2)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from demur.errors import ModelError
from demur.stats import Estimate, bootstrap_mean, bootstrap_of, one_more_draw, spearman_over_prompts
from demur.studies.base import Study
from demur.studies.circuit.sections import (
    PATHS,
    DrawRow,
    DropRow,
    EdgeCheck,
    EdgeRow,
    GraphLink,
    GraphPoint,
    Paths,
    Result,
    sections,
)
from demur.studies.config import Factors, FindConfig
from demur.types import FeatureId, FeatureSet, Prompt, PromptSet

if TYPE_CHECKING:
    from demur.method.edges import PromptGraph
    from demur.model import Items
    from demur.studies.context import Context
    from demur.studies.pipeline import Found

_ROUNDING = 1e-4
"""Weights below this share of the largest are rounding, and count as 0."""
_Rows = tuple[tuple[float, ...], ...]


class Config(FindConfig):
    """Harm features upstream, refusal features downstream, and the edges between them."""

    group = "Circuit"

    harm_features: int = Field(default=20, ge=1)
    """Harm features at most: those whose removal from the user's words moves refusal most."""
    factors: Factors = Field(default=(0.0, -3.0), min_length=1)
    """Scale factors c of the harm features, each from its first peak on: 0 removes them, the paper's −3 reverses them.
    The first is the main one."""
    random_sets: int = Field(default=20, ge=2)
    """Sets of random features, matched to the harm features one by one, that are suppressed likewise (they take one
    pass each, no answers; with fewer than 19, p cannot be below .05)."""
    edge_prompts: int = Field(default=32, ge=2)
    """Test prompts on which edges are estimated and measured."""
    node_threshold: float = Field(default=0.9, gt=0, le=1)
    """Share of the influence on the logits that the nodes of the pruned graph hold."""
    edge_threshold: float = Field(default=0.98, gt=0, le=1)
    """Share of what is left that its edges hold."""


@dataclass
class _Circuit:
    """The study's parts, and what they share."""

    context: Context[Any]
    found: Found
    harm: tuple[FeatureId, ...]
    refusal: tuple[FeatureId, ...]
    prompts: PromptSet
    """Harmful test prompts that the clean model refuses."""
    harmless: PromptSet
    """Harmless test prompts that it answers."""

    @property
    def features(self) -> tuple[FeatureId, ...]:
        """Of the graph."""
        return (*self.harm, *self.refusal)

    def items(self, prompts: PromptSet) -> Items:
        return self.context.model.tokenize(prompts)

    # -- suppression ---------------------------------------------------------------------------------------------------

    def drops(self, factor: float) -> tuple[tuple[DropRow, ...], DrawRow]:
        """The fall of the refusal features together, then of each; and the fall together under each random set."""
        sets = (self.harm, *self._random())
        asked = (partial(self._suppressed, features, factor) for features in sets)
        tables = self.context.each(asked, f"suppression upstream, c = {factor:g}")
        k, norms, rest = len(self.refusal), self._norms(), self._on_harmless()
        before, after = tables[0][:, :k], tables[0][:, k:]
        others = [table[:, k:] for table in tables[1:]]
        total = _drop_row(factor, None, before @ norms, after @ norms, [each @ norms for each in others], rest @ norms)
        single = (
            _drop_row(factor, feature, before[:, n], after[:, n], [each[:, n] for each in others], rest[:, n])
            for n, feature in enumerate(self.refusal)
        )
        base = float((before @ norms).mean())
        draws = tuple(1 - float((each @ norms).mean()) / base for each in others)
        return (total, *single), DrawRow(factor=factor, draws=draws, one_more=one_more_draw(total.drop.value, draws))

    def _suppressed(self, features: tuple[FeatureId, ...], factor: float) -> np.ndarray:
        """Means of the refusal features, clean and suppressed, side by side: shape (prompt, 2 · feature)."""
        from demur.method.edges import suppression_effect

        context = self.context

        def compute() -> _Rows:
            items = self.items(self.prompts)
            both = suppression_effect(context.model, context.suite, items, features, self.refusal, factor=factor)
            return _rows(np.concatenate(both, 1))

        depends = {"features": features, "downstream": self.refusal, "factor": factor}
        return np.array(context.cached("upstream", depends | {"prompts": self.prompts.digest}, _Rows, compute))

    def _on_harmless(self) -> np.ndarray:
        """Means of the refusal features on harmless prompts, shape (prompt, feature)."""
        from demur.method.edges import post_means

        context = self.context
        if not len(self.harmless):
            return np.zeros((0, len(self.refusal)))

        def compute() -> _Rows:
            return _rows(post_means(context.model, context.suite, self.items(self.harmless), self.refusal))

        depends = {"features": self.refusal, "prompts": self.harmless.digest}
        return np.array(context.cached("means", depends, _Rows, compute))

    def _norms(self) -> np.ndarray:
        """Norm of each refusal feature's decoder row: what one unit of it writes."""
        return np.array([float(self.context.suite[la].rows([n]).w_dec.norm()) for la, n in self.refusal])

    def _random(self) -> tuple[tuple[FeatureId, ...], ...]:
        from demur.studies.methods import RandomMatched, Selection

        context, found, config = self.context, self.found, self.context.config
        zeros = (0.0,) * len(self.harm)
        like = FeatureSet(features=self.harm, scores=zeros, scope="global", method="harm")
        used = found.clean.used("selection")
        seeds = range(config.seed, config.seed + config.random_sets)

        def draw() -> tuple[FeatureSet, ...]:
            return RandomMatched().draw(Selection(context, replace(found, chosen=like), len(like)), seeds)

        depends = {
            "method": "matched",
            "features": self.harm,
            "pool": found.pool.features,
            "seeds": [config.seed, config.random_sets],
            "prompts": [used.harmful.digest, used.harmless.digest],
        }
        drawn = context.cached("feature_sets", depends, tuple[FeatureSet, ...], draw, "features: random")
        return tuple(each.features for each in drawn)

    # -- edges ---------------------------------------------------------------------------------------------------------

    def edges(self) -> tuple[tuple[EdgeRow, ...], tuple[EdgeCheck, ...]]:
        """Every edge between features, strongest first, with kept and with stopped paths; and how well the estimates
        agree with what intervening does."""
        features = self.features
        pairs = [
            (s, t)
            for s, t in product(range(len(features)), repeat=2)
            if features[s].layer < features[t].layer and features[t] in self.refusal
        ]
        sources, targets = map(list, zip(*pairs, strict=True))
        rows: list[EdgeRow] = []
        checks: list[EdgeCheck] = []
        asked = (partial(self._edge_table, paths, exact) for paths in PATHS for exact in (False, True))
        tables = iter(self.context.each(asked))
        for paths in PATHS:
            estimated, measured = (next(tables)[:, sources, targets] for _ in range(2))
            for n, (source, target) in enumerate(pairs):
                rows.append(
                    EdgeRow(
                        paths=paths,
                        source=features[source],
                        target=features[target],
                        from_harm=features[source] in self.harm,
                        estimated=float(estimated[:, n].mean()),
                        measured=bootstrap_mean(measured[:, n], resamples=500),
                    )
                )
            known = np.abs(measured.mean(0)) > 0
            checks.append(
                EdgeCheck(
                    paths=paths,
                    edges=len(pairs),
                    nonzero=int(known.sum()),
                    spearman=spearman_over_prompts(estimated, measured),
                    same_sign=_same_sign(estimated[:, known], measured[:, known]),
                )
            )
        return tuple(sorted(rows, key=lambda row: -abs(row.measured.value))), tuple(checks)

    def _edge_table(self, paths: Paths, exact: bool) -> np.ndarray:
        """Weights, shape (prompt, source · target)."""
        from demur.method.edges import estimate_edges, intervene_edges

        context, prompts = self.context, self.prompts.head(self.context.config.edge_prompts)
        name = f"edges, {paths} paths: {'measured' if exact else 'estimated'}"

        def progress(done: int, total: int) -> None:
            context.progress(name, done, total)

        def compute() -> _Rows:
            measure: Any = intervene_edges if exact else estimate_edges
            items = self.items(prompts)
            found = measure(context.model, context.suite, items, self.features, paths=paths, progress=progress)
            return _rows(found.reshape(len(found), -1))

        depends = {"features": self.features, "prompts": prompts.digest, "paths": paths, "exact": exact}
        table = np.array(context.cached("edges", depends, _Rows, compute))
        return np.where(np.abs(table) < _ROUNDING * np.abs(table).max(), 0.0, table).reshape(
            len(table), len(self.features), len(self.features)
        )

    # -- the graph of one prompt ---------------------------------------------------------------------------------------

    def graph(self, prompt: Prompt) -> tuple[tuple[GraphPoint, ...], tuple[GraphLink, ...], dict[str, Any]]:
        """The pruned graph of a prompt: points and links to draw, and the attribution graph."""
        import torch

        from demur.method.edges import prompt_graph, pruned
        from demur.method.path import Metric
        from demur.studies.circuit.graph import attribution_graph, node_id

        context, config, model = self.context, self.context.config, self.context.model
        (item,) = self.items(PromptSet(name="graph", prompts=(prompt,)))
        batch, ids = model.batch([item]), self.found.clean.refusal_ids
        with torch.inference_mode():
            clean = model.last_logits(batch)[0]
            with model.intervene(self.found.direction.ablate().bind()):
                (target,) = Metric(ids).targets(model.last_logits(batch))
        logits = (max(ids, key=lambda token: float(clean[token])), target)
        whole = prompt_graph(model, context.suite, item, self.features, logits)
        graph = pruned(whole, config.node_threshold, config.edge_threshold)

        def decode(token: int) -> str:
            return str(model.tokenizer.decode([token]))

        groups = {"harm": self.harm, "refusal": self.refusal}
        exported = attribution_graph(
            graph,
            prompt=str(model.tokenizer.decode(list(item.ids))),
            tokens=[decode(token) for token in item.ids],
            model=context.inputs.title,
            saes=context.inputs.saes_title,
            groups={f"{name} feature": features for name, features in groups.items()},
            decode=decode,
            thresholds=(config.node_threshold, config.edge_threshold),
        )
        names = [node_id(node) for node in graph.nodes]
        points = tuple(
            self._point(graph, n, name, decode(item.ids[graph.nodes[n].position])) for n, name in enumerate(names)
        )
        links = tuple(
            GraphLink(source=names[s], target=names[t], weight=float(graph.weights[t, s]))
            for t, s in zip(*graph.weights.nonzero(), strict=True)
        )
        return points, links, exported

    def _point(self, graph: PromptGraph, n: int, name: str, token: str) -> GraphPoint:
        node = graph.nodes[n]
        kind = "harm" if node.feature in self.harm else "refusal" if node.feature is not None else node.kind
        text = self.context.model.tokenizer.decode([node.token_id]) if node.kind == "logit" else token
        return GraphPoint(
            node=name,
            kind=kind,
            label=str(node.feature or text),
            layer=node.layer,
            position=node.position,
            token=token,
            value=node.value,
            influence=float(graph.influence[n]),
        )


def _rows(table: np.ndarray) -> _Rows:
    return tuple(tuple(row) for row in table.tolist())


def _drop_row(
    factor: float,
    feature: FeatureId | None,
    before: np.ndarray,
    after: np.ndarray,
    others: list[np.ndarray],
    harmless: np.ndarray,
) -> DropRow:
    random = np.mean(others, axis=0)
    table = np.stack([before, after, random], 1)

    def ratio(part: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.divide(part, base, out=np.full_like(base, np.nan), where=base > 0)

    def fall(means: np.ndarray, column: int) -> np.ndarray:
        return ratio(means[..., 0] - means[..., column], means[..., 0])

    def of_excess(means: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return ratio(means[..., 0] - means[..., 1], means[..., 0] - rest[..., 0])

    return DropRow(
        factor=factor,
        feature=feature,
        before=float(before.mean()),
        harmless=float(harmless.mean()) if len(harmless) else math.nan,
        drop=bootstrap_of(lambda means: fall(means, 1), table),
        of_excess=bootstrap_of(of_excess, table, harmless[:, None]),
        random=bootstrap_of(lambda means: fall(means, 2), table),
        difference=bootstrap_of(lambda means: fall(means, 1) - fall(means, 2), table),
    )


def _same_sign(estimated: np.ndarray, measured: np.ndarray) -> Estimate:
    """Share of edges whose mean estimate has the sign of the mean measured weight."""
    n = measured.shape[1]
    if n == 0:
        return Estimate.unknown()

    def share(means: np.ndarray) -> np.ndarray:
        return (np.sign(means[..., :n]) == np.sign(means[..., n:])).mean(-1)

    return bootstrap_of(share, np.concatenate([estimated, measured], 1))


def _parts(context: Context[Any], found: Found) -> tuple[tuple[FeatureId, ...], tuple[FeatureId, ...]]:
    """Harm features that lie upstream of a refusal feature, and refusal features downstream of a harm feature. Raises
    ModelError: there are none."""
    from demur.studies.roles import find_roles, harm_features

    harm = harm_features(context, found, context.config.harm_features).of("harm")
    refusal = tuple(f for f in find_roles(context, found).of("refusal") if f not in harm)
    if not harm or not refusal or min(harm).layer >= max(refusal).layer:
        raise ModelError(
            f"{len(harm)} harm features and {len(refusal)} refusal features of F* were found, and no harm feature lies "
            "in a layer before a refusal feature, so there is no circuit to trace. Give more layers (--layers), a "
            "larger F* (--k) or more selection prompts (-n)"
        )
    last, first = max(refusal).layer, min(harm).layer
    return tuple(f for f in harm if f.layer < last), tuple(f for f in refusal if f.layer > first)


def run(context: Context[Any]) -> Result:
    """Trace harm to refusal."""
    from demur.studies import pipeline

    found = pipeline.find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    with context.timed("roles"):
        harm, refusal = _parts(context, found)
    test = context.splits.test
    answers = (context.answer(f"clean: test, {label}", prompts) for label, prompts in test)
    used = pipeline.split_used(*answers)
    refused = used.harmful
    if len(refused) < 2:
        raise ModelError(
            f"the clean model refuses {len(refused)} of the {len(test.harmful)} harmful test prompts; "
            "at least 2 are needed. Give clearer test prompts, or more of them"
        )
    circuit = _Circuit(context, found, harm, refusal, refused, used.harmless)
    with context.timed("suppression upstream"):
        drops, draws = zip(*map(circuit.drops, context.config.factors), strict=True)
    with context.timed("edges"):
        edges, checks = circuit.edges()
    with context.timed("graph"):
        points, links, exported = circuit.graph(refused.prompts[0])
        context.run.save_result("graph.json", json.dumps(exported, indent=1))
    return Result(
        harm=harm,
        refusal=refusal,
        drops=tuple(row for rows in drops for row in rows),
        draws=draws,
        checks=checks,
        edges=edges,
        prompt=refused.prompts[0].text,
        points=points,
        links=links,
    )


STUDY = Study("circuit", Config, Result, run, sections)
