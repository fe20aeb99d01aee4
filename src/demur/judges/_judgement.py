"""Judges by name, and what one says of answers: at once, or in a run folder that keeps the verdicts as they come."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from demur.errors import DemurError, InputError, RunError
from demur.judges._base import Judge, unscored
from demur.judges._classifier import Placement
from demur.judges._endpoint import Endpoint
from demur.registry import Registry
from demur.runs import RowReader, Run, Stage
from demur.stats import rate_of, wilson
from demur.types import REFUSALS, Answer, Outcome, Rate, Value, Verdict

if TYPE_CHECKING:
    import pandas as pd

JUDGES: Registry[type[Judge]] = Registry(
    "demur.judges",
    "judge",
    {
        "patterns": "demur.judges._patterns:PatternJudge",
        "harmbench": "demur.judges._classifier:HarmBenchJudge",
        "wildguard": "demur.judges._classifier:WildGuardJudge",
        "llama-guard-3": "demur.judges._classifier:LlamaGuardJudge",
        "llama-guard-4": "demur.judges._classifier:LlamaGuard4Judge",
        "strongreject": "demur.judges._endpoint:StrongRejectJudge",
        "refusal": "demur.judges._endpoint:RefusalJudge",
    },
)
"""Kind → class. `needs` says what a class is made with, `gives` what its verdicts state."""


def get_judge(name: str, *, placement: Placement | None = None, endpoint: Endpoint | None = None) -> Judge:
    """The judge called `name`: a kind, or KIND=MODEL (a hub id or folder, or a model's name at an endpoint).

    Nothing is loaded or asked yet; `Judge.check` tries it. `placement` is for judges whose model runs here, `endpoint`
    for those that ask one (default: from the environment). Raises InputError: there is no such kind, a model is missing
    or named where none is taken, or `placement` or `endpoint` is of no use to it.
    """
    kind, equals, model = name.partition("=")
    make: Any = JUDGES[kind]
    if equals and not model:
        raise InputError(f"judge {name!r} names no model after '='")
    if placement is not None and make.needs != "model":
        raise InputError(f"the judge {kind!r} has no model that runs here: device, dtype and revision are not for it")
    if endpoint is not None and make.needs != "endpoint":
        raise InputError(f"the judge {kind!r} asks no endpoint: its address, pace and prices are not for it")
    if model and make.needs == "nothing":
        raise InputError(f"the judge {kind!r} takes no model; leave out {equals + model!r}")
    if not model and make.needs == "endpoint":
        raise InputError(f"the judge {kind!r} needs a model: {kind}=MODEL, for example {kind}=gpt-4o-mini")
    made: Judge = make(*{"nothing": (), "model": (model or None, placement), "endpoint": (model, endpoint)}[make.needs])
    return made


_STAGE: Final = "verdicts"

Progress = Callable[[str, int, int], None]
"""`(what, done, total)`."""


class Judgement(Value):
    """Answers with one verdict each, and the rates that they make. Every rate has its Wilson 95 % interval; answers
    without a verdict are its `unscored`, outside `n`."""

    judge: str
    answers: tuple[Answer, ...]
    verdicts: tuple[Verdict, ...]
    """One per answer, in order; unscored, with the reason as evidence, where the judge failed."""
    new: int = 0
    """Answers that the judge read this time."""
    cached: int = 0
    """Answers whose verdict was known: read earlier, or equal to another answer."""
    failed: int = 0
    """Answers on which the judge failed; a later run asks for them again."""
    problem: str | None = None
    """Why judging broke off; None when it did not."""

    @property
    def unscored(self) -> int:
        """Answers without a verdict."""
        return sum(verdict.success is None for verdict in self.verdicts)

    @property
    def refusal(self) -> Rate:
        """Share of answers that refuse, in full or in part."""
        return rate_of(self.verdicts, REFUSALS)

    @property
    def compliance(self) -> Rate:
        """Share of answers that comply."""
        return rate_of(self.verdicts, Outcome.COMPLIANCE)

    @property
    def incoherent(self) -> Rate:
        """Share of answers that are no coherent text."""
        return rate_of(self.verdicts, Outcome.INCOHERENT)

    @property
    def harmful(self) -> Rate:
        """Share of answers that give what a harmful request asks for; by judges that say so."""
        scored = [verdict.harmful for verdict in self.verdicts if verdict.harmful is not None]
        return wilson(sum(scored), len(scored), unscored=len(self.verdicts) - len(scored))

    def to_frame(self) -> pd.DataFrame:
        """One row per answer: prompt id, prompt, label, intervention, answer, outcome, harmful, score, evidence. Raises
        InputError: pandas is not installed."""
        try:
            import pandas as pd
        except ImportError as error:
            raise InputError("a table of verdicts needs pandas: pip install pandas") from error
        return pd.DataFrame(
            {
                "prompt_id": answer.prompt.id,
                "prompt": answer.prompt.text,
                "label": answer.prompt.label,
                "intervention": answer.intervention,
                "answer": answer.text,
                **verdict.model_dump(mode="json", exclude={"judge"}),
            }
            for answer, verdict in zip(self.answers, self.verdicts, strict=True)
        )

    def __str__(self) -> str:
        named = {"refusal": self.refusal, "compliance": self.compliance, "incoherent": self.incoherent}
        if not self.refusal.n:
            named = {"harmful": self.harmful}
        said = ", ".join(f"{name} {rate.value:.0%} [{rate.low:.0%}–{rate.high:.0%}]" for name, rate in named.items())
        return f"{len(self.verdicts)} answers: {said}"


def opened(judge: str | Judge) -> AbstractContextManager[Judge]:
    """The judge; one that is asked for by its name is freed at the end."""
    return get_judge(judge) if isinstance(judge, str) else nullcontext(judge)


def judge(answers: Iterable[Answer], judge: str | Judge = "patterns") -> Judgement:
    """Judge answers, from `ChatModel.generate` or made by hand; `judge` is one, or its name (`get_judge`). Raises
    InputError: there is no judge of that name; JudgeStopped: it cannot go on; carries the verdicts reached."""
    given = tuple(answers)
    with opened(judge) as reader:
        verdicts = tuple(reader.judge(given))
    failed = sum(verdict.success is None for verdict in verdicts) if reader.costly else 0
    return Judgement(judge=reader.name, answers=given, verdicts=verdicts, new=len(given), failed=failed)


class StoredVerdict(Value):
    """One row of the stage. `key` is the hash of prompt and answer."""

    key: str
    verdict: Verdict


class CachedJudge:
    """A judge within a run folder, where its verdicts are kept: one stage per judge identity.

    Rows are stored as they come: an interruption loses what is under way, of a judge that does not stream at most 64
    rows. Only final readings are stored, so an answer on which the judge failed is asked again by a later run, and is
    never taken for a score. A judge that had to stop is not asked again by this process.

    Args:
        run: the run folder.
        judge: whose verdicts.
        progress: called with (what, rows done, rows to do) where the judge costs time or money.
        keep: keep the verdicts (default: those of a judge that costs time or money; rules are quicker applied anew).
    """

    def __init__(self, run: Run, judge: Judge, progress: Progress | None = None, *, keep: bool | None = None) -> None:
        self.reader = judge
        self.new = 0
        """Verdicts reached by this process."""
        self.cached = 0
        """Verdicts that were known."""
        self._run = run
        self._progress = progress if judge.costly else None
        self._keep = judge.costly if keep is None else keep
        self._stage: Stage | None = None
        self._rows: RowReader[StoredVerdict] | None = None
        self._known: dict[str, Verdict] = {}
        self._failed: dict[str, Verdict] = {}
        self._problem: str | None = None

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        """Verdicts on the answers; equal pairs of prompt and answer are judged once. Raises RunError: the run folder
        cannot be read or written."""
        keys, before = [_key(answer) for answer in answers], self.new
        if self._problem is None:
            try:
                self._ask(dict(zip(keys, answers, strict=True)))
            except RunError:  # The folder's trouble, not the judge's.
                raise
            except DemurError as error:
                self._problem = str(error)
        missing = unscored(self.reader.name, f"not judged: {self._problem or 'the judge left it out'}")
        failed = [key for key in keys if key not in self._known]
        self._failed = dict.fromkeys(failed, missing) | self._failed
        new, known = self.new - before, len(keys) - len(failed)
        self.cached += known - new
        return Judgement(
            judge=self.reader.name,
            answers=tuple(answers),
            verdicts=tuple(self._known.get(key) or self._failed[key] for key in keys),
            new=new,
            cached=known - new,
            failed=len(failed),
            problem=self._problem,
        )

    def _ask(self, answers: Mapping[str, Answer]) -> None:
        """Let the judge read what it has not read before, and keep what it says as it comes."""
        if self._keep and self._rows is None:
            self._stage = self._run.stage(_STAGE, {"judge": self.reader.identity})
            self._rows = RowReader(self._stage, _STAGE, StoredVerdict)
        self._read()
        if self._stage is None or answers.keys() <= self._known.keys():
            self._judge(answers)
            return
        with self._run.alone(self._stage):
            self._read()  # Another process may have asked meanwhile.
            self._judge(answers)

    def _read(self) -> None:
        """Take in what is stored."""
        if self._rows is not None:
            self._known |= {row.key: row.verdict for row in self._rows.new()}

    def _judge(self, answers: Mapping[str, Answer]) -> None:
        unknown = {key: answer for key, answer in answers.items() if key not in self._known}
        keys = list(unknown)
        for done, reading in enumerate(self.reader.stream(list(unknown.values())) if unknown else (), 1):
            key = keys[reading.row]
            if reading.final or not self.reader.costly:
                if self._stage is not None:
                    self._stage.append(_STAGE, StoredVerdict(key=key, verdict=reading.verdict))
                self._known[key] = reading.verdict
                self._failed.pop(key, None)
                self.new += 1
            else:
                self._failed[key] = reading.verdict
            if self._progress is not None:
                self._progress(f"judge {self.reader.name}", done, len(keys))

    @property
    def warning(self) -> str | None:
        """What a report must say of a judge that failed; None where it did not."""
        if not self._failed and self._problem is None:
            return None
        why = self._problem or "the verdicts in the run folder say why"
        return (
            f"the judge {self.reader.name} failed on {len(self._failed)} answers, which count as unscored, never as a "
            f"score ({why}); run the same command again to ask for them anew"
        )


def _key(answer: Answer) -> str:
    return hashlib.sha256(json.dumps([answer.prompt.text, answer.text]).encode()).hexdigest()
