"""One prompt explained with the features that a study found: what fires on it, what does not, and what that does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from demur.errors import InputError, RunError
from demur.report.blocks import Page
from demur.runs import read_run
from demur.studies import STUDIES
from demur.studies.base import Study, StudyResult, page_of
from demur.studies.config import FindConfig
from demur.types import FeatureField, Outcome, Prompt, PromptSet, Value

if TYPE_CHECKING:
    from demur.method.interventions import HoldFeatures, Intervention
    from demur.method.local import Patch
    from demur.model import TokenizedPrompt
    from demur.studies.context import Change, Context, Progress
    from demur.studies.gauge import Gauge
    from demur.studies.pipeline import Found

WORDS = 40
"""Words that are left out one at a time; of longer prompts several together."""
MAX_PATCHES = 24
DEPTH = 0.8
"""Local patches are in this first fraction of the layers: later ones only write the decision out."""


RegionName = Literal["special", "instruction", "post_instruction"]


class TokenRow(Value):
    """A token with the activity of harm and of refusal features on it: the sum of their activations over what it is on
    refused harmful prompts."""

    text: str
    region: RegionName
    harm: float
    refusal: float


class Reading(Value):
    """What one prompt does to the model. Signals are those of `studies.gauge`: 1 is a refused harmful request."""

    name: Literal["prompt", "plain"]
    text: str
    tokens: tuple[TokenRow, ...]
    p_refuse: float
    harm: float
    refusal: float
    outcome: Outcome | None
    answer: str


class LevelRow(Value):
    """One harm or refusal feature: its level on the prompt, on the plain version, on refused harmful prompts and on
    answered harmless ones, in the SAE's units."""

    feature: FeatureField
    kind: Literal["harm", "refusal"]
    prompt: float
    plain: float | None
    harmful: float
    harmless: float


class WordRow(Value):
    """What changes when these words are left out, and what gradients say of the refusal signal's change, at the prompt
    itself (`gradient`) or on the way to it from no words (`ig`)."""

    words: str
    harm: float
    refusal: float
    p_refuse: float
    gradient: float = float("nan")
    ig: float = float("nan")


class RestoredRow(Value):
    """What becomes of the answer under a change."""

    what: str
    features: int
    p_refuse: float
    outcome: Outcome | None
    answer: str


class PatchRow(Value):
    """One patch of the local explanation (`method.local`)."""

    feature: FeatureField
    kind: Literal["harm", "refusal", "other"]
    token: str
    before: float
    value: float


class Explanation(StudyResult):
    """Why the model answers, or refuses, one prompt."""

    prompt: Reading
    plain: Reading | None
    harmless: tuple[float, float]
    """Harm and refusal signal of the harmless prompts that the features were chosen on, means."""
    levels: tuple[LevelRow, ...]
    words: tuple[WordRow, ...]
    changes: tuple[RestoredRow, ...]
    patches: tuple[PatchRow, ...] = ()
    run: str = ""

    def page(self) -> Page:
        """The explanation as sections, ready to be drawn."""
        from demur.studies.explain.sections import explain_sections

        study: Study[Any, Any] = Study("explain", FindConfig, Explanation, _cannot_run, explain_sections)
        return replace(page_of(study, self), command=f"demur explain {self.run} {self.prompt.text!r}")


def _cannot_run(context: Context[Any]) -> Explanation:
    raise InputError(
        f"an explanation is of one prompt; call demur.explain instead of running it in {context.run.folder}"
    )


def explain(run: str | Path, prompt: str, plain: str | None = None, *, progress: Progress | None = None) -> Explanation:
    """Explain one prompt with the features that a study found in the run folder `run`; the folder keeps what is
    computed, and `explain-HASH.json`. Raises RunError: no study of this folder found features; InputError: the prompt
    is empty, or what the study was given is no longer where it was.

    Args:
        run: folder of a finished `demur study`, or of another study that finds features.
        prompt: the message to explain.
        plain: the same request put plainly, to compare with.
        progress: called with (what is done, done, total).
    """
    from demur.studies.context import open_context

    for name, text in (("prompt", prompt), ("plain", plain)):
        if text is not None and not text.strip():
            raise InputError(f"the {name} is empty; give the message as the user would write it")
    config = _config(Path(run))
    study: Study[Any, Explanation] = Study("explain", type(config), Explanation, _cannot_run, lambda _: ())
    with open_context(study, config, Path(run), progress=progress) as context:
        result = context.completed(_explained(context, prompt, plain)).model_copy(update={"run": str(run)})
        context.judging.reader.close()
        context.run.save_result(f"{file_stem(prompt, plain)}.json", result.model_dump_json(indent=1))
    return result


