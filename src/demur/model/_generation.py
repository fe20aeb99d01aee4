"""Batched answers of a chat model, with or without an intervention."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from demur.model._chat_format import Batch
from demur.model._hooks import BoundIntervention
from demur.types import Answer, Prompt, as_prompts

if TYPE_CHECKING:
    from demur.model._chat_model import ChatModel


def _config(model: ChatModel, max_new_tokens: int, temperature: float | None) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0,
        top_k=0 if temperature is not None else 50,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=list(model.eos_ids) or None,
        pad_token_id=model.pad_id,
        return_dict_in_generate=False,
    )


@contextmanager
def _own_defaults(model: ChatModel, config: Any) -> Iterator[None]:
    """Keep the checkpoint's generation settings out: `generate` fills in from them whatever is not set."""
    holder = cast("Any", model.hf)
    before, holder.generation_config = holder.generation_config, config
    try:
        yield
    finally:
        holder.generation_config = before


def _answer(model: ChatModel, tokens: Int[Tensor, " new"]) -> tuple[str, bool]:
    """Text up to the end of the model's turn, and whether it came to one."""
    ids: list[int] = tokens.tolist()
    end = next((n for n, token in enumerate(ids) if token in model.eos_ids), None)
    return model.decode(ids[:end]), end is not None


def answer_batches(
    model: ChatModel,
    prompts: Iterable[Prompt | str],
    intervention: BoundIntervention | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    done: Collection[str] = (),
) -> Iterator[list[Answer]]:
    """Answer prompts batch by batch, and yield each batch's answers as soon as they are there.

    Args:
        model: the chat model.
        prompts: what to answer; batched by length.
        intervention: what to do to the model meanwhile, beside the interventions that are open already.
        max_new_tokens: limit on an answer's length.
        temperature: None for greedy decoding; sampling is from the whole distribution and repeatable by `seed`.
        seed: of sampling; has no effect on greedy decoding.
        done: ids of prompts already answered: a batch that holds only such prompts is left out, other batches are
            answered whole, so that a resumed job yields what a clean one would.

    Raises:
        InputError: a prompt does not fit the context together with `max_new_tokens`.
    """
    prompts = as_prompts(prompts)
    items = model.tokenize(prompts, new_tokens=max_new_tokens)
    config = _config(model, max_new_tokens, temperature)
    compiled = [] if intervention is None else [intervention.compile(model)]
    devices = [model.device] if model.device.type == "cuda" else []

    def run(batch: Batch) -> tuple[str, list[tuple[str, bool]]]:
        seeded = torch.random.fork_rng(devices, enabled=temperature is not None)
        with (
            seeded,
            torch.inference_mode(),
            _own_defaults(model, config),
            model.installed(compiled),
            model.serving(batch),
        ):
            if temperature is not None:
                torch.manual_seed(seed)
            tokens: Tensor = cast("Any", model.hf).generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
            )
            return model.intervention_id, [_answer(model, row[batch.input_ids.shape[1] :]) for row in tokens]

    for places, (name, answers) in model.over_batches(items, run, extra_tokens=max_new_tokens, done=done):
        yield [
            Answer(prompt=prompts[place], text=text, intervention=name, finished=finished)
            for place, (text, finished) in zip(places, answers, strict=True)
        ]
