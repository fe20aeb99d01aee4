"""What a running study works with: its inputs, its run folder, and the model's judged answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Generic, TypeVar

from demur.errors import InputError
from demur.judges import CachedJudge, CoherentJudge
from demur.method.interventions import Compiled, Intervention, intervention_id
from demur.model import Budgets, ChatModel, answer_batches, fitting_threads, model_identity
from demur.runs import KindOf, Run
from demur.saes import Suite
from demur.stats import Estimate, rate_of
from demur.studies.base import ConfigT, ResultT, Study
from demur.studies.inputs import Inputs, load_inputs, with_paper_settings
from demur.types import PURPOSES, REFUSALS, Answer, Outcome, PromptSet, Splits, Take, Value, Verdict

KindT = TypeVar("KindT")
T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""`(what is done, done, total)`."""
Change = tuple[Intervention, ...]
"""What is done to the model: interventions that apply together."""


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers to one prompt set under one change, with a verdict on each, in the set's order."""

    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]

    def has(self, *outcomes: Outcome) -> tuple[bool | None, ...]:
        """Per prompt: the answer has one of these outcomes; None when unscored."""
        return tuple(None if v.outcome is None else v.outcome in outcomes for v in self.verdicts)

    @property
    def refused(self) -> tuple[bool | None, ...]:
        """Per prompt: refused, partly or wholly."""
        return self.has(*REFUSALS)

    @property
    def complied(self) -> tuple[bool | None, ...]:
        """Per prompt: complied, whatever a judge of harm says besides."""
        return self.has(Outcome.COMPLIANCE)

    @property
    def incoherent(self) -> tuple[bool | None, ...]:
        """Per prompt: neither refused nor complied, because the answer makes no sense."""
        return self.has(Outcome.INCOHERENT)

    @property
    def refusal(self) -> Estimate:
        return Estimate.of(rate_of(self.verdicts, REFUSALS))

    @property
    def compliance(self) -> Estimate:
        return Estimate.of(rate_of(self.verdicts, Outcome.COMPLIANCE))

    def matches(self, other: JudgedAnswers) -> tuple[bool, ...]:
        """Per prompt: exact match with the other's answer."""
        return tuple(a.text == b.text for a, b in zip(self.answers, other.answers, strict=True))

    def where(self, *outcomes: Outcome) -> tuple[Answer, ...]:
        """The answers with one of these outcomes."""
        return tuple(a for a, verdict in zip(self.answers, self.verdicts, strict=True) if verdict.outcome in outcomes)

    def only(self, *outcomes: Outcome) -> PromptSet:
        """The prompts whose answer has one of these outcomes."""
        return PromptSet(name="kept", prompts=tuple(answer.prompt for answer in self.where(*outcomes)))

    @classmethod
    def joined(cls, parts: Iterable[JudgedAnswers]) -> JudgedAnswers:
        """Answers to several prompt sets as one."""
        answers, verdicts = zip(*((part.answers, part.verdicts) for part in parts), strict=True)
        return cls(tuple(chain(*answers)), tuple(chain(*verdicts)))


class _Row(Value):
    """An answer as it is stored: the stage's key holds the prompts and the intervention."""

    prompt_id: str
    text: str
    finished: bool


