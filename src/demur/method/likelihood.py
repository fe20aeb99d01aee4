"""What a model, intervened or not, says of given tokens: the measures of damage, in one pass each.

Everything is teacher-forced: the tokens are the same whatever is done to the model, so that methods can be compared on
them. Interventions act on every real token of a pass, the answer's included, as `where="all"` means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from demur.errors import InputError
from demur.method.interventions import Compiled
from demur.model import Batch, ChatModel, Region, TokenizedPrompt
from demur.types import Answer, Prompt, Value, as_prompts

T = TypeVar("T")


class TokenLoss(Value):
    """Cross-entropy of one conversation's or text's counted tokens: their sum in nats, and how many they are."""

    prompt_id: str
    nats: float
    tokens: int


def answers_to_score(model: ChatModel, answers: Iterable[Answer]) -> list[TokenizedPrompt]:
    """Conversations whose answers' tokens are counted (`Region.RESPONSE`)."""
    return [model.chat.tokenize(answer.prompt, answer.text) for answer in answers]


def texts_to_score(model: ChatModel, texts: Iterable[Prompt | str], *, max_tokens: int) -> list[TokenizedPrompt]:
    """The first `max_tokens` tokens of each text after one BOS (if the model has one), outside any chat template.

    Raises:
        InputError: a text has no token to predict.
    """
    bos = model.chat.bos_id
    rendered: list[TokenizedPrompt] = []
    for text in as_prompts(texts):
        ids: list[int] = list(model.tokenizer(text.text, add_special_tokens=False)["input_ids"])
        while bos is not None and ids[:1] == [bos]:
            ids = ids[1:]
        ids = ids[:max_tokens]
        head = [] if bos is None else [bos]
        if len(head) + len(ids) < 2:
            raise InputError(f"text {text.id} ({text.text[:40]!r}) has no token to predict; drop it")
        regions = [Region.SPECIAL] * len(head) + [Region.RESPONSE] * len(ids)
        if not head:
            regions[0] = Region.SPECIAL
        rendered.append(TokenizedPrompt(text.id, (*head, *ids), tuple(int(region) for region in regions)))
    return rendered


def token_losses(
    model: ChatModel,
    items: Sequence[TokenizedPrompt],
    change: Compiled | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenLoss]:
    """Cross-entropy of each item's `RESPONSE` tokens given all before them; padding is neither counted nor changed.

    Args:
        items: from `answers_to_score` or `texts_to_score`.
        change: what is done to the model meanwhile.
        progress: called with (done, all) items after each batch.
    """

    def read(prompt: str, logits: Tensor, wanted: Tensor) -> TokenLoss:
        nats = float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        return TokenLoss(prompt_id=prompt, nats=nats, tokens=len(wanted))

    return _over_responses(model, items, read, change, progress)


def answer_token_losses(
    model: ChatModel, answers: Sequence[Answer], progress: Callable[[int, int], None] | None = None
) -> list[tuple[float, ...]]:
    """Cross-entropy (nats) of each token of each answer under the clean model, given the prompt and the tokens before.

    Args:
        model: the clean model.
        answers: in any order; an answer without a token gives an empty tuple.
        progress: called with (done, all) answers after each batch.
    """

    def read(_prompt: str, logits: Tensor, wanted: Tensor) -> tuple[float, ...]:
        return tuple(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist())

    return _over_responses(model, answers_to_score(model, answers), read, None, progress)


def _over_responses(
    model: ChatModel,
    items: Sequence[TokenizedPrompt],
    read: Callable[[str, Tensor, Tensor], T],
    change: Compiled | None,
    progress: Callable[[int, int], None] | None,
) -> list[T]:
    """What `read` makes of each item's prompt id, logits (float32) and the `RESPONSE` tokens that they predict."""
    keep = 1 + max((item.regions.count(Region.RESPONSE) for item in items), default=0)

    def run(batch: Batch) -> list[T]:
        with torch.inference_mode(), nullcontext() if change is None else change.on(batch):
            logits = model.logits(batch, keep)
        width = logits.shape[1]
        counted = batch.within([Region.RESPONSE])[:, -width:][:, 1:]
        wanted = batch.input_ids[:, -width:][:, 1:].to(logits.device)
        # One row at a time in float32: a whole batch of logits over a large vocabulary would not fit beside the model.
        return [
            read(prompt, logits[row, :-1][mask].float(), wanted[row][mask])
            for row, (prompt, mask) in enumerate(zip(batch.prompt_ids, counted, strict=True))
        ]

    return model.each(items, run, progress)


def first_token_kl(model: ChatModel, items: Sequence[TokenizedPrompt], change: Compiled) -> list[float]:
    """KL divergence (nats) of the first answer token from the clean model's to the intervened one's."""

    def run(batch: Batch) -> list[float]:
        with torch.inference_mode():
            before = model.last_logits(batch).log_softmax(-1)
            with change.on(batch):
                after = model.last_logits(batch).log_softmax(-1)
            return [max(0.0, float(kl)) for kl in (before.exp() * (before - after)).sum(-1)]

    return model.each(items, run)


def preference(
    model: ChatModel,
    items: Sequence[TokenizedPrompt],
    first: Sequence[int],
    second: Sequence[int],
    change: Compiled | None = None,
) -> list[float]:
    """Log-odds (nats) that the first answer token is one of `first` rather than one of `second`."""

    def run(batch: Batch) -> list[float]:
        with torch.inference_mode(), nullcontext() if change is None else change.on(batch):
            logits = model.last_logits(batch)
            return (logits[:, list(first)].logsumexp(-1) - logits[:, list(second)].logsumexp(-1)).tolist()

    return model.each(items, run)


__all__ = [
    "TokenLoss",
    "answer_token_losses",
    "answers_to_score",
    "first_token_kl",
    "preference",
    "texts_to_score",
    "token_losses",
]