def file_stem(prompt: str, plain: str | None) -> str:
    """The name of an explanation's files: the same prompt finds the same."""
    return f"explain-{hashlib.sha256(repr((prompt, plain)).encode()).hexdigest()[:8]}"


def _config(folder: Path) -> FindConfig:
    """The configuration of the latest session that found features there."""
    for session in reversed(read_run(folder).manifest.sessions):
        if session.command in STUDIES and session.finished is not None:
            kind = STUDIES[session.command].config
            if issubclass(kind, FindConfig):
                return kind.model_validate(session.config)
    raise RunError(f"no study that finds features has finished in {folder}; run `demur study --out {folder}` first")


def _explained(context: Context[Any], prompt: str, plain: str | None) -> Explanation:
    from demur.studies.gauge import Gauge
    from demur.studies.pipeline import find

    found = find(context, context.splits.choosing)
    context.watch_coherence([answer for each in found.clean.answers["tuning"] for answer in each.answers])
    gauge = Gauge.of(context, found)
    named = {"prompt": prompt} | ({} if plain is None else {"plain": plain})
    prompts = PromptSet(name="explained", prompts=tuple(Prompt(id=name, text=text) for name, text in named.items()))
    readings = _readings(context, gauge, prompts)
    items = dict(zip(prompts.ids, context.model.tokenize(prompts), strict=True))
    used = found.clean.used("selection")
    harmless = gauge.levels(used.harmless)
    patches, changes = _changes(context, found, gauge, items, readings)
    return Explanation(
        prompt=readings[0],
        plain=readings[1] if plain is not None else None,
        harmless=tuple(gauge.signals(harmless).mean(0).tolist()),
        levels=_levels(gauge, gauge.levels(prompts), harmless.mean(0)),
        words=_words(gauge, prompt),
        changes=changes,
        patches=patches,
    )


def _readings(context: Context[Any], gauge: Gauge, prompts: PromptSet) -> list[Reading]:
    from demur.model import Region

    regions: dict[Region, RegionName]
    regions = {Region.INSTRUCTION: "instruction", Region.POST_INSTRUCTION: "post_instruction"}
    items = context.model.tokenize(prompts)
    judged = context.answer("answers", prompts)
    split, sums = len(gauge.harm), (gauge.reference[: len(gauge.harm)].sum(), gauge.reference[len(gauge.harm) :].sum())
    found: list[Reading] = []
    signals, chances = gauge.read(prompts), gauge.p_refuse(prompts)
    for n, (item, values) in enumerate(zip(items, gauge.at_tokens(items), strict=True)):
        tokens = tuple(
            TokenRow(
                text=str(context.model.tokenizer.decode([token])),
                region=regions.get(Region(region), "special"),
                harm=float(row[:split].sum() / sums[0]) if sums[0] > 0 and Region(region) in regions else 0.0,
                refusal=float(row[split:].sum() / sums[1]) if sums[1] > 0 and Region(region) in regions else 0.0,
            )
            for token, region, row in zip(item.ids, item.regions, values, strict=True)
        )
        answer, verdict = judged.answers[n], judged.verdicts[n]
        found.append(
            Reading(
                name="plain" if n else "prompt",
                text=answer.prompt.text,
                tokens=tokens,
                p_refuse=float(chances[n]),
                harm=float(signals[n, 0]),
                refusal=float(signals[n, 1]),
                outcome=verdict.outcome,
                answer=answer.text,
            )
        )
    return found


def _levels(gauge: Gauge, levels: np.ndarray, harmless: np.ndarray) -> tuple[LevelRow, ...]:
    """Features by how much less active they are than on the plain version, or on refused prompts."""
    rows = [
        LevelRow(
            feature=feature,
            kind="harm" if feature in gauge.harm else "refusal",
            prompt=float(levels[0, n]),
            plain=float(levels[1, n]) if len(levels) > 1 else None,
            harmful=float(gauge.reference[n]),
            harmless=float(harmless[n]),
        )
        for n, feature in enumerate(gauge.features)
    ]
    return tuple(sorted(rows, key=lambda row: row.prompt - (row.harmful if row.plain is None else row.plain)))


