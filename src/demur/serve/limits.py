"""What one server takes on, and how it refuses the rest."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from demur.studies.config import Options


class Limits(Options):
    """How much is taken on; what goes beyond is refused with a status of its own."""

    group: ClassVar[str] = "Limits"

    max_batch: int = Field(default=32, ge=1)
    """Prompts in one forward pass at most: what waits while the model is busy is scored together."""
    queue: int = Field(default=256, ge=1)
    """Prompts that may wait; a request that does not fit is answered 429 with Retry-After."""
    max_prompts: int = Field(default=128, ge=1)
    """Prompts of one request at most (413)."""
    max_body: int = Field(default=1_000_000, ge=1)
    """Bytes of one request's body at most (413)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one prompt in the chat format at most (413; default: what the model's context holds)."""
    timeout: float = Field(default=30.0, gt=0)
    """Seconds in which a request is answered (503), and in which its body must have come (408)."""
    head_timeout: float = Field(default=10.0, gt=0)
    """Seconds in which a request's head must have come; the connection is closed then."""
    connections: int = Field(default=512, ge=1)
    """Open connections at most (503)."""


class Refusal(Exception):
    """A request is not taken on: its status, why, and headers that say more."""

    def __init__(self, status: int, message: str, **headers: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
