"""SAEs for every layer of the bundled model, trained on its own chats with SAELens's BatchTopK trainer.

They are stored as JumpReLU dictionaries with unit decoder rows, in Gemma Scope's layout. Weights are rounded to float16
before the threshold is set, so what is measured is what is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from demur.errors import DemurError
from demur.saes import DenseSae
from recipes.bundled.corpus import Example
from recipes.bundled.tokenizer import render

_DEAD_AFTER: Final = 60
"""Batches without firing after which a feature counts as dead."""


@dataclass(frozen=True)
class SaeRecipe:
    """How one layer's SAE is trained."""

    d_sae: int = 384
    k: float = 16.0
    """Mean active features per token, in training and in the stored dictionary."""
    steps: int = 800
    batch: int = 1024
    rate: float = 1.5e-3


def chat_activations(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    batch: int = 64,
) -> Float[Tensor, "layer tokens d_model"]:
    """Residuals after every layer at every token of rendered chats, BOS and padding left out; float32.

    Args:
        model: the Hugging Face model.
        tokenizer: the model's.
        examples: the chats; tokens are in the order of their lengths.
        batch: chats of one pass.
    """
    order = sorted(range(len(examples)), key=lambda row: len(render(examples[row])))
    found: list[list[Tensor]] = [[] for _ in model.model.layers]

    def keep(layer: int, kept: Tensor):
        def hook(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            residual = output if isinstance(output, Tensor) else output[0]
            found[layer].append(residual[kept])

        return hook

    for start in range(0, len(order), batch):
        texts = [render(examples[row]) for row in order[start : start + batch]]
        encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt", padding_side="right")
        mask = encoded["attention_mask"]
        kept = mask.bool()
        kept[:, 0] = False
        handles = [each.register_forward_hook(keep(n, kept)) for n, each in enumerate(model.model.layers)]
        try:
            with torch.inference_mode():
                model.model(input_ids=encoded["input_ids"], attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack([torch.cat(parts) for parts in found]).clone()


def _batches(activations: Float[Tensor, "tokens d_model"], batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for start in range(0, len(order) - batch + 1, batch):
            yield activations[order[start : start + batch]]


def train_sae(activations: Float[Tensor, "tokens d_model"], layer: int, recipe: SaeRecipe, seed: int) -> DenseSae:
    """Train one layer's SAE and bring it to the stored form.

    Args:
        activations: the residuals after the layer.
        layer: which one.
        recipe: size, sparsity and length of training.
        seed: of weights and batches.

    Raises:
        DemurError: SAELens is not installed.
    """
    try:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer
    except ImportError as error:
        raise DemurError("SAEs are trained with SAELens; install it with: pip install 'demur[saelens]'") from error

    torch.manual_seed(seed)
    mean = activations.mean(0)
    scale = (activations - mean).pow(2).sum(-1).mean().div(activations.shape[1]).sqrt()
    normed = (activations - mean) / scale
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=normed.shape[1], d_sae=recipe.d_sae, k=recipe.k, dtype="float32", device="cpu")
    )
    config = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch,
        train_batch_size_samples=recipe.batch,
        lr=recipe.rate,
        lr_end=recipe.rate / 10,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=50,
        dead_feature_window=_DEAD_AFTER,
    )
    batches = _batches(normed, recipe.batch, seed)
    trainer = SAETrainer(config, sae, batches)
    revivals = {recipe.steps * share // 8 for share in (2, 3, 4, 5, 6)}
    for step in range(recipe.steps):
        if step in revivals:
            _revive(sae, trainer, normed)
        trainer.step(next(batches))
        trainer.n_training_steps += 1
    with torch.no_grad():
        return _stored(sae, layer, mean, scale, activations, recipe.k)


@torch.no_grad()
def _revive(sae: Any, trainer: Any, activations: Float[Tensor, "tokens d_model"]) -> None:
    """Point features that no longer fire at what is reconstructed worst, and reset their optimiser state.

    The trainer's auxiliary loss alone leaves an eighth of the early layers' features dead.
    """
    dead = trainer.n_forward_passes_since_fired >= _DEAD_AFTER
    count = int(dead.sum())
    if not count:
        return
    residue = activations - sae(activations)
    tokens = torch.multinomial(residue.pow(2).sum(-1), count)
    directions = torch.nn.functional.normalize(residue[tokens], dim=-1)
    sae.W_dec[dead] = directions * sae.W_dec[~dead].norm(dim=-1).mean()
    sae.W_enc[:, dead] = directions.T * sae.W_enc[:, ~dead].norm(dim=0).mean()
    sae.b_enc[dead] = 0.0
    for weight, mask in ((sae.W_dec, dead), (sae.W_enc, (slice(None), dead)), (sae.b_enc, dead)):
        for name in ("exp_avg", "exp_avg_sq"):
            trainer.optimizer.state[weight][name][mask] = 0.0
    trainer.n_forward_passes_since_fired[dead] = 0


def _stored(sae: torch.nn.Module, layer: int, mean: Tensor, scale: Tensor, activations: Tensor, k: float) -> DenseSae:
    """Unit decoder rows, normalisation folded in, rounded to float16, then the threshold that leaves `k` active."""
    w_enc, b_enc, w_dec, b_dec = (getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    norms = w_dec.norm(dim=-1)
    centre = b_dec if getattr(sae.cfg, "apply_b_dec_to_input", False) else torch.zeros_like(b_dec)
    b_enc = (b_enc - centre @ w_enc) * norms
    w_enc = w_enc * norms
    # In the model's own units: pre = scale · ((x − mean)/scale · w_enc + b_enc) and
    # x̂ = mean + scale · b_dec + f · w_dec.
    parts = (
        w_enc,
        scale * b_enc - mean @ w_enc,
        w_dec / norms[:, None],
        mean + scale * b_dec,
    )
    w_enc, b_enc, w_dec, b_dec = (part.half().float() for part in parts)
    pre = (activations[:: max(1, len(activations) // 20_000)] @ w_enc + b_enc).relu()
    threshold = pre.flatten().topk(int(k * len(pre))).values[-1].half().float()
    return DenseSae(
        layer=layer,
        w_enc=w_enc,
        b_enc=b_enc,
        threshold=torch.full_like(b_enc, float(threshold)),
        k=None,
        w_dec=w_dec,
        b_dec=b_dec,
    )


@dataclass(frozen=True)
class SaeQuality:
    """How well one SAE does on activations that it was not trained on."""

    fvu: float
    """Fraction of the variance unexplained."""
    l0: float
    """Mean active features per token."""
    dead: float
    """Fraction of features that never fire."""


def quality(sae: DenseSae, activations: Float[Tensor, "tokens d_model"]) -> SaeQuality:
    """Reconstruction, sparsity and dead features on `activations`."""
    f = sae.encode(activations)
    residue = (activations - sae.decode(f)).pow(2).sum()
    total = (activations - activations.mean(0)).pow(2).sum()
    active = f > 0
    return SaeQuality(
        fvu=float(residue / total),
        l0=float(active.sum(-1).float().mean()),
        dead=float((~active.any(0)).float().mean()),
    )


def save_sae(sae: DenseSae, folder: Path, l0: float) -> Path:
    """Write one layer in Gemma Scope's layout, in float16; the same weights give the same bytes."""
    path = folder / f"layer_{sae.layer}" / f"width_{sae.w_enc.shape[1]}" / f"average_l0_{round(l0)}" / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "W_enc": sae.w_enc,
        "b_enc": sae.b_enc,
        "W_dec": sae.w_dec,
        "b_dec": sae.b_dec,
        "threshold": sae.threshold,
    }
    stored = {name: tensor.numpy().astype(np.float16) for name, tensor in arrays.items() if tensor is not None}
    np.savez(path, **stored)  # pyright: ignore[reportArgumentType]
    return path


__all__ = ["SaeQuality", "SaeRecipe", "chat_activations", "quality", "save_sae", "train_sae"]