def _words(gauge: Gauge, text: str) -> tuple[WordRow, ...]:
    """What leaving out each word does, those first that the refusal signal misses or gains most by."""
    from demur.studies.gauge import Parts, word_effects

    parts = Parts.of(text, WORDS)
    found = word_effects(gauge, {"prompt": parts})["prompt"]
    rows = [
        WordRow(words=words, harm=harm, refusal=refusal, p_refuse=chance, gradient=gradient, ig=ig)
        for words, (harm, refusal, chance), gradient, ig in zip(
            parts.words, found.left_out.tolist(), found.gradient.tolist(), found.ig.tolist(), strict=True
        )
    ]
    return tuple(sorted(rows, key=lambda row: -abs(row.refusal)))


def _changes(
    context: Context[Any], found: Found, gauge: Gauge, items: dict[str, TokenizedPrompt], readings: Sequence[Reading]
) -> tuple[tuple[PatchRow, ...], tuple[RestoredRow, ...]]:
    """The local explanation, and what restoring, or removing, features does to the answer."""
    from demur.method.interventions import PerPrompt, ScaleFeatures
    from demur.method.local import LocalSearch, hold_patches, transplant

    item, plain, reading = items["prompt"], items.get("plain"), readings[0]
    plain_refuses = readings[-1].p_refuse
    prompt = PromptSet(name="explained", prompts=(Prompt(id="prompt", text=reading.text),))

    def tried(what: str, features: int, change: Intervention) -> RestoredRow:
        judged: Change = (change,)
        answers = context.answer(what, prompt, judged)
        return RestoredRow(
            what=what,
            features=features,
            p_refuse=float(gauge.p_refuse(prompt, judged)[0]),
            outcome=answers.verdicts[0].outcome,
            answer=answers.answers[0].text,
        )

    def held(hold: HoldFeatures) -> Intervention:
        return PerPrompt({"prompt": (hold,)})

    if reading.p_refuse >= 0.5:
        sets = {"refusal features taken out": gauge.refusal, "harm features taken out": gauge.harm}
        sets["F* taken out"] = found.chosen.features
        return (), tuple(tried(what, len(f), ScaleFeatures(f, 0.0)) for what, f in sets.items() if f)
    rows = [
        tried(AS_REFUSED, len(gauge.refusal), held(_as_refused(gauge, found.clean.used("selection").harmful, item)))
    ]
    if plain is None or plain_refuses < 0.5:
        if plain is not None:
            context.warn(
                f"the plain version is not refused either (P(refuse) {plain_refuses:.2f}), so nothing of it can bring "
                "refusal back"
            )
        return (), tuple(rows)
    rows.append(
        tried(
            "all of F* as on the plain prompt",
            len(found.chosen),
            held(transplant(context.model, context.suite, plain, item, found.chosen.features)),
        )
    )
    layers = [n for n in context.suite.layers if n < DEPTH * context.model.n_layers]
    search = LocalSearch(context.model, context.suite, plain, item, found.clean.refusal_ids, layers)
    local = search.explain(limit=MAX_PATCHES, seed=context.config.seed)
    if local.patches:
        rows.append(tried(LOCAL, len(local.patches), held(hold_patches(local.patches, len(item)))))
    return tuple(_patch_row(context, gauge, item, patch) for patch in local.patches), tuple(rows)


def _patch_row(context: Context[Any], gauge: Gauge, item: TokenizedPrompt, patch: Patch) -> PatchRow:
    harm, refusal = patch.feature in gauge.harm, patch.feature in gauge.refusal
    return PatchRow(
        feature=patch.feature,
        kind="harm" if harm else "refusal" if refusal else "other",
        token=str(context.model.tokenizer.decode([item.ids[patch.token]])),
        before=patch.before,
        value=patch.value,
    )


AS_REFUSED, LOCAL = "refusal features as on refused prompts", "local patches"
"""What is restored."""


def _as_refused(gauge: Gauge, refused: PromptSet, item: TokenizedPrompt) -> HoldFeatures:
    """Refusal features at their mean on refused prompts, template token by template token after the message."""
    import torch

    from demur.method.interventions import HoldFeatures

    after, split = item.n_post_instruction, len(gauge.harm)
    known = gauge.at_tokens(gauge.work.model.tokenize(refused))
    means = torch.stack([values[len(values) - after :, split:] for values in known]).mean(0)
    values = torch.full((len(item), len(gauge.refusal)), torch.nan)
    values[len(item) - after :] = means
    return HoldFeatures(gauge.refusal, values)
