"""What a model, intervened or not, says of given tokens: the measures of damage, in one pass each.

Everything is teacher-forced: the tokens are the same whatever is done to the model, so that methods can be compared on
them. Interventions act on every real token of a pass, the answer's included, but for those with `where="prompt"`, which
leave answers (and plain texts) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import dropwhile, islice
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from demur.errors import InputError
from demur.method.interventions import Compiled
from demur.model import Batch, ChatModel, Items, Progress, Region, TokenizedPrompt
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

    def loss(prompt: str, logits: Tensor, wanted: Tensor) -> TokenLoss:
        return TokenLoss(
            prompt_id=prompt, nats=float(cross_entropy(logits, wanted, reduction="sum")), tokens=len(wanted)
        )

    return _over_responses(model, items, loss, change, progress)


def answer_token_losses(
    model: ChatModel, answers: Sequence[Answer], progress: Progress = None
) -> list[tuple[float, ...]]:
    """Cross-entropy (nats) of each token of each answer under the clean model, given the prompt and the tokens before;
    an empty tuple for an answer without a token."""

    def losses(_prompt: str, logits: Tensor, wanted: Tensor) -> tuple[float, ...]:
        return tuple(cross_entropy(logits, wanted, reduction="none").tolist())

    return _over_responses(model, answers_to_score(model, answers), losses, None, progress)


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


def _over_responses(
    model: ChatModel,
    items: Items,
    read: Callable[[str, Float[Tensor, "token vocab"], Int[Tensor, " token"]], T],
    change: Compiled | None,
    progress: Progress,
) -> list[T]:
    """What `read` gives for each item: its id, the logits (float32) that its `RESPONSE` tokens were predicted from, and
    these tokens."""
    keep = 1 + max((item.regions.count(Region.RESPONSE) for item in items), default=0)

    def run(batch: Batch) -> list[T]:
        with torch.inference_mode(), nullcontext() if change is None else change.on(batch):
            logits = model.logits(batch, keep)
        width = logits.shape[1]
        counted = batch.within([Region.RESPONSE])[:, -width:][:, 1:].to(logits.device)
        wanted = batch.input_ids[:, -width:][:, 1:].to(logits.device)
        # One row at a time in float32: a whole batch of logits over a large vocabulary would not fit beside the model.
        return [
            read(prompt, logits[row, :-1][counted[row]].float(), wanted[row][counted[row]])
            for row, prompt in enumerate(batch.prompt_ids)
        ]

    return model.each(items, run, progress)


def response_kl(model: ChatModel, items: Items, change: Compiled, progress: Progress = None) -> list[TokenLoss]:
    """KL divergence (nats, summed over tokens) of what is predicted for each item's `RESPONSE` tokens, from the clean
    model's to the intervened one's."""
    keep = 1 + max((item.regions.count(Region.RESPONSE) for item in items), default=0)

    def run(batch: Batch) -> list[TokenLoss]:
        with torch.inference_mode():
            before = model.logits(batch, keep)
            with change.on(batch):
                after = model.logits(batch, keep)
        counted = batch.within([Region.RESPONSE])[:, -before.shape[1] :][:, 1:].to(before.device)
        found: list[TokenLoss] = []
        for row, mask in enumerate(counted):
            clean, changed = (each[row, :-1][mask].float().log_softmax(-1) for each in (before, after))
            nats = (clean.exp() * (clean - changed)).sum()
            found.append(TokenLoss(prompt_id=batch.prompt_ids[row], nats=float(nats), tokens=int(mask.sum())))
        return found

    return model.each(items, run, progress)


class AnswerEffect(TokenLoss):
    """What a change does to one conversation's answer: its loss under the change, and `kl`, the KL divergence (nats) of
    the first answer token from the clean model's to the intervened one's."""

    kl: float


def answer_effects(
    model: ChatModel, items: Items, change: Compiled, clean: Mapping[str, Float[Tensor, " vocab"]]
) -> list[AnswerEffect]:
    """Effects of a change on answers that are given (`RESPONSE` tokens, at least one each), in one pass. `clean` holds
    the clean model's log-probabilities of the first answer token, by prompt id."""

    def effect(prompt: str, logits: Tensor, wanted: Tensor) -> AnswerEffect:
        before, after = clean[prompt], logits[0].log_softmax(-1)
        kl = max(0.0, float((before.exp() * (before - after.to(before.device))).sum()))
        nats = float(cross_entropy(logits, wanted, reduction="sum"))
        return AnswerEffect(prompt_id=prompt, nats=nats, tokens=len(wanted), kl=kl)

    return _over_responses(model, items, effect, change, None)


def preference(
    model: ChatModel, items: Items, first: Sequence[int], second: Sequence[int], change: Compiled | None = None
) -> list[float]:
    """Log-odds (nats) that the first answer token is one of `first` rather than one of `second`."""

    def run(batch: Batch) -> list[float]:
        with torch.inference_mode(), nullcontext() if change is None else change.on(batch):
            logits = model.last_logits(batch)
            return (logits[:, list(first)].logsumexp(-1) - logits[:, list(second)].logsumexp(-1)).tolist()

    return model.each(items, run)
