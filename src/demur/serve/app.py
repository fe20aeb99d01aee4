"""The application: what a guard answers over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from demur import __version__
from demur.errors import DemurError
from demur.serve.gate import Gate, refused
from demur.serve.limits import Limits, Refusal
from demur.serve.messages import (
    ExplainRequest,
    GuardrailRequest,
    GuardrailResponse,
    ModerationRequest,
    Scored,
    ScoreRequest,
    ScoreResponse,
    moderation,
)
from demur.serve.metrics import Metrics
from demur.serve.worker import Worker

if TYPE_CHECKING:
    from demur.guard import Guard, GuardScore

T = TypeVar("T")

_POLICY = "default-src 'self'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'"


class _Answers:
    """What the routes share: the guard, its worker, and the bounds of a request."""

    def __init__(self, guard: Guard, limits: Limits, metrics: Metrics) -> None:
        self.guard = guard
        self.name = Path(guard.model.name).name
        self.limits = limits
        self.metrics = metrics
        self.worker = Worker(guard, limits, metrics)

    async def score(self, request: Request, texts: Sequence[str]) -> list[GuardScore]:
        """Scores of the texts of one request. Raises Refusal: too many prompts, an empty one, no time or no place."""
        if len(texts) > self.limits.max_prompts:
            raise Refusal(413, f"{len(texts)} prompts in one request; at most {self.limits.max_prompts} are taken")
        for n, text in enumerate(texts):
            if not text.strip():
                raise Refusal(422, f"prompt {n} is empty")
        scores = await self._in_time(self.worker.score(texts))
        self.metrics.scored(scores)
        request.state.prompts, request.state.flagged = len(scores), sum(score.flagged for score in scores)
        return scores

    async def explain(self, text: str) -> dict[str, Any]:
        """The explanation of one prompt, as JSON."""

        def work() -> dict[str, Any]:
            self.worker.check_length(text)
            return self.guard.explain(text).model_dump(mode="json")

        return await self._in_time(self.worker.call(work))

    async def _in_time(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await work
        except TimeoutError:
            raise Refusal(503, f"not answered within {self.limits.timeout:g} seconds", Retry_After=1) from None


def create_app(guard: Guard, limits: Limits | None = None, *, key: str | None = None) -> FastAPI:
    """The ASGI application of one guard.

    Args:
        guard: scores the prompts.
        limits: what is taken on (default: `Limits()`).
        key: what clients must send as bearer token or `x-api-key` (default: no key is asked for).
    """
    limits, metrics = limits or Limits(), Metrics()
    answers = _Answers(guard, limits, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        answers.worker.start()
        yield
        await answers.worker.close()

    app = FastAPI(title="demur guard", version=__version__, lifespan=lifespan, redoc_url=None)
    _add_guard_routes(app, answers)
    _add_other_routes(app, answers)
    app.add_exception_handler(Refusal, lambda _, error: refused(error))  # pyright: ignore[reportArgumentType]
    app.add_exception_handler(DemurError, lambda _, error: refused(Refusal(422, str(error))))
    app.add_exception_handler(RequestValidationError, lambda _, error: refused(Refusal(422, _told(error))))  # pyright: ignore[reportArgumentType]
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Gate, limits=limits, metrics=metrics, key=key, paths=paths)
    return app


def _told(error: RequestValidationError) -> str:
    """Where a request does not fit, and why; never what it says."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{place or 'the body'}: {first['msg']}"


def _add_guard_routes(app: FastAPI, answers: _Answers) -> None:
    @app.post("/v1/score")
    async def score(request: Request, asked: ScoreRequest) -> ScoreResponse:
        """P(harmful) and P(refuse) of each prompt, and the verdict that follows from them."""
        scores = await answers.score(request, asked.prompts)
        results = [Scored(row=row, **each.model_dump(include=_FIELDS)) for row, each in enumerate(scores)]
        return ScoreResponse(id=request.state.id, guard=answers.name, results=results)

    @app.post("/v1/explain")
    async def explain(request: Request, asked: ExplainRequest) -> dict[str, Any]:
        """One prompt: its score, its tokens with the activity of harm and refusal features, and the features."""
        if not asked.prompt.strip():
            raise Refusal(422, "the prompt is empty")
        request.state.prompts = 1
        return await answers.explain(asked.prompt)

    @app.post("/v1/moderations")
    async def moderate(request: Request, asked: ModerationRequest) -> dict[str, Any]:
        """OpenAI's moderation endpoint: `flagged`, and the probability under `illicit`."""
        try:
            texts = asked.texts()
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        scores = await answers.score(request, texts)
        results = [moderation(each) for each in scores]
        return {"id": f"modr-{request.state.id}", "model": answers.name, "results": results}

    @app.post("/beta/litellm_basic_guardrail_api", response_model_exclude_none=True)
    async def guardrail(request: Request, asked: GuardrailRequest) -> GuardrailResponse:
        """LiteLLM's guardrail: blocks a request if any of its users' messages is flagged."""
        if asked.input_type == "response":
            raise Refusal(400, "this guard reads requests, not answers; configure LiteLLM with `mode: pre_call`")
        texts = asked.users_words()
        scores = await answers.score(request, texts) if texts else []
        if worst := max((each for each in scores if each.flagged), key=lambda each: each.harmful, default=None):
            reason = f"flagged as harmful (P = {worst.harmful:.2f}) by {answers.name}"
            return GuardrailResponse(action="BLOCKED", blocked_reason=reason)
        return GuardrailResponse(action="NONE")


_FIELDS = {"harmful", "refuse", "flagged", "verdict"}


def _add_other_routes(app: FastAPI, answers: _Answers) -> None:
    @app.get("/healthz")
    async def health() -> Response:
        """200 when prompts are scored, 503 when not."""
        ready = answers.worker.ready
        return JSONResponse({"status": "ok" if ready else "closing", "guard": answers.name}, 200 if ready else 503)

    @app.get("/metrics")
    async def counts() -> Response:
        """Counters in Prometheus' text format."""
        return Response(answers.metrics.text(), media_type="text/plain; version=0.0.4")

    read = partial(files("demur.serve").joinpath)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(read("page.html").read_text("utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(read("page.js").read_text("utf-8"), media_type="text/javascript")
