"""Several processes at work on one run folder. The locks hold between threads as they do between processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest

from demur.errors import RunError
from demur.runs import Run, StageCount, read_run
from demur.types import Take, Value

CONFIG = {"model": "tiny"}
KEYS = [f"p:{number}" for number in range(40)]


class Score(Value):
    prompt_id: str
    by: str


class Slow:
    """Computes 1 when it is told to go on."""

    def __init__(self) -> None:
        self.begun, self.go_on = Event(), Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.go_on.wait(10)
        return 1


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Run, Run]]:
    """One that leads, and one that has joined it."""
    with (
        Run.open(tmp_path / "run", config=CONFIG, shared=True) as leader,
        Run.open(tmp_path / "run", config=CONFIG, join=True) as member,
    ):
        yield leader, member


def both(pair: tuple[Run, Run], work: Callable[[Run], Any]) -> list[Any]:
    """What each of two processes gives, started at the same time."""
    start = Barrier(2)

    def begin(run: Run) -> Any:
        start.wait()
        return work(run)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(begin, pair))


def test_a_value_is_computed_by_one_and_read_by_all(pair: tuple[Run, Run]) -> None:
    calls: list[str] = []

    def compute() -> int:
        calls.append("made")
        time.sleep(0.1)
        return 7

    assert both(pair, lambda run: run.cached("n", {"k": 1}, int, compute)) == [7, 7]
    assert calls == ["made"]
    folder = read_run(pair[0].folder).stages("n")[0].folder
    assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) == [
        "done", "n.json", "stage.json"
    ]  # fmt: skip


def test_each_batch_is_computed_by_one_and_every_row_is_stored_once(pair: tuple[Run, Run]) -> None:
    def work(run: Run) -> list[Score]:
        name = "leader" if run is pair[0] else "member"

        def compute(take: Take) -> Iterator[list[Score]]:
            for start in range(0, len(KEYS), 4):
                batch = KEYS[start : start + 4]
                if take(batch):
                    time.sleep(0.01)
                    yield [Score(prompt_id=key, by=name) for key in batch]

        return run.mapped("scores", {}, Score, KEYS, compute)

    one, two = both(pair, work)
    assert one == two
    assert [row.prompt_id for row in one] == KEYS
    assert set(Counter(row.by for row in one)) == {"leader", "member"}
    stored = pair[0].stage("scores", {}).rows("scores", Score)
    assert Counter(row.prompt_id for row in stored) == dict.fromkeys(KEYS, 1)
    for start in range(0, len(KEYS), 4):
        assert len({row.by for row in one[start : start + 4]}) == 1


def test_what_another_one_is_at_is_left_until_the_rest_is_done(pair: tuple[Run, Run]) -> None:
    leader, member = pair
    slow = Slow()
    done: list[str] = []

    def after(name: str) -> Callable[[], int]:
        def compute() -> int:
            done.append(name)
            return 0

        return compute

    def tasks(run: Run) -> list[Callable[[], int]]:
        first: Callable[[], int] = slow if run is leader else after("slow")
        steps = {"a": first, "b": after("b"), "c": after("c")}
        return [lambda name=name, step=step: run.cached(name, {}, int, step) for name, step in steps.items()]

    def last() -> int:
        done.append("last")
        slow.go_on.set()
        return 0

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(leader.each, tasks(leader))
        assert slow.begun.wait(10)
        assert member.each([*tasks(member), lambda: member.cached("d", {}, int, last)]) == [1, 0, 0, 0]
        assert waiting.result(10) == [1, 0, 0]
    assert done == ["b", "c", "last"]


def test_alone_each_does_the_tasks_in_order(tmp_path: Path) -> None:
    order: list[int] = []
    with Run.open(tmp_path / "run", config=CONFIG) as run:
        assert run.each([lambda n=n: order.append(n) or n for n in range(4)]) == [0, 1, 2, 3]
    assert order == [0, 1, 2, 3]
    assert not list((tmp_path / "run").rglob(".*.lock"))


def test_a_task_that_needs_what_is_being_made_is_tried_again(pair: tuple[Run, Run]) -> None:
    leader, member = pair
    base = Slow()

    def dependent(run: Run, name: str) -> int:
        return run.cached("base", {}, int, base) + run.cached(name, {}, int, lambda: 1)

    def free() -> int:
        base.go_on.set()
        time.sleep(0.2)  # The leader has finished the base by now.
        return 0

    tasks = [lambda: dependent(member, "x"), lambda: dependent(member, "y"), lambda: member.cached("z", {}, int, free)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(leader.cached, "base", {}, int, base)
        assert base.begun.wait(10)
        assert member.each(tasks) == [2, 2, 0]
        assert waiting.result(10) == 1
    assert member.counters["x"] == member.counters["y"] == StageCount(found=0, made=1)


def test_tasks_that_waited_for_the_same_thing_are_shared_out_afterwards(pair: tuple[Run, Run]) -> None:
    leader, member = pair
    base, other_done = Slow(), Event()

    def tasks(run: Run) -> list[Callable[[], int]]:
        def compute(name: str) -> int:
            if name == "x" and run is leader:
                assert other_done.wait(10)  # The member is to do the other one meanwhile, not to wait for this one.
            if name == "y":
                other_done.set()
            return 1

        def task(name: str) -> int:
            return run.cached("base", {}, int, base) + run.cached(name, {}, int, lambda: compute(name))

        return [lambda name=name: task(name) for name in ("x", "y")]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(leader.each, tasks(leader))
        assert base.begun.wait(10)
        second = pool.submit(member.each, tasks(member))
        time.sleep(0.2)  # It has tried both, and waits.
        base.go_on.set()
        assert first.result(20) == second.result(20) == [2, 2]
    assert member.counters["base"] == StageCount(found=1, made=0)


def test_within_a_task_of_several_one_that_is_taken_is_left(pair: tuple[Run, Run]) -> None:
    leader, member = pair
    slow = Slow()
    done: list[str] = []

    def free() -> int:
        done.append("free")
        slow.go_on.set()
        return 2

    def nested() -> list[int]:
        return member.each([lambda: member.cached("slow", {}, int, slow)])

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(leader.cached, "slow", {}, int, slow)
        assert slow.begun.wait(10)
        found = member.each([nested, lambda: [member.cached("free", {}, int, free)]])
        assert (found, waiting.result(10), done) == ([[1], [2]], 1, ["free"])


def test_a_failure_leaves_the_stage_to_the_other_one(pair: tuple[Run, Run]) -> None:
    with pytest.raises(ZeroDivisionError):
        pair[0].cached("ratio", {}, float, lambda: 1 / 0)
    assert pair[1].cached("ratio", {}, float, lambda: 0.5) == 0.5

    def broken(take: Take) -> Iterator[list[Score]]:
        assert take(KEYS[:4])
        raise ZeroDivisionError
        yield []

    with pytest.raises(ZeroDivisionError):
        pair[0].mapped("scores", {}, Score, KEYS[:4], broken)
    rows = [Score(prompt_id=key, by="member") for key in KEYS[:4]]
    assert pair[1].mapped("scores", {}, Score, KEYS[:4], lambda take: [rows] if take(KEYS[:4]) else []) == rows


def test_one_that_has_joined_leaves_manifest_and_results_to_the_leader(pair: tuple[Run, Run]) -> None:
    leader, member = pair
    before = (leader.folder / "manifest.json").read_bytes()
    member.record(inputs={"harmful": "other"})
    member.cached("n", {}, int, lambda: 1)
    member.save_result("study.json", "{}")
    member.close(finished=True)
    assert (leader.folder / "manifest.json").read_bytes() == before
    assert not (leader.folder / "study.json").exists()
    with pytest.raises(RunError, match="is being written by process"):
        Run.open(leader.folder, config=CONFIG)


def test_the_first_that_may_join_leads(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", config=CONFIG, join=True) as run:
        run.save_result("study.json", "{}")
    assert read_run(tmp_path / "run").manifest.latest.files == ("study.json",)


@pytest.mark.parametrize(("config", "command"), [({"model": "other"}, "study"), (CONFIG, "minimal")])
def test_another_run_cannot_be_joined(
    config: dict[str, str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.runs._run._PATIENCE", 1)
    with (
        Run.open(tmp_path / "run", config=CONFIG, shared=True),
        pytest.raises(RunError, match="runs another command or configuration"),
    ):
        Run.open(tmp_path / "run", config=config, command=command, join=True)


HANGS = """
    import sys, time
    from demur.runs import Run
    from demur.types import Value

    class Score(Value):
        prompt_id: str
        by: str

    keys = [f"p:{number}" for number in range(40)]

    def compute(take):
        for start in range(0, 40, 4):
            if take(keys[start : start + 4]):
                if start == 8:
                    print("hangs", flush=True)
                    time.sleep(600)
                yield [Score(prompt_id=key, by="killed") for key in keys[start : start + 4]]

    with Run.open(sys.argv[1], config={"model": "tiny"}, join=True) as run:
        run.cached("n", {}, int, lambda: 1)
        run.mapped("scores", {}, Score, keys, compute)
