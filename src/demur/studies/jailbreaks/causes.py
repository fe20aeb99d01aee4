"""Succeeded attacks one by one: the local patches that bring refusal back, and what each word suppresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.data import AttackPair, adversarial_prompts
from demur.stats import Estimate, bootstrap_mean, spearman
from demur.studies.jailbreaks.results import (
    F_STAR,
    LOCAL,
    RANDOM,
    AgreementRow,
    LocalRow,
    Region,
    Sample,
    WalkRow,
    WordMeasure,
)
from demur.types import Prompt, PromptSet, Take

if TYPE_CHECKING:
    from demur.method.interventions import HoldFeatures, Intervention
    from demur.method.local import LocalExplanation
    from demur.model import Items
    from demur.studies.context import Context
    from demur.studies.gauge import Gauge, Walk
    from demur.studies.pipeline import Found
    from demur.types import FeatureId


@dataclass(frozen=True)
class Explained:
    """Explanations of succeeded attacks, one by one, and what answers under them say."""

    rows: tuple[LocalRow, ...] = ()
    rates: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    share: float = float("nan")
    chance: float = float("nan")
    samples: tuple[Sample, ...] = ()

    @classmethod
    def of(
        cls,
        context: Context[Any],
        found: Found,
        pairs: Sequence[AttackPair],
        requests: Mapping[str, Prompt],
        answers_before: Mapping[str, str],
    ) -> Explained:
        """Explain each of `pairs`, which succeeded; `requests` are their plain prompts, by pair id, and
        `answers_before` what the model answered."""
        from demur.method.local import hold_patches, transplant

        layers = [n for n in context.suite.layers if n < context.config.patch_depth * context.model.n_layers]
        if not (pairs and layers):
            return cls()
        prompts = adversarial_prompts(pairs, "succeeded")
        plain = [context.model.chat.tokenize(requests[pair.id]) for pair in pairs]
        items = context.model.tokenize(prompts)
        local = _explanations(context, found, plain, items, layers)
        f_star = {
            each.prompt_id: transplant(context.model, context.suite, *both, found.chosen.features)
            for each, both in zip(local, zip(plain, items, strict=True), strict=True)
        }
        changes = {
            LOCAL: {e.prompt_id: hold_patches(e.patches, len(i)) for e, i in zip(local, items, strict=True)},
            RANDOM: {e.prompt_id: hold_patches(e.drawn, len(i)) for e, i in zip(local, items, strict=True)},
            F_STAR: f_star,
        }
        answers = {name: context.answer(name, prompts, (_each(name, holds),)) for name, holds in changes.items()}
        rows = tuple(
            LocalRow(
                id=each.prompt_id,
                attack=pair.attack,
                features=tuple(patch.feature for patch in each.patches),
                tokens=tuple(str(context.model.tokenizer.decode([item.ids[p.token]])) for p in each.patches),
                regions=tuple(_region_name(item.regions[patch.token]) for patch in each.patches),
                raised=tuple(patch.value > patch.before for patch in each.patches),
                kl=each.kl,
                p_refuse=each.p_refuse,
                restored=answers[LOCAL].refused[n],
                random=answers[RANDOM].refused[n],
                f_star=answers[F_STAR].refused[n],
            )
            for n, (pair, item, each) in enumerate(zip(pairs, items, local, strict=True))
        )
        samples = tuple(
            Sample(prompt=pair.text, answers=(("under attack", answers_before[pair.id]), ("patched", answer.text)))
            for pair, answer in zip(pairs[:5], answers[LOCAL].answers, strict=False)
        )
        share, chance = (
            _share(found, [patch.feature for each in local for patch in getattr(each, name)])
            for name in ("patches", "drawn")
        )
        return cls(rows, {name: found.refusal for name, found in answers.items()}, share, chance, samples)


def _explanations(
    context: Context[Any], found: Found, plain: Items, items: Items, layers: Sequence[int]
) -> list[LocalExplanation]:
    """The local explanation of each adversarial prompt (of `items`) by its plain one, in order."""
    from demur.method.local import LocalExplanation, LocalSearch

    limit, refusal = context.config.max_patches, found.clean.refusal_ids

    def compute(take: Take) -> Iterator[list[LocalExplanation]]:
        for before, item in zip(plain, items, strict=True):
            if take([item.prompt_id]):
                search = LocalSearch(context.model, context.suite, before, item, refusal, layers)
                yield [search.explain(limit=limit, seed=context.config.seed)]

    depends = context.depends | {
        "prompts": [[p.ids, i.ids] for p, i in zip(plain, items, strict=True)],
        "ids": [item.prompt_id for item in items],
        "refusal_ids": refusal,
        "layers": list(layers),
        "limit": limit,
        "seed": context.config.seed,
    }
    keys, progress = [item.prompt_id for item in items], partial(context.progress, "local explanations")
    return context.run.mapped("local", depends, LocalExplanation, keys, compute, progress=progress)


def _each(name: str, holds: dict[str, HoldFeatures]) -> Intervention:
    from demur.method.interventions import PerPrompt

    return PerPrompt({key: (hold,) for key, hold in holds.items()}, name)


def _region_name(region: int) -> Region:
    """The part of the prompt that a scored token belongs to."""
    from demur.model import Region as Regions

    return "instruction" if region == Regions.INSTRUCTION else "post_instruction"


def _share(found: Found, features: Sequence[FeatureId]) -> float:
    known = set(found.chosen.features)
    return sum(each in known for each in features) / len(features) if features else float("nan")


# -- word by word --------------------------------------------------------------------------------------------------


def walked_rows(context: Context[Any], gauge: Gauge, pairs: Sequence[AttackPair]) -> tuple[WalkRow, ...]:
    """The words of each pair added one at a time; pairs whose plain prompt does not stand in them are left out."""
    from demur.studies.gauge import Walk

    made = [(pair, walk) for pair in pairs if (walk := Walk.of(pair, context.config.walk_steps))]
    rows = _walk_rows(gauge, [walk for _, walk in made])
    return tuple(row.model_copy(update={"attack": pair.attack}) for row, (pair, _) in zip(rows, made, strict=True))


def _walk_rows(gauge: Gauge, walks: Sequence[Walk]) -> list[WalkRow]:
    """What each added word suppresses, walk by walk."""
    from demur.method.interventions import ScaleFeatures
    from demur.studies.gauge import drops, walked, word_effects

    if not walks:
        return []
    prompts, split = walked(walks), len(gauge.harm)
    clean = gauge.levels(prompts)
    change = (ScaleFeatures(gauge.harm, 0.0, where="prompt"),) if gauge.harm else ()
    removed = gauge.signals(gauge.levels(prompts, change))[:, 1]
    ends = np.cumsum([len(walk.texts) for walk in walks])[:-1]
    parts = [np.split(each, ends) for each in (gauge.signals(clean)[:, 1], removed, clean[:, split:])]
    starts = [float(signal[0]) for signal in parts[0]]
    curves = [
        (drops(signal, start), drops(less, start), levels)
        for signal, less, levels, start in zip(*parts, starts, strict=True)
    ]
    tops = [int(np.nan_to_num(np.diff(curve)).argmax()) for curve, *_ in curves]
    single = tuple(Prompt(id=f"{walk.id}~alone", text=walk.alone(top)) for walk, top in zip(walks, tops, strict=True))
    alone = gauge.read(PromptSet(name="one word", prompts=single))[:, 1:]
    effects = word_effects(gauge, {walk.id: walk.parts for walk in walks})
    return [
        WalkRow(
            id=walk.id,
            attack="",
            words=walk.words,
            refusal=tuple(curve.tolist()),
            without_harm=tuple(less.tolist()),
            by_feature=tuple(tuple(drops(column, float(column[0])).tolist()) for column in levels.T),
            top=top,
            alone=float(drops(one, start)[0]),
            left_out=_shares(effects[walk.id].left_out[:, 1], start),
            gradient=_shares(effects[walk.id].gradient, start),
            ig=_shares(effects[walk.id].ig, start),
        )
        for walk, (curve, less, levels), top, one, start in zip(walks, curves, tops, alone, starts, strict=True)
    ]


def _shares(changes: np.ndarray, start: float) -> tuple[float, ...]:
    return tuple((changes / start if start > 0 else np.full(len(changes), np.nan)).tolist())


_COMPARED: tuple[tuple[WordMeasure, WordMeasure], ...] = (
    *(("gradient", "left_out"), ("ig", "left_out"), ("gradient", "added"), ("ig", "added"), ("added", "left_out")),
)


def agreement(walks: Sequence[WalkRow]) -> tuple[AgreementRow, ...]:
    """How far estimates and exact measures of what words take away agree."""
    return tuple(
        AgreementRow(
            first=first,
            second=second,
            spearman=bootstrap_mean([spearman(getattr(row, first), getattr(row, second)) for row in walks]),
        )
        for first, second in (_COMPARED if walks else ())
    )
