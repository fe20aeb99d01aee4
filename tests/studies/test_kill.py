"""SIGKILL at any moment, then the same command: the same tables as a clean run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from planted_study import lasting

from demur.studies.results import CompareResult

pytestmark = pytest.mark.slow


def _config(files: Any, folder: Path) -> Path:
    values = files.small(max_batch_tokens=40, estimator="ig", steps=30, n="20,16,8,20", suppress="0,-1")
    path = folder / "study.toml"
    # JSON strings and numbers are TOML ones.
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def _command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "demur", "study", "--config", str(config), "--out", str(out), *more]


def _tables(out: Path) -> str:
    return lasting(CompareResult.model_validate_json((out / "study.json").read_text()))


def _half_done(out: Path, stage: str) -> bool:
    """Some stage of that name holds rows and is not finished."""
    for folder in (out / "stages").glob(f"{stage}-*"):
        rows = folder / f"{stage}.jsonl"
        if not (folder / "done").exists() and rows.exists() and rows.stat().st_size > 0:
            return True
    return False


def _kill_when(config: Path, out: Path, stage: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(config, out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not _half_done(out, stage):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "study.json").exists()


@pytest.fixture(scope="module")
def clean(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("clean")
    config = _config(files, folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(_command(config, folder / "run"), env=environment, check=True, capture_output=True)
    return config, _tables(folder / "run")


@pytest.mark.parametrize("stage", ["answers", "attribution"])
def test_killed_and_rerun(clean: tuple[Path, str], stage: str, tmp_path: Path) -> None:
    config, expected = clean
    out = tmp_path / "run"
    _kill_when(config, out, stage)
    # A kill can also tear the line that was being written.
    torn = next(
        path for path in (out / "stages").glob(f"{stage}-*/{stage}.jsonl") if not (path.parent / "done").exists()
    )
    with torn.open("ab") as file:
        file.write(b'{"prompt_id": "ha')
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    again = subprocess.run(_command(config, out), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert _tables(out) == expected


def _rows_twice(out: Path) -> list[str]:
    """Rows of finished stages that stand there twice."""
    twice: list[str] = []
    for path in (out / "stages").glob("answers-*/answers.jsonl"):
        ids = [json.loads(line)["prompt_id"] for line in path.read_text(encoding="utf-8").splitlines()]
        twice += [f"{path}: {key}" for key, many in Counter(ids).items() if many > 1]
    return twice


def _helper(leader: int) -> int | None:
    """The process that a leading one has started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{leader}\n" in status.read_text():
                return int(status.parent.name)
    return None


def test_two_workers_find_what_one_finds(clean: tuple[Path, str], tmp_path: Path) -> None:
    config, expected = clean
    ran = subprocess.run(
        _command(config, tmp_path / "run", "--workers", "2"), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert _tables(tmp_path / "run") == expected
    assert not _rows_twice(tmp_path / "run")
    assert not list((tmp_path / "run" / "stages").rglob(".*.lock"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the other process is looked up in /proc")
@pytest.mark.parametrize("which", ["leader", "worker"])
def test_one_of_two_workers_is_killed(clean: tuple[Path, str], which: str, tmp_path: Path) -> None:
    config, expected = clean
    out = tmp_path / "run"
    with (tmp_path / "told").open("wb") as told:
        leader = subprocess.Popen(_command(config, out, "--workers", "2"), stdout=subprocess.DEVNULL, stderr=told)
    deadline = time.monotonic() + 120
    while not _half_done(out, "answers"):
        assert leader.poll() is None, (tmp_path / "told").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    worker = _helper(leader.pid)
    assert worker is not None
    os.kill(leader.pid if which == "leader" else worker, signal.SIGKILL)
    if which == "leader":
        leader.wait()
        while Path(f"/proc/{worker}").exists():  # It ends with the one that started it.
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (out / "study.json").exists()
        again = subprocess.run(_command(config, out), capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
    else:
        assert leader.wait(timeout=120) == 0
        assert "worker 1 ended with status -9" in (tmp_path / "told").read_text()
    assert _tables(out) == expected
    assert not _rows_twice(out)
