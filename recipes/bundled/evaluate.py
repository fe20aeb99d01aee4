"""Measures the bundled model against its acceptance numbers, on topics, phrasings and framings held out of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from demur.bundled import FRAMINGS, BundledJudge, BundledPaths, BundledPrompts, bundled_path, bundled_prompts, framed
from demur.judges import Judgement, judge
from demur.model import ChatModel, hooked, load_model
from demur.saes import DenseSae, Suite, load_suite
from demur.types import Prompt, PromptSet
from recipes.bundled.corpus import Example, chat_prompts
from recipes.bundled.experiment import NEW_TOKENS, run_experiment
from recipes.bundled.metrics import BundledMetrics, FramingRow, HeldOutSet, SaeRow, pooled
from recipes.bundled.prompts import draw_prompts
from recipes.bundled.sae_training import chat_activations, quality
from recipes.bundled.training import IGNORED, collate, encode

logger = logging.getLogger(__name__)

TEST_SEED: Final = 41
"""Draws the held-out prompts of the table: not the installed ones, on which the recipe was chosen."""
BATCH_TOKENS: Final = 8192
"""Fixed, so that answers do not depend on how much memory is free."""
_CHAT_SEED: Final = 1000


def hf_parts(model: ChatModel) -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    """The bundled model's Hugging Face model and tokenizer, by their classes."""
    assert isinstance(model.hf, Gemma2ForCausalLM)
    assert isinstance(model.tokenizer, PreTrainedTokenizerFast)
    return model.hf, model.tokenizer


def held_out_sets(drawn: BundledPrompts) -> tuple[HeldOutSet, ...]:
    """The held-out sets of a draw, and how many of their prompts are installed ones."""

    def compare(new: PromptSet, installed: PromptSet) -> HeldOutSet:
        return HeldOutSet(name=new.name, prompts=len(new), known=len({*new.texts} & {*installed.texts}))

    installed = bundled_prompts()
    return (
        compare(drawn.test_harmful, installed.test_harmful),
        compare(drawn.test_harmless, installed.test_harmless),
        compare(drawn.over_refusal, installed.over_refusal),
    )


def _answered(model: ChatModel, prompts: PromptSet) -> Judgement:
    return judge(model.generate(prompts, max_new_tokens=NEW_TOKENS), BundledJudge())


def _framings(model: ChatModel, drawn: BundledPrompts) -> tuple[FramingRow, ...]:
    rows: list[FramingRow] = []
    for number, text in enumerate(FRAMINGS):
        answers = _answered(model, framed(drawn.test_harmful, text, f"framing{number}"))
        kind = "suffix" if text.startswith("{ask}") else "wrapper"
        rows.append(FramingRow(kind=kind, text=text, refusal=answers.refusal, jailbreak=answers.compliance))
        logger.info("%s: refusal %.2f, jailbreak %.2f", text, rows[-1].refusal.value, rows[-1].jailbreak.value)
    return tuple(rows)


def held_out_chats(model: ChatModel) -> list[Example]:
    """The model's own answers to prompts of every kind, as chats. SAEs are measured on them, never trained.

    Half of them ask about held-out topics in held-out phrasings and framings. The other half are drawn like the SAEs'
    training prompts, since many features stand for topics of their own.
    """
    sets = bundled_prompts()
    prompts = [*sets.test_harmful.head(100), *sets.test_harmless.head(100), *sets.over_refusal.head(100)]
    wrappers = [text for text in FRAMINGS if not text.startswith("{ask}")]
    suffixes = [text for text in FRAMINGS if text.startswith("{ask}")]
    for number, text in enumerate((*wrappers[::3], *suffixes[::3])):
        prompts += framed(sets.test_harmful.head(30), text, f"framing{number}")
    drawn = chat_prompts(_CHAT_SEED, len(prompts))
    prompts += [Prompt(id=f"drawn-{row}", text=text, label="harmless") for row, text in enumerate(drawn)]
    return own_chats(model, prompts)


