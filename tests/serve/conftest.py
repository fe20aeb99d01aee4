"""A guard of the planted model, and servers of it on the loopback interface."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server is not installed: pip install 'demur[serve]'")

import uvicorn
from serving import Serve, Served, Slow

from demur.guard import Guard
from demur.serve.app import create_app
from demur.serve.limits import Limits
from demur.serve.transport import patient_protocol
from demur.testing import Planted
from planted_guard import Made, planted_guard, planted_model


@pytest.fixture(scope="session")
def made() -> Made:
    return planted_model()


@pytest.fixture(scope="session")
def truth(made: Made) -> Planted:
    return made.truth


@pytest.fixture(scope="session")
def guard(made: Made) -> Guard:
    return planted_guard(made)


@pytest.fixture
def slow(guard: Guard) -> Iterator[Slow]:
    found = Slow(guard)
    yield found
    found.go.set()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`serve(guard, key=…, **limits)`: a server on a free port."""
    running: list[Served] = []

    def start(guard: Any, *, key: str | None = None, **limits: Any) -> Served:
        limited = Limits(**limits)
        config = uvicorn.Config(
            create_app(guard, limited, key=key),
            port=0,
            log_level="error",
            http=patient_protocol(limited.head_timeout),
            limit_concurrency=limited.connections,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        running.append(Served(server, thread))
        return running[-1]

    yield start
    for each in running:
        each.stop()
