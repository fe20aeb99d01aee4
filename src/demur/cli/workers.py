"""Processes that help a command with its run: each is the same command with `--join`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

import click

from demur.cli.console import complain
from demur.errors import InputError

if TYPE_CHECKING:
    from demur.studies.config import StudyConfig

WORKERS: Final = click.Option(
    ["--workers"],
    type=click.IntRange(1),
    metavar="INTEGER",
    help="Processes on this machine that share the work, each with a copy of the model: on a CPU they share the "
    "cores, and each gets a GPU of its own where there are several (default: one for each core, four at most, where "
    "a small model runs on a CPU; otherwise 1).",
)
OPTIONS: Final = (
    WORKERS,
    click.Option(
        ["--join"],
        is_flag=True,
        help="Share the work with other processes that run this very command with --join on the same folder, on one or "
        "several machines (a SLURM array, say); the first one leads and writes the result.",
    ),
)
MOST: Final = 4
"""Processes where none are asked for: each holds torch and a copy of the model, half a gigabyte or more."""
_WEIGHTS: Final = ("*.safetensors", "*.bin")
_OWN: Final = ("auto", "cpu", "cuda", "mps")
_HELPER: Final = "DEMUR_HELPER"
"""Set, to their number, in the processes that a leading one starts."""


def fitting_workers(config: StudyConfig) -> int:
    """How many processes suit a study where nobody says it. A small model runs on one thread, so that on a CPU other
    processes can have the other cores; a larger one uses them by itself. Judges that are models are not loaded twice.
    """
    judges = {config.judge, *getattr(config, "harm_judges", ())} - {None}
    if _cores() == 1 or not _is_small(config.model) or not judges <= {"patterns"}:
        return 1
    from demur.model import find_device

    return min(MOST, _cores()) if find_device(config.device).type == "cpu" else 1


def _is_small(model: str | None) -> bool:
    """Whether a model has few parameters: the bundled one, or a folder with small files (of two bytes each or more)."""
    from demur.model import SMALL_MODEL

    if model is None:
        return True
    files = [path for pattern in _WEIGHTS for path in Path(model).expanduser().glob(pattern)]
    return bool(files) and sum(path.stat().st_size for path in files) <= 2 * SMALL_MODEL


def _cores() -> int:
    """Cores that this process may use; no more than `OMP_NUM_THREADS` threads, where that is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores)))


class Helpers:
    """The processes beside this one, while the context is open. They load what they need at once, and begin to work
    when this one says `go`."""

    def __init__(self, workers: int, device: str) -> None:
        """Raises InputError: the device is not one that each process can have for itself."""
        self._workers = workers
        self._running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        self._gone = False
        if workers > 1 and device not in _OWN:
            raise InputError(
                f"--workers {workers} and --device {device} do not go together: each worker takes a GPU of its own; "
                "name them in CUDA_VISIBLE_DEVICES and give --device cuda"
            )

    def __enter__(self) -> Self:
        arguments: list[str] = click.get_current_context().find_root().obj
        command = [sys.executable, "-m", "demur", *arguments, "--workers", "1", "--join"]
        for number in range(1, self._workers):
            environment = os.environ | {_HELPER: str(number), "OMP_NUM_THREADS": str(self._threads)}
            told = tempfile.TemporaryFile()
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=told
            )
            self._running.append((process, told))
        return self

    @property
    def _threads(self) -> int:
        """Cores for each process."""
        return max(1, _cores() // self._workers)

    def go(self) -> None:
        """Let them begin: this process holds the run folder."""
        if self._gone or not self._running:
            return
        import torch

        self._gone = True
        torch.set_num_threads(self._threads)
        for process, _ in self._running:
            with contextlib.suppress(OSError):  # One that has ended already is reported at the end.
                assert process.stdin is not None
                process.stdin.write(b"g")
                process.stdin.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, (process, told) in enumerate(self._running, start=1):
            # An interruption from the keyboard reaches all of them.
            if kind is None and process.poll() not in (None, 0):
                told.seek(0)
                last = told.read().decode(errors="replace").strip().splitlines()[-1:]
                why = f": {last[0]}" if last else ""
                ended = f"worker {number} ended with status {process.returncode}{why}"
                complain(f"{ended}; the others did its part", "warning")
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            told.close()


def await_the_leader() -> None:
    """In a process that another one has started: return when that one says so, take a GPU of its own where there are
    several, and end when the other one ends, however it ends."""
    number = os.environ.pop(_HELPER, None)
    if number is None:
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        torch.cuda.set_device(int(number) % gpus)
    _read()
    threading.Thread(target=_read, daemon=True).start()


def _read() -> None:
    """Wait for a byte from the leader, which writes only one; without one it has ended."""
    if not os.read(sys.stdin.fileno(), 1):
        os._exit(1)


def is_finished(folder: Path) -> bool:
    """The latest session on the run folder has written its result."""
    from demur.runs import read_run

    return read_run(folder).manifest.latest.finished is not None