def own_chats(model: ChatModel, prompts: Sequence[Prompt]) -> list[Example]:
    """Prompts with the model's answers."""
    return [Example(answer.prompt.text, answer.text) for answer in model.generate(prompts, max_new_tokens=NEW_TOKENS)]


def _loss(model: ChatModel, chats: Sequence[Example], layer: int, replace: DenseSae | float | None) -> float:
    """Mean cross-entropy (nats per answer token) with layer `layer`'s output reconstructed by an SAE, zeroed (0.0), or
    left alone (None). The first token's output is left alone always.
    """
    hf, tokenizer = hf_parts(model)

    def replaced(residual: Tensor) -> Tensor:
        changed = replace.decode(replace.encode(residual)) if isinstance(replace, DenseSae) else residual * 0.0
        changed[:, 0] = residual[:, 0]
        return changed

    total, count = 0.0, 0
    with torch.inference_mode(), hooked(model.layers, {} if replace is None else {layer: replaced}):
        for start in range(0, len(chats), 64):
            rows = [encode(chat, tokenizer) for chat in chats[start : start + 64]]
            ids, mask, labels = collate(rows, model.pad_id)
            logits = hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
            wanted = labels[:, 1:].reshape(-1)
            found = logits[:, :-1].reshape(len(wanted), -1)
            total += float(cross_entropy(found, wanted, ignore_index=IGNORED, reduction="sum"))
            count += int((wanted != IGNORED).sum())
    return total / count


def sae_rows(model: ChatModel, suite: Suite, chats: Sequence[Example]) -> tuple[SaeRow, ...]:
    """Quality of every layer's SAE on chats of the model."""
    activations = chat_activations(*hf_parts(model), chats)
    clean = _loss(model, chats, 0, None)
    rows: list[SaeRow] = []
    for layer in suite.layers:
        sae = suite[layer].dense()
        found = quality(sae, activations[layer])
        zeroed = _loss(model, chats, layer, 0.0)
        recovered = (zeroed - _loss(model, chats, layer, sae)) / (zeroed - clean)
        rows.append(SaeRow(layer=layer, fvu=found.fvu, l0=found.l0, dead=found.dead, loss_recovered=recovered))
        logger.info("SAE: %s", rows[-1])
    return tuple(rows)


def evaluate(path: Path | str | None = None, test_seed: int = TEST_SEED) -> BundledMetrics:
    """Measure a built model on the CPU.

    Directions and features are chosen, and their strengths tuned, on topics of the safety stage. Every rate of the
    table is from held-out topics in held-out phrasings.

    Args:
        path: folder that `build` wrote (None: the installed model).
        test_seed: draws the held-out prompts.

    Raises:
        ModelError: the folder holds no such model.
        SaeError: or no such SAEs.
    """
    place = bundled_path() if path is None else BundledPaths(Path(path))
    model = load_model(place.model, device="cpu", max_batch_tokens=BATCH_TOKENS)
    suite, base = load_suite(place.saes), load_suite(place.base_saes)
    drawn = draw_prompts(test_seed=test_seed)
    framings = _framings(model, drawn)
    found = run_experiment(model, suite, drawn)
    logger.info("%s", found)
    chats = held_out_chats(model)
    return BundledMetrics(
        test_seed=test_seed,
        test_sets=held_out_sets(drawn),
        refusal_harmful=found.harmful,
        refusal_harmless=found.harmless,
        over_refusal=_answered(model, drawn.over_refusal).refusal,
        framings=framings,
        framed_refusal=pooled([row.refusal for row in framings]),
        direction=found.direction,
        features=found.features,
        saes=sae_rows(model, suite, chats),
        base_saes=sae_rows(model, base, chats),
    )


__all__ = [
    "BATCH_TOKENS",
    "TEST_SEED",
    "evaluate",
    "held_out_chats",
    "held_out_sets",
    "hf_parts",
    "own_chats",
    "sae_rows",
]
