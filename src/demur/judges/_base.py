"""What a judge is: verdicts on answers, and an identity that says what they depend on."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from demur.errors import DemurError, InputError
from demur.types import Answer, Verdict

CHUNK = 64
"""Answers that a judge without a stream is given at once, and that an interruption loses."""


@dataclass(frozen=True)
class Usage:
    """Requests made, tokens read and written by the model, and their price where prices are known."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None

    def __add__(self, other: Usage) -> Usage:
        costs = [each.cost for each in (self, other) if each.cost is not None]
        requests, read = self.requests + other.requests, self.tokens_in + other.tokens_in
        return Usage(requests, read, self.tokens_out + other.tokens_out, sum(costs) if costs else None)

    def __bool__(self) -> bool:
        return self.requests > 0

    def __str__(self) -> str:
        text = f"{self.requests} requests, {self.tokens_in} tokens in, {self.tokens_out} out"
        return text if self.cost is None else f"{text}, cost {self.cost:.4f}"


class Reading(NamedTuple):
    """A verdict as soon as it is reached. `final` is False where the judge failed on the row: it may be asked again."""

    row: int
    verdict: Verdict
    final: bool


class JudgeStopped(DemurError):
    """A judge cannot go on at all: access refused, no server, no such model. `verdicts`: those reached before, one per
    row, the other rows unscored; empty when raised by `stream`."""

    def __init__(self, message: str, verdicts: Sequence[Verdict] = ()) -> None:
        super().__init__(message)
        self.verdicts = tuple(verdicts)


class Judge(ABC):
    """Reads answers. A judge that cannot tell says so (`outcome` and `harmful` None); it never guesses. A subclass says
    its `kind` and defines `judge`; the rest has defaults that fit a judge made of rules."""

    kind: ClassVar[str]
    """The name by which it is asked for (`--judge`)."""
    gives: ClassVar[tuple[str, ...]] = ("outcome",)
    """The fields that its verdicts state: outcome, harmful, score."""
    needs: ClassVar[Literal["nothing", "model", "endpoint"]] = "nothing"
    """What it is made with: nothing, `(source, placement)` of a model that runs here, or `(model, endpoint)`."""
    costly: ClassVar[bool] = False
    """Its verdicts cost time or money, and are kept."""
    knows_incoherence: ClassVar[bool] = False
    """It tells broken text by itself, so that no likelihood needs to be looked at besides."""

    @property
    def name(self) -> str:
        """Recorded in every verdict."""
        return self.kind

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that a verdict depends on, as JSON data without secrets; equal identities may share a cache. Here:
        kind and source of the judge's module. Raises InputError: it has no source file (a notebook cell)."""
        try:
            return {"kind": self.kind, "rules": rules_digest(Path(inspect.getfile(type(self))))}
        except (OSError, TypeError) as error:
            raise InputError(
                f"the judge {self.kind!r} has no source file to tell its versions apart; define its `identity`, for "
                'example {"kind": "mine", "version": 1}'
            ) from error

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict per answer, in order."""

    def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]:
        """One reading per answer, in any order, each as soon as it is reached. Raises DemurError: no further answer can
        be judged; the readings given so far hold."""
        for start in range(0, len(answers), CHUNK):
            try:
                verdicts, stopped = self.judge(answers[start : start + CHUNK]), None
            except JudgeStopped as error:
                verdicts, stopped = error.verdicts, error
            for row, verdict in enumerate(verdicts, start):
                # A row without a verdict when the judge stopped may not have been reached: no failure of its own.
                if stopped is None or verdict.success is not None:
                    yield Reading(row, verdict, final=verdict.success is not None)
            if stopped is not None:
                raise stopped

    def check(self) -> None:  # noqa: B027 - a judge made of rules has nothing to try
        """Try whether this judge can judge, before anything starts. Raises DemurError: it cannot; says what to do."""

    def close(self) -> None:  # noqa: B027 - nor anything to free
        """Free what it holds. It may judge again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def usage(self) -> Usage | None:
        """Requests, tokens and price so far; None where nothing was asked of an endpoint."""
        return None


class StreamingJudge(Judge):
    """Base of the judges that cost time or money: each verdict is given as soon as it is reached, and kept."""

    costly: ClassVar[bool] = True

    @abstractmethod
    def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]: ...

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        """One verdict per answer, in order; unscored, with the reason as evidence, where the judge failed on it. Raises
        JudgeStopped: no answer can be judged any more; carries the verdicts reached."""
        found: dict[int, Verdict] = {}
        try:
            found.update((reading.row, reading.verdict) for reading in self.stream(answers))
        except JudgeStopped as error:
            missing = unscored(self.name, f"not judged: {error}")
            raise JudgeStopped(str(error), [found.get(row, missing) for row in range(len(answers))]) from error
        return [found[row] for row in range(len(answers))]


def unscored(judge: str, reason: str) -> Verdict:
    """The verdict of a judge that reached none, with the reason."""
    return Verdict(outcome=None, judge=judge, evidence=without_surrogates(reason))


def without_surrogates(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold, but neither files nor tokenizers take."""
    return text.encode("utf-8", "replace").decode()


@cache
def rules_digest(*sources: Path) -> str:
    """SHA-256 over the code of a judge without a model, hex: its rules are what its verdicts depend on."""
    # A checkout may have other line ends.
    return hashlib.sha256(b"".join(path.read_bytes().replace(b"\r\n", b"\n") for path in sources)).hexdigest()


@cache
def published(name: str) -> str:
    """The text of `formats/NAME.txt`: what a judge is shown, exactly as its authors published it, with its holes."""
    return (Path(__file__).parent / "formats" / f"{name}.txt").read_bytes().decode()


def text_digest(*texts: str) -> str:
    """SHA-256 over texts, hex, each ended by a zero byte."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()
