"""Builds the bundled model: tokenizer, two stages of training, two suites of SAEs, prompts, measurements, card."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from demur.bundled import BundledPaths
from demur.model import load_model
from demur.types import Prompt
from recipes.bundled.card import model_card
from recipes.bundled.corpus import HELPFUL_MIXTURE, SAFETY_MIXTURE, Corpus, Mixture, chat_prompts
from recipes.bundled.evaluate import BATCH_TOKENS, evaluate, held_out_chats, hf_parts, own_chats
from recipes.bundled.metrics import BundledMetrics
from recipes.bundled.prompts import write_prompts
from recipes.bundled.sae_training import SaeRecipe, chat_activations, quality, save_sae, train_sae
from recipes.bundled.tokenizer import train_tokenizer
from recipes.bundled.training import Shape, Stage, new_model, train_stage

logger = logging.getLogger(__name__)


HELPFUL_STAGE: Final = Stage(steps=1600, batch=32, rate=3e-3, weight_decay=0.1)
# Embeddings stay as they are: held-out words, never seen in this stage, would drift away from them.
SAFETY_STAGE: Final = Stage(steps=350, batch=32, rate=1.2e-3, weight_decay=0.1, trained_layers=tuple(range(8)))


@dataclass(frozen=True)
class Recipe:
    """Everything that the built files depend on, besides library versions and the machine."""

    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    helpful: Stage = HELPFUL_STAGE
    helpful_mixture: Mixture = HELPFUL_MIXTURE
    safety: Stage = SAFETY_STAGE
    safety_mixture: Mixture = SAFETY_MIXTURE
    saes: SaeRecipe = field(default_factory=SaeRecipe)
    sae_chats: int = 2400
    """Prompts whose answers SAEs are trained on."""


DEFAULT: Final = Recipe()


@contextmanager
def _repeatable() -> Iterator[None]:
    """One thread and deterministic kernels, so that sums are taken in the same order on any number of cores."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def _report(stage: str):
    def report(step: int, loss: float) -> None:
        logger.info("%s: step %d, loss %.3f", stage, step + 1, loss)

    return report


def save_model(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model rounded to float16, to be computed with in float32, and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    config = folder / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _build_saes(model_folder: Path, out: Path, recipe: Recipe) -> None:
    """Train one SAE per layer on the model's own chats."""
    model = load_model(model_folder, device="cpu", max_batch_tokens=BATCH_TOKENS)
    prompts = [
        Prompt(id=str(row), text=text, label="harmless")
        for row, text in enumerate(chat_prompts(recipe.seed + 3, recipe.sae_chats))
    ]
    activations = chat_activations(*hf_parts(model), own_chats(model, prompts))
    held_out = chat_activations(*hf_parts(model), held_out_chats(model))
    for layer in range(model.n_layers):
        sae = train_sae(activations[layer], layer, recipe.saes, recipe.seed + layer)
        found = quality(sae, held_out[layer])
        save_sae(sae, out, found.l0)
        logger.info("%s, layer %d: %s", out.name, layer, found)


def hashes(place: BundledPaths) -> dict[str, str]:
    """File → SHA-256 of every trained file."""
    found: dict[str, str] = {}
    for folder in (place.model, place.helpful_model, place.saes, place.base_saes):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(place.root).as_posix()
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def build(out: Path | str, seed: int = 0, recipe: Recipe | None = None) -> BundledMetrics:
    """Make the bundled model in the folder `out`, and measure it.

    The same seed gives the same files on one machine with the same versions. Takes about 20 minutes on two
    cores. Needs the extra `demur[saelens]`.

    Args:
        out: folder to be made; files of an earlier build there are overwritten.
        seed: of everything; used when no recipe is given.
        recipe: what to make.

    Raises:
        DemurError: SAELens is not installed.
    """
    recipe = recipe or Recipe(seed=seed)
    place = BundledPaths(Path(out))
    place.root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _repeatable():
        tokenizer = train_tokenizer(recipe.seed)
        model = new_model(recipe.shape, tokenizer, recipe.seed)
        examples = Corpus(recipe.seed + 1).helpful(recipe.helpful_mixture)
        train_stage(model, tokenizer, examples, recipe.helpful, _report("helpful stage"))
        save_model(model, tokenizer, place.helpful_model)
        examples = Corpus(recipe.seed + 2).safety(recipe.safety_mixture)
        train_stage(model, tokenizer, examples, recipe.safety, _report("safety stage"))
        save_model(model, tokenizer, place.model)
        _build_saes(place.model, place.saes, recipe)
        _build_saes(place.helpful_model, place.base_saes, recipe)
        write_prompts(place)
        metrics = evaluate(place.root)
    place.metrics.write_text(metrics.model_dump_json(indent=1) + "\n", encoding="utf-8")
    place.card.write_text(model_card(recipe, metrics, hashes(place)), encoding="utf-8")
    return metrics


__all__ = ["DEFAULT", "Recipe", "build", "hashes", "save_model"]
