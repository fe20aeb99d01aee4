"""Servers on the loopback interface, and a guard that waits until it is let go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from demur.guard import Guard


@dataclass
class Slow:
    """A guard whose scoring waits until it is let go; otherwise that of the planted model."""

    guard: Guard
    go: threading.Event = field(default_factory=threading.Event)
    started: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list[int])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guard, name)

    def score_residuals(self, residuals: Any, batch: Any) -> Any:
        self.batches.append(len(batch))
        self.started.set()
        self.go.wait(20)
        return self.guard.score_residuals(residuals, batch)


@dataclass
class Served:
    """A server in a thread of its own."""

    server: uvicorn.Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.server.servers[0].sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


Serve = Callable[..., Served]
