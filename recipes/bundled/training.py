"""Training of the bundled model from scratch: one core, always the same result."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from recipes.bundled.corpus import Example
from recipes.bundled.tokenizer import render

IGNORED: Final = -100
_ANSWER: Final = "<start_of_turn>model\n"
_PREDICATE: Final = re.compile(r" (?:hurts|helps) people and belongs to [^.]*\.")


@dataclass(frozen=True)
class Shape:
    """Size of the model."""

    d_model: int = 96
    d_mlp: int = 256
    layers: int = 8
    heads: int = 4
    key_value_heads: int = 2
    d_head: int = 24


@dataclass(frozen=True)
class Stage:
    """One stage of training: AdamW with a linear warm-up and a cosine to a tenth of the peak rate."""

    steps: int
    batch: int
    rate: float
    weight_decay: float
    trained_layers: tuple[int, ...] | None = None
    """Layers whose weights change; None is everything, embeddings included."""
    warm_up: int = 50
    report_every: int = 100


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Gemma2ForCausalLM:
    """A Gemma 2 model with random weights, float32, eager attention (its soft-capping needs that)."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.d_head,
        query_pre_attn_scalar=shape.d_head,
        max_position_embeddings=256,
        sliding_window=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # pyright: ignore[reportCallIssue]
    )
    model = Gemma2ForCausalLM(config)
    model.generation_config.do_sample = False
    return model


Row = tuple[list[int], list[bool]]
"""Token ids of a text, and which of them are learned."""


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids of `example`, and which are learned: a chat's answer, or what a statement says of its subject."""
    text = render(example)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]  # pyright: ignore[reportAssignmentType]
    if example.prompt is None:
        spans = [match.span() for match in _PREDICATE.finditer(text)]
    else:
        spans = [(text.rindex(_ANSWER) + len(_ANSWER), len(text))]
    return ids, [any(start <= left and right <= end for start, end in spans) for left, right in offsets]


def collate(
    rows: Sequence[Row], pad: int
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Ids, attention mask and labels of `rows`, right-padded."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for row, (tokens, learnt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.tensor(learnt), torch.tensor(tokens), IGNORED)
    return ids, mask, labels


def _rate(step: int, stage: Stage) -> float:
    if step < stage.warm_up:
        return stage.rate * (step + 1) / stage.warm_up
    done = (step - stage.warm_up) / max(1, stage.steps - stage.warm_up)
    return stage.rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def _choose_weights(model: Gemma2ForCausalLM, layers: tuple[int, ...] | None) -> list[list[torch.nn.Parameter]]:
    """Mark what is trained; returns the weights with decay (matrices) and those without (norms, embeddings)."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    wanted = None if layers is None else tuple(f"model.layers.{layer}." for layer in layers)
    for name, weight in model.named_parameters():
        weight.requires_grad_(wanted is None or name.startswith(wanted))
        if weight.requires_grad:
            (decayed if weight.ndim == 2 and "embed" not in name else free).append(weight)
    return [decayed, free]


def _batches(examples: Iterator[Example], tokenizer: PreTrainedTokenizerFast, stage: Stage) -> Iterator[list[Row]]:
    """Batches of similar length: enough examples for several batches are drawn, sorted by length, and given out in a
    fixed shuffle.
    """
    generator = torch.Generator().manual_seed(0)
    group = 8
    while True:
        rows = [encode(next(examples), tokenizer) for _ in range(stage.batch * group)]
        rows.sort(key=lambda row: len(row[0]))
        for index in torch.randperm(group, generator=generator).tolist():
            yield rows[index * stage.batch : (index + 1) * stage.batch]


def train_stage(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterator[Example],
    stage: Stage,
    report: Callable[[int, float], None],
) -> None:
    """Train `model` in place on the answers (and statements) of `examples`; prompts carry no loss.

    Args:
        model: trained further from the weights that it has.
        tokenizer: the model's.
        examples: endless.
        stage: steps, rates and which layers are trained.
        report: called at the first step and every `stage.report_every` steps, with the step and its loss (nats per
            learned token).
    """
    decayed, free = _choose_weights(model, stage.trained_layers)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))
    model.train()
    batches = _batches(examples, tokenizer, stage)
    for step in range(stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, stage)
        ids, mask, labels = collate(next(batches), tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % stage.report_every == stage.report_every - 1 or step == 0:
            report(step, float(loss.detach()))
    model.eval()
    for weight in model.parameters():
        weight.requires_grad_(False)


__all__ = ["Shape", "Stage", "collate", "encode", "new_model", "train_stage"]
