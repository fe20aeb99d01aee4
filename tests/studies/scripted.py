"""An experiment without a model: every answer and every side effect is written by hand.

The answers to a set of prompts are a word with one letter for each: `SAID` tells what the judge says of a letter. Which
word is meant is known by what changes the model: a method of these tests scales or sets a feature that is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from demur.capability import CapabilityRow
from demur.judges import Judge
from demur.method.attribution import Attribution, AttributionSpec, PromptAttribution
from demur.method.direction import Direction
from demur.method.interventions import ScaleFeatures, SetFeatures
from demur.method.selection import Pool
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.runs import Run
from demur.saes import Suite
from demur.stats import Estimate
from demur.studies import pipeline
from demur.studies.compare import run_comparison
from demur.studies.context import Change, Context, JudgedAnswers
from demur.studies.inputs import Inputs
from demur.studies.methods import METHODS, FeatureMethod, Method, RandomMatched
from demur.studies.pipeline import CleanAnswers, Found
from demur.studies.results import CompareResult, DirectionInfo, EstimatorRow, Knowledge, SideEffects
from demur.studies.side_effects import SideEffectMeter, SideInputs
from demur.types import (
    PURPOSES,
    Answer,
    Candidate,
    FeatureId,
    FeatureSet,
    Outcome,
    Prompt,
    PromptSet,
    RefusalToken,
    Split,
    Splits,
    Verdict,
)

SAID: dict[str, Outcome | None] = {
    "Y": Outcome.COMPLIANCE,
    "y": Outcome.COMPLIANCE,  # in other words
    "N": Outcome.REFUSAL,
    "P": Outcome.PARTIAL_REFUSAL,
    "X": Outcome.INCOHERENT,
    "?": None,
}
CLEAN = {
    "direction-harmful": "NNY", "direction-harmless": "YYN", "selection-harmful": "NNN", "selection-harmless": "YYY",
    "tuning-harmful": "NNNN", "tuning-harmless": "YYYN", "test-harmful": "NNNNPY", "test-harmless": "YYYYNPX",
    "over-refusal": "YNN",
}  # fmt: skip
POOL = tuple(FeatureId(layer, index) for layer, index in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)))


def prompt_set(name: str, n: int) -> PromptSet:
    label = "harmful" if name.endswith("-harmful") else "harmless"
    return PromptSet(
        name=name, prompts=tuple(Prompt(id=f"{name}-{k}", text=f"{name} {k}", label=label) for k in range(n))
    )


def judged(word: str, prompts: PromptSet) -> JudgedAnswers:
    answers = tuple(Answer(prompt=prompt, text=letter) for prompt, letter in zip(prompts, word, strict=True))
    return JudgedAnswers(answers, tuple(Verdict(outcome=SAID[letter], judge="by-hand") for letter in word))


def about(value: float, half: float = 0.001) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=10)


class ByHand(Judge):
    kind: ClassVar[str] = "by-hand"
    knows_incoherence: ClassVar[bool] = True

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        return [Verdict(outcome=SAID[answer.text], judge=self.name) for answer in answers]


class NoModel(ChatModel):
    device: Any = torch.device("cpu")

    def __init__(self) -> None: ...


class NoSaes(Suite):
    layers: Any = (0, 1)
    identity: Any = "none"

    def __init__(self) -> None:
        self._saes = {}


class Scripted(Context[Any]):
    """A context whose answers come from `script`: (prompt set, method, kind, strength) → word; where there is none, the
    clean one. `names`: features → method."""

    identity: Any = {"model": "none"}  # noqa: RUF012
    script: Mapping[tuple[str, str, str, float], str]
    words: Mapping[str, str]
    costs: Mapping[tuple[str, float], float]
    knows: Mapping[str, float]
    names: Mapping[tuple[FeatureId, ...], str]
    asked: list[tuple[str, str, str, float]]
    exact: list[PromptSet]
    """Prompts on which features were to be patched exactly."""
    steps: list[tuple[str, int, int]]
    """What was told of the progress."""

    def meaning(self, change: Change) -> tuple[str, str, float]:
        """Method, kind and strength."""
        if not change:
            return "none", "none", 1.0
        (only,) = change
        assert isinstance(only, ScaleFeatures | SetFeatures)
        if isinstance(only, ScaleFeatures):
            return self.names[only.features], "suppress", only.factor
        strength = only.value[0] if isinstance(only.value, tuple) else only.value
        return self.names[only.features], "induce", strength

    def answer(self, label: str, prompts: PromptSet, change: Change = ()) -> JudgedAnswers:
        self.progress(label, 1, 1)
        asked = (prompts.name, *self.meaning(change))
        self.asked.append(asked)
        return judged(self.script.get(asked, self.words[prompts.name]), prompts)


class Costs(SideEffectMeter):
    """Side effects of the script: ΔCE on own answers, twice that on texts, three times as KL."""

    work: Any

    def ce_answers(self, change: Change) -> Estimate:
        method, _, strength = self.work.meaning(change)
        return about(self.work.costs.get((method, strength), 0.0))

    def measure(self, change: Change) -> SideEffects:
        ce = self.ce_answers(change)
        texts = about(2 * ce.value) if self.texts else None
        return SideEffects(ce_answers=ce, ce_text=texts, kl=about(3 * ce.value))

    def knowledge(self, harmful: PromptSet, harmless: PromptSet, change: Change) -> Knowledge | None:
        assert (harmful.name, harmless.name) == ("test-harmful", "test-harmless")
        known = self.work.knows.get(self.work.meaning(change)[0])
        if known is None:
            return None
        return Knowledge(says_harmful=about(known), says_harmful_of_harmless=about(0.1), auroc=about(known, 0.05))

    def capability(self, change: Change) -> tuple[CapabilityRow, ...]:
        method = self.work.meaning(change)[0]
        return tuple(
            CapabilityRow(
                task=task, metric="acc", value=0.5, stderr=None, n=2, shots=0, higher_is_better=True, version="1",
                harness="0", digest="d", intervention=method, scores=(1.0, 0.0),
            )
            for task in self.options.tasks
        )  # fmt: skip


# -- methods -----------------------------------------------------------------------------------------------------------

OWN = FeatureId(5, 0)
ALONE, EACH = (FeatureId(5, 1),), (FeatureId(5, 2),)
DRAWN = tuple(FeatureId(6, n) for n in range(3))


def one_set(*features: FeatureId) -> FeatureSet:
    return FeatureSet(features=features, scores=(1.0,) * len(features), scope="global", method="by hand")


class Other(FeatureMethod):
    name, label = "other", "Other"

    def select(self, given: Any) -> FeatureSet:  # noqa: ARG002
        return one_set(OWN)


class Alone(Method):
    """Suppresses only."""

    name, label = "alone", "Alone"

    def suppress(self, sets: Any, strength: float, prompts: PromptSet) -> tuple[Change, ...]:  # noqa: ARG002
        return ((ScaleFeatures(ALONE, strength),),)


class OfEach(Alone):
    """Local sets of F*."""

    name, label, follows, local = "of-each", "Of each", "cossim+ap", True

    def suppress(self, sets: Any, strength: float, prompts: PromptSet) -> tuple[Change, ...]:  # noqa: ARG002
        return ((ScaleFeatures(EACH, strength),),)


class OfOther(OfEach):
    """Local sets of another method."""

    name, label, follows = "of-other", "Of other", "other"


class Drawn(RandomMatched):
    """A control of three sets."""

    name, label = "drawn", "Drawn"

    def draw(self, given: Any, seeds: Sequence[int]) -> tuple[FeatureSet, ...]:  # noqa: ARG002
        return tuple(one_set(DRAWN[n]) for n in range(len(seeds)))


class NoneLeft(Drawn):
    name, label = "none-left", "None left"

    def draw(self, given: Any, seeds: Sequence[int]) -> tuple[FeatureSet, ...]:  # noqa: ARG002
        return ()


NAMES: dict[tuple[FeatureId, ...], str] = {
    POOL[:2]: "cossim+ap", (OWN,): "other", ALONE: "alone", EACH: "of-each",
    **{(each,): f"drawn-{n}" for n, each in enumerate(DRAWN)},
    POOL[:1]: "size-1", POOL[:3]: "size-3", (*POOL[:3], POOL[4], POOL[3]): "size-5",
}  # fmt: skip


# -- what was found ----------------------------------------------------------------------------------------------------


def row(prompt: str, change: float, *totals: float) -> PromptAttribution:
    return PromptAttribution(
        prompt_id=prompt, target=5, clean=0.0, patched=change, explained=change, n_scored=2, totals=totals
    )


def attribution(*rows: PromptAttribution) -> Attribution:
    spec = AttributionSpec(
        method="gradient", steps=1, refusal_ids=(1,), allow_refusal_target=False, header_tokens=None, patch="p"
    )
    return Attribution(POOL, spec, rows)


def found(clean: Mapping[str, str], prompts: Mapping[str, PromptSet]) -> Found:
    """F* is the first two of five features. Of three prompts the last carries no signal."""
    candidate = Candidate(layer=1, position=-1, form="linear", bypass=-1.0, induce=1.0, kl=0.01, kept=True)
    answers = {
        purpose: (judged(clean[f"{purpose}-harmful"], prompts[f"{purpose}-harmful"]),
                  judged(clean[f"{purpose}-harmless"], prompts[f"{purpose}-harmless"]))
        for purpose in PURPOSES[:3]
    }  # fmt: skip
    return Found(
        clean=CleanAnswers(answers, (RefusalToken(token_id=1, text="N", share=1.0),)),
        direction=Direction(1, -1, "linear", torch.tensor([3.0, 4.0]), torch.zeros(2, 2), (candidate,)),
        pool=Pool(features=POOL, cosines=(0.5, 0.4, 0.3, 0.2, 0.1)),
        attribution=attribution(
            row("a", 1.0, 4.0, 3.0, 1.0, 0.0, 0.5), row("b", 1.0, 4.0, 1.0, 2.0, 0.0, 0.5),
            row("c", 0.0, 0.0, 1.0, 0.0, 5.0, 4.0),
        ),
        chosen=FeatureSet(features=POOL[:2], scores=(2.0, 1.0), scope="global", method="pool+gradient"),
    )  # fmt: skip


def prompts_of(words: Mapping[str, str]) -> dict[str, PromptSet]:
    """The prompts of which these are the clean answers, by the name of their set."""
    return {name: prompt_set(name, len(word)) for name, word in words.items()}


def context_of(
    run: Run,
    config: Any,
    words: Mapping[str, str] = CLEAN,
    script: Mapping[tuple[str, str, str, float], str] | None = None,
    *,
    model: ChatModel | None = None,
    suite: Suite | None = None,
) -> Scripted:
    """A context in a run folder, whose clean answers are `words`."""
    prompts = prompts_of(words)
    sides: dict[str, Any] = {
        name: Split(harmful=prompts[f"{name}-harmful"], harmless=prompts[f"{name}-harmless"]) for name in PURPOSES
    }
    saes = NoSaes() if suite is None else suite
    inputs = Inputs("scripted", "none", model or NoModel(), saes, Splits(**sides), ByHand())
    steps: list[tuple[str, int, int]] = []
    context = Scripted(config, inputs, run, lambda *step: steps.append(step))
    context.script, context.words, context.names, context.asked = script or {}, words, NAMES, []
    context.steps = steps
    return context


def scripted(
    out: Path,
    config: Any,
    script: Mapping[tuple[str, str, str, float], str],
    costs: Mapping[tuple[str, float], float] | None = None,
    *,
    clean: Mapping[str, str] | None = None,
    knows: Mapping[str, float] | None = None,
    texts: tuple[TokenizedPrompt, ...] = (),
    search: Any = None,
    estimators: tuple[EstimatorRow, ...] = (),
) -> tuple[CompareResult, Scripted]:
    """Run the experiment on such answers: its result, and the context with what was asked of it."""
    words = {**CLEAN, **(clean or {})}
    prompts = prompts_of(words)
    made = (Other, Alone, OfEach, OfOther, Drawn, NoneLeft)
    for method in made:
        METHODS.register(method.name, method())
    exact: list[PromptSet] = []

    def against_exact(_context: Any, _found: Any, refused: PromptSet) -> Any:
        exact.append(refused)
        return estimators, None

    def search_for(context: Any, _choosing: Any, config: Any, _methods: Any) -> Any:
        return search(context, config, found(words, prompts))

    with pytest.MonkeyPatch.context() as patch, Run.open(out, config={}) as run:
        patch.setattr("demur.studies.compare.SideEffectMeter", Costs)
        patch.setattr(SideInputs, "read", lambda *_: SideInputs(texts, prompts["over-refusal"]))
        patch.setattr("demur.studies.tuning.search", search_for)
        patch.setattr(pipeline, "compare_estimators", against_exact)
        patch.setattr(pipeline, "feature_rows", lambda *_: ())
        patch.setattr(pipeline, "direction_info", lambda _, each: DirectionInfo(
            chosen=each.direction.candidates[0], token="t", norm=5.0, candidates=each.direction.candidates
        ))  # fmt: skip
        context = context_of(run, config, words, script)
        context.costs, context.knows, context.exact = costs or {}, knows or {}, exact
        result = run_comparison(context, found(words, prompts))
    # A module's fixture outlives the test that first asks for it.
    for method in made:
        METHODS.unregister(method.name)
    return result, context


TEXT = TokenizedPrompt(prompt_id="text", ids=(1,), regions=(Region.RESPONSE,))


def outcomes(word: str) -> list[bool | None]:
    """Per letter: complied."""
    return [None if letter == "?" else letter in "Yy" for letter in word]


def refused(word: str) -> list[bool | None]:
    return [None if letter == "?" else letter in "NP" for letter in word]