@dataclass
class Workspace(Generic[ConfigT]):
    """Model, SAEs, judge and run folder, but no prompts: functions that choose something take their prompts beside it,
    as `ChoosingSplits`, and so cannot see a test prompt."""

    config: ConfigT
    inputs: Inputs
    run: Run
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    warnings: list[str] = field(default_factory=list[str])
    _written: dict[str, list[tuple[int, ...]]] = field(default_factory=dict[str, list[tuple[int, ...]]], repr=False)
    """By the prompt's text, tokens of the answers that it got so far, the latest last."""

    @property
    def model(self) -> ChatModel:
        return self.inputs.model

    @property
    def suite(self) -> Suite:
        return self.inputs.suite

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Content of the model, part of every key."""
        return dict(model_identity(self.model))

    @property
    def depends(self) -> dict[str, Any]:
        """The part of a stage's key that names model and SAEs."""
        return {"model": self.identity, "saes": self.suite.identity}

    @cached_property
    def judging(self) -> CachedJudge:
        """The outcome judge."""
        return CachedJudge(self.run, self.inputs.judge, self.progress)

    def watch_coherence(self, clean: Sequence[Answer]) -> None:
        """From here on, an answer that the clean model would not write is incoherent, whatever else the judge says. Its
        answers `clean`, to prompts that no result is measured on, set the limit."""
        if self.inputs.judge.knows_incoherence or self.inputs.judge.costly:
            return  # A judge that is a model reads broken text itself, and must not be paid twice for one answer.
        try:
            judge = CoherentJudge.of(self.inputs.judge, self.model, clean)
        except InputError as error:
            self.warn(f"answers were not checked for coherence by their likelihood: {error}")
            return
        self.judging = CachedJudge(self.run, judge, self.progress, keep=True)

    @cached_property
    def _fixed_batches(self) -> ChatModel:
        """The model, with the batch sizes with which the run folder began, whatever memory is free on resuming it."""
        depends = {"model": self.identity, "limit": self.config.max_batch_tokens}
        budgets = self.model.budgets
        kept = self.run.cached("budget", depends, tuple[int, int], lambda: (budgets.plain, budgets.gradients))
        self.model.budgets = Budgets(*kept)
        return self.model

    def answer(self, label: str, prompts: PromptSet, change: Change = ()) -> JudgedAnswers:
        """The model's answers to `prompts` under a change, judged; each written once per run folder. `label` is that of
        the progress bar."""
        limit, model = self.config.max_new_tokens, self._fixed_batches

        def compute(take: Take) -> Iterator[list[_Row]]:
            # Compiled only now: it reads the features' rows.
            compiled = Compiled(model, self.suite, change)
            options: dict[str, Any] = {"max_new_tokens": limit, "drafts": self._written, "take": take}
            for batch in answer_batches(model, prompts.prompts, compiled, **options):
                yield [_Row(prompt_id=each.prompt.id, text=each.text, finished=each.finished) for each in batch]

        depends = self.under(change) | {"prompts": prompts.digest, "max_new_tokens": limit}
        rows = self.run.mapped("answers", depends, _Row, prompts.ids, compute, progress=partial(self.progress, label))
        name = intervention_id(change)
        answers = tuple(
            Answer(prompt=prompt, text=row.text, intervention=name, finished=row.finished)
            for prompt, row in zip(prompts.prompts, rows, strict=True)
        )
        self._remember(answers)
        return JudgedAnswers(answers, self.judging.judge(answers).verdicts)

    def _remember(self, answers: Sequence[Answer]) -> None:
        """Keep answers, the latest last, as drafts of those that the same prompts get under other changes."""
        if answers:
            encoded = self.model.tokenizer([answer.text for answer in answers], add_special_tokens=False)["input_ids"]
            for answer, tokens in zip(answers, encoded, strict=True):
                draft = tuple(tokens)
                others = (each for each in self._written.get(answer.prompt.text, ()) if each != draft)
                self._written[answer.prompt.text] = [*others, draft]

    def cached(
        self, name: str, depends: dict[str, Any], kind: KindOf[KindT], compute: Callable[[], KindT], label: str = ""
    ) -> KindT:
        """A value of a type `kind` that is computed once per run folder, in the stage `name`; its key holds model, SAEs
        and `depends`, `label` is that of the progress bar (default: none)."""
        progress = partial(self.progress, label) if label else None
        return self.run.cached(name, self.depends | depends, kind, compute, progress=progress)

    def each(self, tasks: Iterable[Callable[[], T]], label: str = "") -> list[T]:
        """What the tasks give; processes that share the run share them out. `label` is that of the progress bar
        (default: none)."""
        asked, done = list(tasks), count(1)

        def told(task: Callable[[], T]) -> T:
            found = task()
            self.progress(label, next(done), len(asked))
            return found

        return self.run.each([partial(told, task) for task in asked] if label else asked)

    def under(self, change: Change) -> dict[str, Any]:
        """The part of a stage's key that names a change."""
        saes = self.suite.identity if change else None
        return {"model": self.identity, "saes": saes, "intervention": intervention_id(change)}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall-clock seconds of a part of the study to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def warn(self, text: str) -> None:
        """Note a reason to doubt the result, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    def on(self, inputs: Inputs) -> Workspace[ConfigT]:
        """A workspace with another model or other SAEs in the same run folder: keys name both, so stages are kept
        apart. Its warnings are its own."""
        return Workspace(self.config, inputs, self.run, self.progress, self.seconds)

    def trying(self, **changes: object) -> Workspace[ConfigT]:
        """This workspace with another configuration, its warnings and seconds kept apart: for settings that are only
        tried."""
        return replace(self, config=self.config.model_copy(update=changes), warnings=[], seconds={})


@dataclass
class Context(Workspace[ConfigT]):
    """What a study's `run` receives: the workspace, and the prompts in their four splits."""

    study: str = ""
    """Name of the study."""

    @property
    def splits(self) -> Splits:
        return self.inputs.splits

    @property
    def _coherence(self) -> str:
        """How incoherent answers are told, for people."""
        judge = self.judging.reader
        if not isinstance(judge, CoherentJudge):
            return ""
        rate = judge.coherence.false_positives
        return (
            f"; incoherent beyond {judge.coherence.worst_run:.1f} nats per token under the clean model, which calls "
            f"{rate.value:.0%} [{rate.low:.0%}–{rate.high:.0%}] of {rate.n} clean answers incoherent"
        )

    def completed(self, result: ResultT) -> ResultT:
        """A result with what every result says: model, facts, warnings, seconds."""
        if warning := self.judging.warning:
            self.warn(warning)
        known = {"study": self.study, "model": self.inputs.title, "seconds": dict(self.seconds)}
        warnings = tuple(dict.fromkeys((*result.warnings, *self.warnings)))
        return result.model_copy(update={**known, "facts": self.facts | result.facts, "warnings": warnings})

    @property
    def facts(self) -> dict[str, str]:
        """What is studied and with what, for people."""
        model, suite = self.model, self.suite
        levels = [spec.average_l0 for spec in suite.specs if spec.average_l0 is not None]
        level = f", average L0 {sum(levels) / len(levels):.0f}" if levels else ""
        dtype = str(model.dtype).removeprefix("torch.")
        sizes = (f"{name} {len(each.harmful)} + {len(each.harmless)}" for name, each in self.splits if name in PURPOSES)
        return {
            "model": f"{self.inputs.title}: {type(model.hf).__name__}, {model.n_layers} layers of {model.d_model}, "
            f"{model.n_parameters / 1e6:,.1f} M parameters, {dtype} on {model.device}",
            suite.noun: f"{self.inputs.saes_title}: {len(suite.layers)} layers of {suite.specs[0].d_sae:,} features, "
            f"{suite.specs[0].activation}{level}",
            "judge": self.judging.reader.name + self._coherence,
            "prompts (harmful + harmless)": ", ".join(sizes),
        }


