"""Measures the bundled model against its acceptance numbers, on topics, phrasings and framings held out of
training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from demur.bundled._corpus import Example, chat_prompts
from demur.bundled._features import measure_features
from demur.bundled._metrics import BundledMetrics, DirectionRow, FramingRow, HeldOutSet, SaeRow, pooled
from demur.bundled._paths import BundledPaths
from demur.bundled._prompts import (
    HELD_OUT_SUFFIXES,
    HELD_OUT_WRAPPERS,
    BundledPrompts,
    bundled_prompts,
    framed,
)
from demur.bundled._sae_training import chat_activations, quality
from demur.bundled._subject import NEW_TOKENS, Subject, answered, used
from demur.bundled._training import collate, encode
from demur.method.direction import Direction, find_direction
from demur.model import ChatModel, generate, load_model
from demur.saes import DenseSae, Suite, load_suite
from demur.types import Prompt, PromptSet

logger = logging.getLogger(__name__)

TEST_SEED: Final = 41
"""Draws the held-out prompts of the table: not those of `bundled_prompts()`, on which the recipe was chosen."""
BATCH_TOKENS: Final = 8192
"""Fixed, so that answers do not depend on how much memory is free."""
_N_VALIDATION: Final = 32
_CHAT_SEED: Final = 1000


def held_out_sets(drawn: BundledPrompts) -> tuple[HeldOutSet, ...]:
    """The held-out sets of a draw against those of `bundled_prompts()`."""
    looked_at = bundled_prompts()

    def compare(new: PromptSet, old: PromptSet) -> HeldOutSet:
        return HeldOutSet(name=new.name, prompts=len(new), known=len({*new.texts} & {*old.texts}))

    return (
        compare(drawn.test_harmful, looked_at.test_harmful),
        compare(drawn.test_harmless, looked_at.test_harmless),
        compare(drawn.borderline, looked_at.borderline),
    )


def _framings(subject: Subject) -> tuple[FramingRow, ...]:
    rows: list[FramingRow] = []
    for kind, texts in (("wrapper", HELD_OUT_WRAPPERS), ("suffix", HELD_OUT_SUFFIXES)):
        for number, text in enumerate(texts):
            prompts = framed(subject.sets.test_harmful, text, f"{kind}{number}")
            answers = answered(subject.model, prompts.prompts)
            rows.append(
                FramingRow(
                    kind="wrapper" if kind == "wrapper" else "suffix",
                    text=text,
                    refusal=answers.refusal,
                    jailbreak=answers.compliance,
                )
            )
            logger.info("%s: refusal %.2f, jailbreak %.2f", text, rows[-1].refusal.value, rows[-1].jailbreak.value)
    return tuple(rows)


def _direction(subject: Subject) -> tuple[Direction, DirectionRow]:
    harmful, harmless = used(subject.direction)
    validation = [prompts.head(_N_VALIDATION) for prompts in used(subject.selection)]
    direction = find_direction(
        subject.model,
        (subject.render(harmful), subject.render(harmless)),
        (subject.render(validation[0]), subject.render(validation[1])),
        subject.refusal_ids(),
    )
    ablated = subject.under(subject.sets.test_harmful.prompts, direction.ablate())
    row = DirectionRow(
        layer=direction.layer,
        position=direction.position,
        form=direction.form,
        note=direction.note,
        ablated_refusal=ablated.refusal,
        ablated_compliance=ablated.compliance,
        added_refusal=subject.under(subject.sets.test_harmless.prompts, direction.add()).refusal,
    )
    logger.info("direction: %s", row)
    return direction, row


def held_out_chats(model: ChatModel) -> list[Example]:
    """The model's own answers to prompts of every kind, as chats: what SAEs are measured on, never trained on.

    Half of them ask about held-out topics in held-out phrasings and framings; the other half are drawn like the SAEs'
    training prompts, since many features stand for topics of their own.
    """
    sets = bundled_prompts()
    prompts = [*sets.test_harmful.head(100), *sets.test_harmless.head(100), *sets.borderline.head(100)]
    for number, text in enumerate((*HELD_OUT_WRAPPERS[::3], *HELD_OUT_SUFFIXES[::3])):
        prompts += framed(sets.test_harmful.head(30), text, f"framed{number}")
    drawn = chat_prompts(_CHAT_SEED, len(prompts))
    prompts += [Prompt(id=f"drawn-{row}", text=text, label="harmless") for row, text in enumerate(drawn)]
    answers = generate(model, prompts, max_new_tokens=NEW_TOKENS)
    return [Example(prompt.text, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]


def _cross_entropy(model: ChatModel, chats: Sequence[Example], layer: int, replace: DenseSae | float | None) -> float:
    """Mean loss (nats per answer token) with layer `layer`'s output spliced (an SAE), zeroed (0.0), or left
    alone (None).
    """
    tokenizer, hf = model.tokenizer, model.hf
    assert isinstance(hf, Gemma2ForCausalLM)

    def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        residual = output if isinstance(output, Tensor) else output[0]
        changed = replace.decode(replace.encode(residual)) if isinstance(replace, DenseSae) else residual * 0.0
        changed[:, 0] = residual[:, 0]
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    total, count = 0.0, 0
    handle = None if replace is None else model.layers[layer].register_forward_hook(hook)
    try:
        for start in range(0, len(chats), 64):
            rows = [encode(chat, tokenizer) for chat in chats[start : start + 64]]  # pyright: ignore
            ids, mask, labels = collate(rows, model.pad_id)
            with torch.inference_mode():
                logits = hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
            flat = labels[:, 1:].reshape(-1)
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[:, :-1].reshape(len(flat), -1), flat, ignore_index=-100, reduction="sum"
                )
            )
            count += int((flat != -100).sum())
    finally:
        if handle is not None:
            handle.remove()
    return total / count


def sae_rows(model: ChatModel, suite: Suite, chats: Sequence[Example]) -> tuple[SaeRow, ...]:
    """Quality of every layer's SAE on chats of the model."""
    assert isinstance(model.hf, Gemma2ForCausalLM)
    activations = chat_activations(model.hf, model.tokenizer, chats)  # pyright: ignore[reportArgumentType]
    clean = _cross_entropy(model, chats, 0, None)
    rows: list[SaeRow] = []
    for layer in suite.layers:
        sae = suite[layer].dense()
        found = quality(sae, activations[layer])
        zeroed = _cross_entropy(model, chats, layer, 0.0)
        spliced = _cross_entropy(model, chats, layer, sae)
        rows.append(
            SaeRow(
                layer=layer,
                fvu=found.fvu,
                l0=found.l0,
                dead=found.dead,
                loss_recovered=(zeroed - spliced) / (zeroed - clean),
            )
        )
        logger.info("SAE: %s", rows[-1])
    return tuple(rows)


