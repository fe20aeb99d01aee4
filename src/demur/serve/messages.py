"""Requests and responses of the server, as its OpenAPI page shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from demur.guard import GuardScore

CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic"),
)
"""Categories of OpenAI's moderation endpoint. A guard knows harmful requests, not kinds of them: `illicit` carries its
verdict, the others stay false."""


class ScoreRequest(BaseModel):
    """Prompts to score: user messages, without a chat template."""

    prompts: list[str] = Field(min_length=1)


class Scored(BaseModel):
    """The score of one prompt; `row` is its place in the request."""

    row: int
    harmful: float
    refuse: float
    flagged: bool
    verdict: str


class ScoreResponse(BaseModel):
    """Scores in the order of the prompts."""

    id: str
    guard: str
    results: list[Scored]


class ExplainRequest(BaseModel):
    """One user message to explain."""

    prompt: str = Field(min_length=1)


class TextPart(BaseModel):
    """A part of a message; others than text cannot be read."""

    type: str
    text: str | None = None


class ModerationRequest(BaseModel):
    """OpenAI's moderation request; `model` is taken and ignored: a server has one guard."""

    input: str | list[str] | list[TextPart]
    model: str | None = None

    def texts(self) -> list[str]:
        """What is scored, one text a result. Raises ValueError: an input that is no text."""
        if isinstance(self.input, str):
            return [self.input]
        texts = [each for each in self.input if isinstance(each, str)]
        if len(texts) == len(self.input):
            return texts
        parts = [each for each in self.input if isinstance(each, TextPart)]
        if other := next((part for part in parts if part.type != "text" or part.text is None), None):
            raise ValueError(f"an input of type {other.type!r} cannot be read; this guard reads text")
        # The parts are one message.
        return ["\n".join(part.text or "" for part in parts)]


class GuardrailRequest(BaseModel):
    """LiteLLM's guardrail request, as far as a guard of requests uses it."""

    texts: list[str] = []
    input_type: Literal["request", "response"] = "request"
    structured_messages: list[dict[str, Any]] | None = None

    def users_words(self) -> list[str]:
        """What users wrote: the messages of role `user` where the roles are told, else all texts."""
        found: list[str] = []
        for message in self.structured_messages or ():
            content: Any = message.get("content") if message.get("role") == "user" else None
            parts: list[Any] = content if isinstance(content, list) else [{"text": content}]
            found += [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return [text for text in (found if self.structured_messages else self.texts) if text.strip()]


class GuardrailResponse(BaseModel):
    """What LiteLLM does with the request."""

    action: Literal["NONE", "BLOCKED"]
    blocked_reason: str | None = None


def moderation(score: GuardScore) -> dict[str, Any]:
    """One result of OpenAI's moderation endpoint."""
    own = {"illicit": score.flagged}
    return {
        "flagged": score.flagged,
        "categories": {name: own.get(name, False) for name in CATEGORIES},
        "category_scores": {name: score.harmful if name in own else 0.0 for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] if name in own else [] for name in CATEGORIES},
    }
