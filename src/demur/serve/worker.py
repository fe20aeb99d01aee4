"""One thread that owns the model, and the bounded queue before it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, TypeVar

from demur.errors import DemurError
from demur.serve.limits import Limits, Refusal

if TYPE_CHECKING:
    from demur.guard import Guard, GuardScore
    from demur.model import Batch
    from demur.serve.metrics import Metrics

T = TypeVar("T")

_SMOOTHING = 0.2
"""Weight of the newest batch in the running mean of seconds a prompt."""


@dataclass(frozen=True)
class _Waiting:
    text: str
    answer: asyncio.Future[GuardScore]


class Worker:
    """Scores prompts of many requests together. Whatever waits when the model becomes free goes into the next pass, so
    nothing is held back to fill a batch."""

    def __init__(self, guard: Guard, limits: Limits, metrics: Metrics) -> None:
        self._guard = guard
        self._limits = limits
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="demur-guard")
        self._queue: deque[_Waiting] = deque()
        metrics.waiting.set_function(lambda: len(self._queue))
        self._wake = asyncio.Event()
        self._closing = False
        self._pace = 0.01
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to score, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Score what waits, and end."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    @property
    def ready(self) -> bool:
        """Whether prompts are scored: the loop runs and is not about to end."""
        return self._task is not None and not self._task.done() and not self._closing

    async def score(self, texts: Sequence[str]) -> list[GuardScore]:
        """Scores in the order of the texts. Raises Refusal: the queue is full (429), a prompt is too long (413)."""
        self._admit(len(texts))
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(text, loop.create_future()) for text in texts]
        self._queue.extend(waiting)
        self._wake.set()
        try:
            return list(await asyncio.gather(*(each.answer for each in waiting)))
        finally:
            # One failed or the client's time is over: the others need not be scored.
            for each in waiting:
                each.answer.cancel()

    async def call(self, work: Callable[[], T]) -> T:
        """Run other work on the model between two batches."""
        self._admit(1)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def check_length(self, text: str) -> None:
        """Raise Refusal: the prompt is longer than the limit, or than the model's context."""
        model = self._guard.model
        bounds = [each for each in (self._limits.max_tokens, model.max_context) if each is not None]
        tokens = len(model.chat.tokenize(text))
        if bounds and tokens > min(bounds):
            raise Refusal(413, f"the prompt is {tokens} tokens long; at most {min(bounds)} are read")

    def _admit(self, count: int) -> None:
        if self._closing:
            raise Refusal(503, "the server is shutting down", Retry_After=1)
        if len(self._queue) + count > self._limits.queue:
            raise Refusal(
                429,
                f"{len(self._queue)} prompts are waiting and {self._limits.queue} may; try again later",
                Retry_After=max(1, ceil(len(self._queue) * self._pace)),
            )

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue and not self._closing:
                self._wake.clear()
                await self._wake.wait()
            if not self._queue:
                return
            batch = self._next_batch()
            if not batch:
                continue
            started = time.perf_counter()
            results = await loop.run_in_executor(self._thread, self._score, [each.text for each in batch])
            pace = (time.perf_counter() - started) / len(batch)
            self._pace += _SMOOTHING * (pace - self._pace)
            for each, result in zip(batch, results, strict=True):
                if each.answer.done():
                    continue
                if isinstance(result, Exception):
                    each.answer.set_exception(result)
                else:
                    each.answer.set_result(result)

    def _next_batch(self) -> list[_Waiting]:
        """The next prompts whose clients still wait."""
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._limits.max_batch:
            each = self._queue.popleft()
            if not each.answer.done():
                batch.append(each)
        return batch

    def _score(self, texts: list[str]) -> list[GuardScore | Exception]:
        """The score of each text, or why there is none; one bad prompt does not harm its neighbours."""
        found: list[GuardScore | Exception | None] = []
        for text in texts:
            try:
                self.check_length(text)
                found.append(None)
            except (Refusal, DemurError) as error:
                found.append(error)
        good = [n for n, each in enumerate(found) if each is None]
        if good:
            try:
                for n, score in zip(good, self._timed([texts[n] for n in good]), strict=True):
                    found[n] = score
            except Exception as error:  # whatever it is, the clients must hear of it and the loop go on
                for n in good:
                    found[n] = error
        return [each for each in found if each is not None]

    def _timed(self, texts: Sequence[str]) -> list[GuardScore]:
        guard, model = self._guard, self._guard.model

        def run(batch: Batch) -> list[GuardScore]:
            started = time.perf_counter()
            residuals = model.residuals(batch, guard.layers)
            between = time.perf_counter()
            scores = guard.score_residuals(residuals, batch)
            self._metrics.batch(len(batch), between - started, time.perf_counter() - between)
            return scores

        return model.each(model.tokenize(texts), run)
