"""Verdicts in run folders: nothing judged is judged again, nothing that failed becomes a score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from loopback import Reply, Request, loopback
from pairs import pairs

from demur.errors import ModelError, RunError
from demur.judges import CachedJudge, Judge, JudgeStopped, PatternJudge, Reading, RefusalJudge, WildGuardJudge
from demur.runs import Run, read_run
from demur.types import Answer, Outcome, Verdict

PROMPTS = [f"prompt {n}" for n in range(200)]
ANSWERS = [f"answer {n}" for n in range(200)]


class Counting(Judge):
    """Says compliance, row by row or in chunks, and counts what it was asked. Fails where it is told to."""

    kind: ClassVar[str] = "counting"
    costly: ClassVar[bool] = True

    def __init__(self, *, version: int = 1, fails: Sequence[str] = (), stops_at: str | None = None) -> None:
        self.asked: list[str] = []
        self.fails = set(fails)
        self.stops_at = stops_at
        self._version = version

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "counting", "version": self._version}

    def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
        found: list[Verdict] = []
        for answer in answers:
            if answer.text == self.stops_at:
                raise JudgeStopped("the server is gone", found)
            self.asked.append(f"{answer.prompt.text}|{answer.text}")
            outcome = None if answer.text in self.fails else Outcome.COMPLIANCE
            found.append(Verdict(outcome=outcome, judge=self.name, evidence=answer.text))
        return found


class Streamed(Counting):
    """The same, with a stream that may be interrupted."""

    def __init__(self, *, interrupted_after: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.interrupted_after = interrupted_after

    def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]:
        for row in reversed(range(len(answers))):
            if self.interrupted_after is not None and len(self.asked) == self.interrupted_after:
                raise KeyboardInterrupt
            (verdict,) = self.judge([answers[row]])
            yield Reading(row, verdict, final=verdict.success is not None)


def opened(folder: Path) -> Run:
    return Run.open(folder / "run", config={})


@pytest.mark.parametrize("cls", [Counting, Streamed])
def test_rows_are_judged_once_over_calls_and_sessions(cls: type[Counting], tmp_path: Path) -> None:
    first, second = cls(), cls()
    with opened(tmp_path) as run:
        judged = CachedJudge(run, first, keep=True).judge(pairs(PROMPTS[:100], ANSWERS[:100]))
        again = CachedJudge(run, first, keep=True).judge(pairs(PROMPTS[50:150], ANSWERS[50:150]))
    with opened(tmp_path) as run:
        resumed = CachedJudge(run, second, keep=True).judge(pairs(PROMPTS[:150], ANSWERS[:150]))
    assert (judged.new, judged.cached, judged.unscored, judged.failed, judged.problem) == (100, 0, 0, 0, None)
    assert (again.new, again.cached) == (50, 50)
    assert (resumed.new, resumed.cached) == (0, 150)
    assert len(first.asked) == len(set(first.asked)) == 150
    assert second.asked == []
    assert [v.evidence for v in resumed.verdicts] == ANSWERS[:150]


def test_equal_pairs_are_judged_once_and_pairs_are_told_apart(tmp_path: Path) -> None:
    judge = Counting()
    with opened(tmp_path) as run:
        judged = CachedJudge(run, judge, keep=True).judge(
            pairs(["a", "a", "b", "a", "ab", "a"], ["x", "x", "x", "y", "c", "bc"])
        )
    assert judge.asked == ["a|x", "b|x", "a|y", "ab|c", "a|bc"]
    assert [v.evidence for v in judged.verdicts] == ["x", "x", "x", "y", "c", "bc"]
    assert (judged.new, judged.cached) == (5, 1)


def test_an_interruption_of_a_stream_loses_nothing_that_was_given(tmp_path: Path) -> None:
    first = Streamed(interrupted_after=70)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        CachedJudge(run, first, keep=True).judge(pairs(PROMPTS, ANSWERS))
    second = Streamed()
    with opened(tmp_path) as run:
        judged = CachedJudge(run, second, keep=True).judge(pairs(PROMPTS, ANSWERS))
    assert (judged.cached, judged.new) == (70, 130)
    assert set(first.asked).isdisjoint(second.asked)
    assert [v.evidence for v in judged.verdicts] == ANSWERS


def test_an_interruption_of_another_judge_loses_a_chunk_at_most(tmp_path: Path) -> None:
    class Interrupted(Counting):
        def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
            if len(self.asked) >= 128:
                raise KeyboardInterrupt
            return super().judge(answers)

    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as run:
        CachedJudge(run, Interrupted(), keep=True).judge(pairs(PROMPTS, ANSWERS))
    second = Counting()
    with opened(tmp_path) as run:
        assert CachedJudge(run, second, keep=True).judge(pairs(PROMPTS, ANSWERS)).cached == 128
    assert len(second.asked) == 72


def test_a_line_that_a_kill_tore_is_judged_again(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        CachedJudge(run, Counting(), keep=True).judge(pairs(PROMPTS[:10], ANSWERS[:10]))
    (stage,) = read_run(tmp_path / "run").stages("verdicts")
    path = stage.folder / "verdicts.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    judge = Counting()
    with opened(tmp_path) as run:
        judged = CachedJudge(run, judge, keep=True).judge(pairs(PROMPTS[:10], ANSWERS[:10]))
    assert len(judge.asked) == 1
    assert [v.evidence for v in judged.verdicts] == ANSWERS[:10]


@pytest.mark.parametrize("cls", [Counting, Streamed])
def test_rows_that_failed_are_asked_again_and_only_they(cls: type[Counting], tmp_path: Path) -> None:
    failing = [ANSWERS[3], ANSWERS[90]]
    with opened(tmp_path) as run:
        first = CachedJudge(run, cls(fails=failing), keep=True).judge(pairs(PROMPTS[:100], ANSWERS[:100]))
    second_judge = cls()
    with opened(tmp_path) as run:
        second = CachedJudge(run, second_judge, keep=True).judge(pairs(PROMPTS[:100], ANSWERS[:100]))
    assert (first.new, first.unscored, first.failed, first.problem) == (98, 2, 2, None)
    assert [n for n, v in enumerate(first.verdicts) if v.success is None] == [3, 90]
    assert sorted(second_judge.asked) == sorted(f"prompt {n}|answer {n}" for n in (3, 90))
    assert (second.new, second.cached, second.unscored) == (2, 98, 0)


def test_a_final_reading_without_a_verdict_is_not_asked_for_again(tmp_path: Path) -> None:
    class Decided(Streamed):
        def stream(self, answers: Sequence[Answer]) -> Iterator[Reading]:
            for reading in super().stream(answers):
                yield reading._replace(final=True)

    with opened(tmp_path) as run:
        first = CachedJudge(run, Decided(fails=[ANSWERS[1]]), keep=True).judge(pairs(PROMPTS[:3], ANSWERS[:3]))
        judge = Decided()
        second = CachedJudge(run, judge, keep=True).judge(pairs(PROMPTS[:3], ANSWERS[:3]))
    assert (first.unscored, first.failed, second.unscored, second.failed) == (1, 0, 1, 0)
    assert judge.asked == []


@pytest.mark.parametrize(("cls", "done"), [(Counting, 66), (Streamed, 133)])
def test_what_was_judged_before_the_judge_stopped_is_kept(cls: type[Counting], done: int, tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        first = CachedJudge(run, cls(stops_at=ANSWERS[66]), keep=True).judge(pairs(PROMPTS, ANSWERS))
    assert first.problem == "the server is gone"
    assert (first.new, first.unscored, first.failed) == (done, 200 - done, 200 - done)
    assert first.verdicts[66].evidence == "not judged: the server is gone"
    judge = cls()
    with opened(tmp_path) as run:
        second = CachedJudge(run, judge, keep=True).judge(pairs(PROMPTS, ANSWERS))
    assert (second.problem, second.unscored, second.cached) == (None, 0, done)
    assert len(judge.asked) == 200 - done


def test_a_judge_that_is_not_there_is_a_problem_and_no_score(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        judged = CachedJudge(run, WildGuardJudge(tmp_path / "nowhere"), keep=True).judge(pairs(["a"], ["b"]))
    assert judged.problem is not None
    assert "cannot load the judge" in judged.problem
    assert (judged.new, judged.unscored, judged.verdicts[0].success) == (0, 1, None)


def test_a_judge_that_breaks_while_it_judges_is_a_problem(tmp_path: Path) -> None:
    class Broken(Counting):
        def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
            raise ModelError(f"the weights are damaged: {len(answers)} asked")

    with opened(tmp_path) as run:
        judged = CachedJudge(run, Broken(), keep=True).judge(pairs(["a"], ["b"]))
    assert (judged.problem, judged.failed) == ("the weights are damaged: 1 asked", 1)


def test_a_run_folder_that_cannot_be_read_is_no_judge_problem(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        CachedJudge(run, Counting(), keep=True).judge(pairs(["a"], ["b"]))
        (folder,) = (tmp_path / "run" / "stages").glob("verdicts-*")
    (folder / "verdicts.jsonl").write_text('{"key": 1}\n')
    with opened(tmp_path) as run, pytest.raises(RunError, match=r"line 1: not a StoredVerdict"):
        CachedJudge(run, Counting(), keep=True).judge(pairs(["a"], ["b"]))


def test_judges_of_other_identities_do_not_share_verdicts(tmp_path: Path) -> None:
    one, two = Counting(version=1), Counting(version=2)
    with opened(tmp_path) as run:
        CachedJudge(run, one, keep=True).judge(pairs(PROMPTS[:5], ANSWERS[:5]))
        CachedJudge(run, two, keep=True).judge(pairs(PROMPTS[:5], ANSWERS[:5]))
        CachedJudge(run, PatternJudge(), keep=True).judge(pairs(PROMPTS[:5], ANSWERS[:5]))
    assert len(one.asked) == len(two.asked) == 5
    assert len(read_run(tmp_path / "run").stages("verdicts")) == 3


def test_many_calls_read_each_stored_verdict_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from demur.runs import Stage

    reads = list[bytes]()
    real = Stage.parse

    def parse(self: Stage, path: Path, kind: Any, data: bytes, where: str = "") -> Any:
        reads.append(data)
        return real(self, path, kind, data, where)

    monkeypatch.setattr(Stage, "parse", parse)
    judge = Counting()
    with opened(tmp_path) as run:
        cached = CachedJudge(run, judge)
        for start in range(0, 100, 10):
            cached.judge(pairs(PROMPTS[start : start + 20], ANSWERS[start : start + 20]))
    assert len(reads) == len(set(reads)) <= 110
    assert len(judge.asked) == 110


def test_progress_counts_what_a_costly_judge_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[str, int, int]]()
    with opened(tmp_path) as run:
        CachedJudge(run, Streamed(), keep=True).judge(pairs(PROMPTS[:2], ANSWERS[:2]))
        CachedJudge(run, Streamed(), lambda *step: seen.append(step), keep=True).judge(pairs(PROMPTS[:5], ANSWERS[:5]))
        monkeypatch.setattr(Streamed, "costly", False)
        CachedJudge(run, Streamed(version=2), lambda *step: seen.append(step)).judge(pairs(PROMPTS[:5], ANSWERS[:5]))
    assert seen == [("judge counting", 1, 3), ("judge counting", 2, 3), ("judge counting", 3, 3)]


def test_no_rows(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        assert CachedJudge(run, Counting(), keep=True).judge(pairs([], [])).verdicts == ()


def test_an_endpoint_that_fails_and_recovers_is_asked_only_for_what_is_missing(tmp_path: Path) -> None:
    broken = {"answer 2", "answer 7"}

    def answer(request: Request, _seen: int) -> Reply:
        row = request.asked.split("<response>\n")[1].split("\n")[0]
        return Reply(status=500) if row in broken else Reply("No")

    with loopback(answer) as server:
        judge = RefusalJudge("m", server.endpoint(attempts=2, concurrency=2))
        with opened(tmp_path) as run:
            first = CachedJudge(run, judge, keep=True).judge(pairs(PROMPTS[:10], ANSWERS[:10]))
        assert len(server.requests) == 8 + 2 * 2
        assert (first.new, first.unscored, first.problem) == (8, 2, None)
        assert first.verdicts[2].evidence == "HTTP 500 (2 attempts)"
        broken.clear()
        server.requests.clear()
        with opened(tmp_path) as run:
            second = CachedJudge(run, judge, keep=True).judge(pairs(PROMPTS[:10], ANSWERS[:10]))
        assert len(server.requests) == 2
        assert (second.new, second.cached, second.unscored) == (2, 8, 0)
        assert {v.outcome for v in second.verdicts} == {Outcome.COMPLIANCE}
    stored = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json*"))
    assert "sk-not-a-secret" not in stored