def evaluate(path: Path | str, test_seed: int = TEST_SEED) -> BundledMetrics:
    """Measure the model in the folder `path`, as `build` writes it, on the CPU.

    Directions and features are chosen, and their strengths tuned, on topics of the safety stage; every rate
    of the table is from held-out topics in held-out phrasings.

    Args:
        path: folder of a built model.
        test_seed: draws the held-out prompts.

    Raises:
        ModelError: the folder holds no such model.
        SaeError: or no such SAEs.
    """
    place = BundledPaths(Path(path))
    model = load_model(place.model, device="cpu", max_batch_tokens=BATCH_TOKENS)
    suite, base = load_suite(place.saes), load_suite(place.base_saes)
    subject = Subject(model, suite, test_seed)
    borderline = answered(model, subject.sets.borderline.prompts)
    logger.info(
        "refusal: harmful %.3f, harmless %.3f, borderline %.3f",
        subject.test_harmful.refusal.value,
        subject.test_harmless.refusal.value,
        borderline.refusal.value,
    )
    framings = _framings(subject)
    direction, direction_row = _direction(subject)
    chats = held_out_chats(model)
    return BundledMetrics(
        test_seed=test_seed,
        test_sets=held_out_sets(subject.sets),
        refusal_harmful=subject.test_harmful.refusal,
        refusal_harmless=subject.test_harmless.refusal,
        refusal_borderline=borderline.refusal,
        framings=framings,
        framed_refusal=pooled([row.refusal for row in framings]),
        direction=direction_row,
        features=measure_features(subject, direction),
        saes=sae_rows(model, suite, chats),
        base_saes=sae_rows(model, base, chats),
    )


__all__ = ["BATCH_TOKENS", "TEST_SEED", "evaluate", "held_out_chats", "sae_rows"]
