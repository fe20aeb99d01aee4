"""Judging within a run folder: verdicts are kept as they come, and no answer that has one is judged again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Final

from demur.errors import DemurError
from demur.judges._base import Judge, Usage, unscored
from demur.judges._judgement import Judgement
from demur.runs import Run, Stage
from demur.types import Answer, Value, Verdict

_STAGE: Final = "verdicts"
_ROWS: Final = "verdicts"

Progress = Callable[[str, int, int], None]
"""`(what, done, total)`."""


class StoredVerdict(Value):
    """One row of the stage. `key` is the hash of prompt and answer."""

    key: str
    verdict: Verdict


class CachedJudge:
    """A judge within a run folder, where its verdicts are kept: one stage per judge identity.

    Rows are stored as they come: a judge that streams loses what is under way when it is interrupted, any other at
    most 64 rows. Only final readings are stored, so an answer on which the judge failed is asked again by a later run,
    and is never taken for a score. A judge that had to stop is not asked again by this process.

    Args:
        run: the run folder.
        judge: whose verdicts.
        progress: called with (what, rows done, rows to do).
        keep: keep the verdicts (default: those of a judge that costs time or money; rules are quicker applied anew).
    """

    def __init__(self, run: Run, judge: Judge, progress: Progress | None = None, *, keep: bool | None = None) -> None:
        self.reader = judge
        self.new = 0
        """Verdicts reached by this process."""
        self.cached = 0
        """Verdicts that were known."""
        self._run = run
        self._progress = progress
        self._keep = judge.costly if keep is None else keep
        self._stage: Stage | None = None
        self._known: dict[str, Verdict] = {}
        self._failed: dict[str, Verdict] = {}
        self._problem: str | None = None

    def judge(self, answers: Sequence[Answer]) -> Judgement:
        """Verdicts on the answers; equal pairs of prompt and answer are judged once.

        Raises:
            RunError: the run folder cannot be read or written.
        """
        keys = [_key(answer) for answer in answers]
        if self._stage is None and self._keep and self._problem is None:
            self._open()
        unknown = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in self._known}
        before = len(self._known)
        if unknown and self._problem is None:
            self._ask(list(unknown), list(unknown.values()))
        new = len(self._known) - before
        judgement = self._judgement(keys, answers, new)
        self.new += new
        self.cached += judgement.cached
        return judgement

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

    @property
    def usage(self) -> Usage | None:
        """Requests, tokens and price of a judge behind an endpoint; None where nothing was asked."""
        return self.reader.usage

    def close(self) -> None:
        """Free what the judge holds."""
        self.reader.close()

    def _open(self) -> None:
        """Read the verdicts of this judge that are kept."""
        try:
            depends = {"judge": self.reader.identity}
        except DemurError as error:
            self._problem = str(error)
            return
        self._stage = self._run.stage(_STAGE, depends)
        self._known = {row.key: row.verdict for row in self._stage.rows(_ROWS, StoredVerdict)}

    def _ask(self, keys: Sequence[str], answers: Sequence[Answer]) -> None:
        """Let the judge read, and keep what it says as it comes."""
        readings = self.reader.stream(answers)
        done = 0
        while True:
            try:
                reading = next(readings, None)
            except DemurError as error:
                self._problem = str(error)
                return
            if reading is None:
                return
            key = keys[reading.row]
            if reading.final or not self.reader.costly:
                if self._stage is not None:
                    self._stage.append(_ROWS, StoredVerdict(key=key, verdict=reading.verdict))
                self._known[key] = reading.verdict
                self._failed.pop(key, None)
            else:
                self._failed[key] = reading.verdict
            done += 1
            if self._progress is not None:
                self._progress(f"judge {self.reader.name}", done, len(keys))

    def _judgement(self, keys: Sequence[str], answers: Sequence[Answer], new: int) -> Judgement:
        missing = unscored(self.reader.name, f"not judged: {self._problem or 'the judge left it out'}")
        for key in keys:
            if key not in self._known:
                self._failed.setdefault(key, missing)
        known = sum(key in self._known for key in keys)
        return Judgement(
            judge=self.reader.name,
            answers=tuple(answers),
            verdicts=tuple(self._known.get(key) or self._failed[key] for key in keys),
            new=new,
            cached=known - new,
            failed=len(keys) - known,
            problem=self._problem,
        )


def _key(answer: Answer) -> str:
    """SHA-256 of prompt and answer, hex."""
    return hashlib.sha256(json.dumps([answer.prompt.text, answer.text]).encode()).hexdigest()


__all__ = ["CachedJudge", "Progress"]
