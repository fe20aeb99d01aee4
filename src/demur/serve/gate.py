"""What every request passes: the key, the size of its body, a request id, one line of log, and the counters."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.responses import JSONResponse

from demur.serve.limits import Limits, Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from demur.serve.metrics import Metrics

LOG = logging.getLogger("demur.serve")

OPEN = frozenset({"/", "/page.js", "/healthz", "/docs", "/openapi.json"})
"""Paths that need no key: they tell nothing of prompts or traffic."""


def refused(error: Refusal) -> JSONResponse:
    """A refusal in the form of OpenAI's errors, which its client shows."""
    kind = "rate_limit_error" if error.status == 429 else "server_error" if error.status >= 500 else "invalid_request"
    body = {"error": {"message": str(error), "type": kind, "code": error.status, "param": None}}
    return JSONResponse(body, error.status, error.headers)


class Gate:
    """ASGI middleware around the whole application. A body is read whole, within its bounds, before anything is parsed;
    a client that goes away before that costs nothing more."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, metrics: Metrics, key: str | None, paths: frozenset[str]
    ) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._key = key
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        told = scope.setdefault("state", {})
        told["id"] = uuid4().hex

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", told["id"].encode())]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check_key(scope["path"], headers)
            body = await self._body(headers, receive)
            if body is not None:
                await self._app(scope, _replayed(body, receive), sent)
        except Refusal as error:
            await refused(error)(scope, receive, sent)
        except Exception as error:  # whatever it is, the client is answered, and no message with a prompt in it logged
            LOG.error(json.dumps({"id": told["id"], "error": type(error).__name__}))
            if not status:
                await refused(Refusal(500, "the guard failed on this request"))(scope, receive, sent)
        finally:
            self._note(scope, status, time.perf_counter() - started, told)

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._key is None or path in OPEN:
            return
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            raise Refusal(401, "the API key is missing or wrong; send it as a bearer token or as x-api-key")

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None: the client went away."""
        limit, seconds = self._limits.max_body, self._limits.timeout
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > limit:
            raise Refusal(413, f"the body has {int(told)} bytes; at most {limit} are read", Connection="close")
        parts: list[bytes] = []
        read = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    read += len(parts[-1])
                    if read > limit:
                        raise Refusal(413, f"the body has more than {limit} bytes", Connection="close")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body did not come in {seconds:g} seconds", Connection="close") from None

    def _note(self, scope: Scope, status: int, seconds: float, told: Mapping[str, Any]) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        # 499, as nginx says it: the client closed the connection before it was answered.
        status = status or 499
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        counts = {name: told[name] for name in ("prompts", "flagged") if name in told}
        line = {"id": told["id"], "method": scope["method"], "path": path, "status": status}
        LOG.info(json.dumps(line | {"ms": round(1000 * seconds, 1)} | counts))


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
