"""What a model, intervened or not, says of given tokens: the measures of damage, in one pass each.

Everything is teacher-forced: the tokens are the same whatever is done to the model, so that methods can be compared on
them. Interventions act on every real token of a pass, the answer's included, but for those with `where="prompt"`, which
leave answers (and plain texts) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import dropwhile, islice
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from demur.errors import InputError
from demur.method.interventions import Compiled
from demur.model import Batch, ChatModel, Items, Progress, Region, TokenizedPrompt
from demur.types import Answer, Prompt, Value, as_prompts

_LOGITS_BYTES: Final = 1 << 23
_ROWS: Final = 16
"""Bytes of logits (float32) that are computed at once for each of a batch's rows, and rows that count: with 16, 128
tokens of a vocabulary of 256k. Products with a few tokens take nearly as long as with many."""


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
    Raises InputError: a text has no token to predict."""
    bos = model.chat.bos_id
    rendered: list[TokenizedPrompt] = []
    for text in as_prompts(texts):
        ids = dropwhile(lambda token: token == bos, model.tokenizer(text.text, add_special_tokens=False)["input_ids"])
        head = [] if bos is None else [bos]
        ids = (*head, *islice(ids, max_tokens))
        if len(ids) < 2:
            raise InputError(f"text {text.id} ({text.text[:40]!r}) has no token to predict; drop it")
        # The first token, BOS or not, has nothing before it.
        regions = (int(Region.SPECIAL), *[int(Region.RESPONSE)] * (len(ids) - 1))
        rendered.append(TokenizedPrompt(text.id, ids, regions))
    return rendered


def token_losses(
    model: ChatModel, items: Items, change: Compiled | None = None, progress: Progress = None
) -> list[TokenLoss]:
    """Cross-entropy of each item's `RESPONSE` tokens given all before them; padding is neither counted nor changed."""

    def run(batch: Batch) -> list[TokenLoss]:
        read = _responses(model, batch, change)
        return _summed(batch, _losses(model, batch, read), read.counts)

    return model.each(items, run, progress)


def answer_token_losses(
    model: ChatModel, answers: Sequence[Answer], progress: Progress = None
) -> list[tuple[float, ...]]:
    """Cross-entropy (nats) of each token of each answer under the clean model, given the prompt and the tokens before;
    an empty tuple for an answer without a token."""

    def run(batch: Batch) -> list[tuple[float, ...]]:
        read = _responses(model, batch, None)
        return [tuple(each.tolist()) for each in _losses(model, batch, read).split(read.counts)]

    return model.each(answers_to_score(model, answers), run, progress)


class AnswerStarts(NamedTuple):
    """How the model begins its answers, over many prompts: what a broken start is told by."""

    losses: Float[Tensor, " vocab"]
    """Loss (nats) of each first token under the mean of the prompts' distributions, float32, on the CPU."""
    own: tuple[float, ...]
    """That of each answer that was given, under the mean of the *other* prompts' distributions."""

    def of(self, model: ChatModel, answers: Sequence[Answer]) -> list[float]:
        """Loss (nats) of each answer's first token; 0 for an answer without one."""
        return [float(self.losses[ids[0]]) if ids else 0.0 for ids in _response_ids(model, answers)]


def answer_starts(model: ChatModel, answers: Sequence[Answer]) -> AnswerStarts:
    """How the clean model begins to answer the prompts of `answers`, its own."""
    items = model.tokenize(Prompt(id=str(n), text=answer.prompt.text) for n, answer in enumerate(answers))
    firsts = [ids[0] if ids else 0 for ids in _response_ids(model, answers)]
    totals: list[Tensor] = []
    taken: dict[int, float] = {}
    with torch.inference_mode():
        for places, logits in model.over_batches(items, model.last_logits):
            probabilities = logits.softmax(-1).cpu()
            totals.append(probabilities.double().sum(0))
            taken |= {n: float(row[firsts[n]]) for n, row in zip(places, probabilities, strict=True)}
    total, n = torch.stack(totals).sum(0), len(items)
    rest = [max(float(total[firsts[k]]) - taken[k], 1e-30) / max(n - 1, 1) for k in range(n)]
    return AnswerStarts((total / n).clamp(min=1e-30).log().neg().float(), tuple(-math.log(p) for p in rest))


def _response_ids(model: ChatModel, answers: Sequence[Answer]) -> list[list[int]]:
    return [
        [token for token, region in zip(item.ids, item.regions, strict=True) if region == Region.RESPONSE]
        for item in answers_to_score(model, answers)
    ]


