"""What the steps of the features study share: its inputs, its run, and the clean model's answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demur.errors import ModelError
from demur.method.direction import find_refusal_tokens
from demur.model import TokenizedPrompt, fitting_threads, model_identity
from demur.runs import Run
from demur.studies._answers import Answering, Answers
from demur.studies._inputs import Inputs, load_inputs, with_paper_settings
from demur.studies._judging import Progress
from demur.studies.config import StudyConfig
from demur.studies.results import SplitSize
from demur.types import Outcome, PromptSet, RefusalToken, Split

# Below this share of refused harmful prompts there is no refusal to explain.
_MIN_REFUSAL = 0.05


@dataclass
class Study:
    """What the steps share."""

    config: StudyConfig
    inputs: Inputs
    run: Run
    progress: Progress
    identity: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    warnings: list[str] = field(default_factory=list[str])

    @classmethod
    @contextmanager
    def opened(cls, config: StudyConfig, out: Path, progress: Progress | None = None, *, kind: str) -> Iterator[Study]:
        """A study in the run folder `out`, with its inputs loaded and recorded there. `kind` is its command.

        Raises:
            DemurError: inputs that do not fit, or a folder that cannot be used.
        """
        config = with_paper_settings(config)
        with Run.open(out, config=config, command=kind, seeds={"study": config.seed}) as run:
            report: Progress = progress or (lambda _stage, _done, _total: None)
            report("loading", 0, 1)
            inputs = load_inputs(config)
            report("loading", 1, 1)
            study = cls(config, inputs, run, report, dict(model_identity(inputs.model)))
            run.record(
                inputs={
                    f"{purpose}/{label}": getattr(getattr(inputs.splits, purpose), label).digest
                    for purpose in ("direction", "selection", "tuning", "test")
                    for label in ("harmful", "harmless")
                },
                identities={"model": study.identity, "saes": {s.source: s.identity for s in inputs.suite.specs}},
            )
            with fitting_threads(inputs.model.device, inputs.model.n_parameters):
                yield study

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def rendered(self, prompts: PromptSet) -> list[TokenizedPrompt]:
        """A prompt set as tokens."""
        return self.inputs.model.tokenize(prompts)

    @property
    def depends(self) -> dict[str, Any]:
        return {"model": self.identity, "saes": self.inputs.suite.identity}


@dataclass(frozen=True)
class Baseline:
    """Answers of the clean model on every split, and what follows from them."""

    answers: dict[str, tuple[Answers, Answers]]
    """Split → answers to its harmful and its harmless prompts."""
    tokens: tuple[RefusalToken, ...]

    @classmethod
    def measure(cls, study: Study, answering: Answering) -> Baseline:
        answers: dict[str, tuple[Answers, Answers]] = {}
        for purpose in ("direction", "selection", "tuning", "test"):
            split: Split = getattr(study.inputs.splits, purpose)
            answers[purpose] = (
                answering.answer(f"baseline: {purpose}, harmful", split.harmful),
                answering.answer(f"baseline: {purpose}, harmless", split.harmless),
            )
        seen = [answers[purpose] for purpose in ("direction", "selection", "tuning")]
        harmful, harmless = Answers.joined([h for h, _ in seen]), Answers.joined([h for _, h in seen])
        _require_refusals(study, harmful, harmless)
        refusals = [
            generation.text
            for generation, verdict in zip(harmful.generations, harmful.verdicts, strict=True)
            if verdict.outcome is Outcome.REFUSAL
        ]
        others = [g.text for g, r in zip(harmless.generations, harmless.refused, strict=True) if r is False]
        found = cls(answers, find_refusal_tokens(study.inputs.model, refusals, others))
        for purpose in ("direction", "selection"):
            found._require_used(purpose)
        return found

    def used(self, purpose: str) -> Split:
        """Harmful prompts that the model refused and harmless ones that it did not: where the labels hold."""
        harmful, harmless = self.answers[purpose]
        return Split(harmful=harmful.only(lambda r: r is True), harmless=harmless.only(lambda r: r is False))

    def _require_used(self, purpose: str) -> None:
        used = self.used(purpose)
        if min(len(used.harmful), len(used.harmless)) < 2:
            raise ModelError(
                f"of the {purpose} prompts, {len(used.harmful)} harmful ones were refused and {len(used.harmless)} "
                f"harmless ones were not; at least 2 of each are needed. Give more prompts, or clearer ones"
            )

    @property
    def refusal_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    @property
    def sizes(self) -> tuple[SplitSize, ...]:
        rows: list[SplitSize] = []
        for purpose, (harmful, harmless) in self.answers.items():
            used = self.used(purpose)
            whole = purpose in ("tuning", "test")
            rows.append(
                SplitSize(
                    name=purpose,
                    harmful=len(harmful.prompts),
                    harmless=len(harmless.prompts),
                    # Strengths are tuned and effects measured on all prompts, whatever the model did with them.
                    used_harmful=len(harmful.prompts) if whole else len(used.harmful),
                    used_harmless=len(harmless.prompts) if whole else len(used.harmless),
                )
            )
        return tuple(rows)


def _require_refusals(study: Study, harmful: Answers, harmless: Answers) -> None:
    rate = harmful.refusal
    if rate.k < 2 or rate.value < _MIN_REFUSAL:
        shown = "\n".join(
            f"  {prompt.text[:70]!r} -> {generation.text[:70]!r} ({verdict.outcome or 'unscored'})"
            for prompt, generation, verdict in zip(
                harmful.prompts[:3], harmful.generations[:3], harmful.verdicts[:3], strict=True
            )
        )
        raise ModelError(
            f"{study.inputs.title} refused {rate.k} of {rate.n} harmful prompts ({rate.unscored} unscored by "
            f"the judge {study.inputs.judge.name!r}), so there is no refusal to explain. For example:\n{shown}\n"
            "Check that it is a chat model, that these prompts are harmful, and that the judge knows how it refuses"
        )
    over = harmless.refusal
    if over.n and over.value > 0.5:
        study.warnings.append(
            f"the model refused {over.k} of {over.n} harmless prompts, so the contrast between the classes is weak"
        )


__all__ = ["Baseline", "Study"]
