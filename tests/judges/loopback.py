"""A chat endpoint on the loopback interface that answers, or misbehaves, as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from demur.judges import Endpoint


@dataclass(frozen=True)
class Reply:
    """What the server does with one request. `cut` sends so many bytes of the body; `hang` waits so many seconds."""

    text: str = ""
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])
    finish: str = "stop"
    cut: int | None = None
    hang: float = 0.0

    def payload(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        if self.status != 200:
            return json.dumps({"error": {"message": self.text}}).encode()
        choice = {"message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish}
        whole = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
        return whole[: self.cut].encode()


@dataclass
class Request:
    at: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def asked(self) -> str:
        """The last message."""
        return self.body["messages"][-1]["content"]


class Loopback:
    """The server's address and the requests that it got."""

    def __init__(self, answer: Callable[[Request, int], Reply]) -> None:
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.released = threading.Event()
        self._answer = answer
        self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def endpoint(self, **options: Any) -> Endpoint:
        settings: dict[str, Any] = {"url": self.url, "key": "sk-not-a-secret", "timeout": 5.0}
        return Endpoint(**settings | options)

    def handle(self, request: Request) -> Reply:
        with self._lock:
            self.requests.append(request)
            seen = sum(each.asked == request.asked for each in self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        reply = self._answer(request, seen)
        if reply.hang:
            self.released.wait(reply.hang)
        with self._lock:
            self._now -= 1
        return reply


@contextmanager
def loopback(answer: Callable[[Request, int], Reply]) -> Iterator[Loopback]:
    """Serve `answer(request, times that this question was asked)` while the context is open."""
    served = Loopback(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # Head and body in one packet: two would wait for each other.

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(length))
            headers = {name.title(): value for name, value in self.headers.items()}
            reply = served.handle(Request(time.monotonic(), self.path, headers, body))
            payload = reply.payload()
            try:
                self.send_response(reply.status)
                # So that no time is lost between attempts.
                soon = {} if reply.status == 200 else {"Retry-After-Ms": "1"}
                head = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
                for name, value in {**head, **(reply.headers or soon)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)
            except OSError:
                self.close_connection = True  # The client gave up.

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
