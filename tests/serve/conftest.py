"""A guard of the planted model, and servers of it on the loopback interface."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server is not installed: pip install 'demur[serve]'")

import uvicorn
from serving import Serve, Served, Slow

from demur.guard import Guard, Labelled, Reading, Sparse, fit_probe, read_prompts
from demur.model import ChatModel
from demur.serve.app import create_app
from demur.serve.limits import Limits
from demur.serve.transport import patient_protocol
from demur.testing import Planted, planted


@pytest.fixture(scope="session")
def truth() -> Planted:
    return planted()


@pytest.fixture(scope="session")
def guard(truth: Planted) -> Guard:
    """Harm read from the residual after layer 0, refusal from that after layer 2, explained by the planted features."""
    model = ChatModel(truth.model, truth.tokenizer, name="planted")
    harm, refusal = (tuple(sorted(each)) for each in (truth.truth.harm, truth.truth.refusal))
    readings = (
        Reading(kind="dense", layer=0, pooling="mean"),
        Reading(kind="dense", layer=2, pooling="last"),
        Reading(kind="features", features=harm, pooling="max"),
        Reading(kind="features", features=refusal, pooling="last"),
    )

    def values(reading: Reading, part: slice) -> Labelled:
        texts = [truth.harmful.texts[part], truth.harmless.texts[part]]
        (found,) = read_prompts(model, [*texts[0], *texts[1]], [reading], truth.suite)
        return Labelled(found, np.repeat([True, False], [len(texts[0]), len(texts[1])]))

    probes = [fit_probe(each, values(each, slice(0, 30)), values(each, slice(30, 50))) for each in readings]
    features = (*harm, *refusal)
    rows = {
        layer: truth.suite[layer].rows([f.index for f in features if f.layer == layer])
        for layer in {f.layer for f in features}
    }
    return Guard(
        model=model,
        harm=probes[0],
        refuse=probes[1],
        thresholds={"harmful": {"0.01": 0.5}},
        sparse=Sparse(probes[2], probes[3], dict.fromkeys(features, 1.0)),
        rows=rows,
    )


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