@contextmanager
def open_context(
    study: Study[ConfigT, Any],
    config: ConfigT,
    out: Path,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
    **sharing: bool,
) -> Iterator[Context[ConfigT]]:
    """A study's context in the run folder `out`, its inputs loaded (unless given) and recorded there; `sharing` as in
    `run_study`. Raises DemurError: inputs that do not fit, or a folder that cannot be used."""
    config = with_paper_settings(config)
    report: Progress = progress or (lambda _what, _done, _total: None)
    with Run.open(out, config=config, command=study.name, seeds={study.name: config.seed}, **sharing) as run:
        if inputs is None:
            report("loading", 0, 1)
            inputs = load_inputs(config, study.check)
            report("loading", 1, 1)
        study.check(inputs.suite)
        context = Context(config, inputs, run, report, warnings=list(inputs.warnings), study=study.name)
        run.record(
            inputs={
                f"{purpose}/{label}": prompts.digest
                for purpose, split in inputs.splits
                if purpose in PURPOSES
                for label, prompts in split
            },
            identities={
                "model": context.identity,
                "saes": {s.source: s.identity for s in inputs.suite.specs},
                "before": {name: context.on(each).identity for name, each in inputs.before.items()},
            },
        )
        with fitting_threads(inputs.model.device, inputs.model.n_parameters):
            yield context


def run_study(
    study: Study[ConfigT, ResultT],
    config: ConfigT,
    out: Path,
    *,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
    shared: bool = False,
    join: bool = False,
) -> ResultT:
    """Run a study, or resume it, in the folder `out`, and write its result there as `NAME.json`. Raises DemurError:
    inputs that do not fit; nothing computed before is lost.

    Args:
        config: the study's options; without a model, on the bundled one.
        out: run folder, made if missing. Studies of one model may share it, and then share what they compute.
        inputs: model, SAEs, prompts and judge, where they are at hand (default: loaded as `config` says).
        progress: called with (what is done, done, total).
        shared: other processes may join this one, with the same study and configuration; each does a part of the work.
        join: where another process runs this very study in `out`, join it; it alone writes the result there.
    """
    with open_context(study, config, out, inputs, progress, shared=shared, join=join) as context:
        try:
            result = context.completed(study.run(context))
        finally:
            context.judging.reader.close()
        context.run.save_result(study.file, result.model_dump_json(indent=1))
    return result