"""


@pytest.mark.parametrize("leads", [False, True])
def test_what_a_killed_process_had_begun_is_taken_over(leads: bool, tmp_path: Path) -> None:
    def compute(take: Take) -> Iterator[list[Score]]:
        for start in range(0, 40, 4):
            if take(KEYS[start : start + 4]):
                yield [Score(prompt_id=key, by="other") for key in KEYS[start : start + 4]]

    def finish(run: Run, process: subprocess.Popen[str]) -> None:
        with ThreadPoolExecutor(1) as pool:
            rows = pool.submit(run.mapped, "scores", {}, Score, KEYS, compute)
            time.sleep(0.3)
            assert not rows.done()  # It waits for the batch that the other one holds.
            process.send_signal(signal.SIGKILL)
            process.wait()
            found = rows.result(10)
        assert [row.prompt_id for row in found] == KEYS
        assert {row.by for row in found[8:12]} == {"other"}
        assert {row.by for row in found[:8]} == {"killed"}
        stored = run.stage("scores", {}).rows("scores", Score)
        assert Counter(row.prompt_id for row in stored) == dict.fromkeys(KEYS, 1)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path / "run")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout as told:
            assert told.readline() == "hangs\n"
        return process

    if leads:
        process = start()
        with Run.open(tmp_path / "run", config=CONFIG, join=True) as run:
            finish(run, process)
    else:
        with Run.open(tmp_path / "run", config=CONFIG, shared=True) as run:
            finish(run, start())
    with Run.open(tmp_path / "run", config=CONFIG) as again:  # Whoever led before: the folder can be taken again.
        assert again.stage("scores", {}).done