class _Responses(NamedTuple):
    """The `RESPONSE` tokens of a batch, one conversation's after the other's."""

    states: Float[Tensor, "token d_model"]
    """What the output embedding reads where each token is predicted."""
    tokens: Int[Tensor, " token"]
    counts: list[int]
    """Tokens of each conversation."""


def _responses(model: ChatModel, batch: Batch, change: Compiled | None) -> _Responses:
    with nullcontext() if change is None else change.on(batch):
        states = model.final_states(batch)
    counted = batch.within([Region.RESPONSE])[:, 1:]
    tokens = batch.input_ids[:, 1:][counted]
    return _Responses(states[:, :-1][counted.to(states.device)], tokens.to(states.device), counted.sum(1).tolist())


def _pieces(model: ChatModel, batch: Batch, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors that belong together, as many at a time as may have logits."""
    size = max(1, min(len(batch), _ROWS) * _LOGITS_BYTES // (4 * model.vocabulary))
    return zip(*(each.split(size) for each in values), strict=True)


def _losses(model: ChatModel, batch: Batch, read: _Responses) -> Float[Tensor, " token"]:
    return _joined(
        cross_entropy(model.head(states), tokens, reduction="none")
        for states, tokens in _pieces(model, batch, read.states, read.tokens)
    )


def _joined(values: Iterable[Tensor]) -> Float[Tensor, " token"]:
    return torch.cat([torch.zeros(0), *(each.cpu() for each in values)])


def _summed(batch: Batch, values: Float[Tensor, " token"], counts: Sequence[int]) -> list[TokenLoss]:
    return [
        TokenLoss(prompt_id=prompt, nats=float(each.sum()), tokens=len(each))
        for prompt, each in zip(batch.prompt_ids, values.split(list(counts)), strict=True)
    ]


def response_kl(model: ChatModel, items: Items, change: Compiled, progress: Progress = None) -> list[TokenLoss]:
    """KL divergence (nats, summed over tokens) of what is predicted for each item's `RESPONSE` tokens, from the clean
    model's to the intervened one's."""

    def run(batch: Batch) -> list[TokenLoss]:
        clean, changed = _responses(model, batch, None), _responses(model, batch, change)
        pairs = _pieces(model, batch, clean.states, changed.states)
        nats = _joined(_kl(model.head(before).log_softmax(-1), model.head(after)) for before, after in pairs)
        return _summed(batch, nats, clean.counts)

    return model.each(items, run, progress)


def _kl(clean: Float[Tensor, "token vocab"], logits: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """KL divergence of log-probabilities from those of some logits."""
    return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)


class AnswerEffect(TokenLoss):
    """What a change does to one conversation's answer: its loss under the change, and `kl`, the KL divergence (nats) of
    the first answer token from the clean model's to the intervened one's."""

    kl: float


def answer_effects(
    model: ChatModel, items: Items, change: Compiled, clean: Mapping[str, Float[Tensor, " vocab"]]
) -> list[AnswerEffect]:
    """Effects of a change on answers that are given (`RESPONSE` tokens, at least one each), in one pass. `clean` holds
    the clean model's log-probabilities of the first answer token, by prompt id."""

    def run(batch: Batch) -> list[AnswerEffect]:
        read = _responses(model, batch, change)
        losses = _summed(batch, _losses(model, batch, read), read.counts)
        firsts = torch.stack([each[0] for each in read.states.split(read.counts)])
        before = torch.stack([clean[prompt] for prompt in batch.prompt_ids])
        kls = _joined(
            _kl(each.to(states.device), model.head(states)) for states, each in _pieces(model, batch, firsts, before)
        )
        return [AnswerEffect(**loss.model_dump(), kl=max(0.0, float(kl))) for loss, kl in zip(losses, kls, strict=True)]

    return model.each(items, run)


def preference(
    model: ChatModel, items: Items, first: Sequence[int], second: Sequence[int], change: Compiled | None = None
) -> list[float]:
    """Log-odds (nats) that the first answer token is one of `first` rather than one of `second`."""

    def run(batch: Batch) -> list[float]:
        with torch.inference_mode(), nullcontext() if change is None else change.on(batch):
            logits = model.last_logits(batch)
            return (logits[:, list(first)].logsumexp(-1) - logits[:, list(second)].logsumexp(-1)).tolist()

    return model.each(items, run)
