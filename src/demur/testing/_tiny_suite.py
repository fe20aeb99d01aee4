"""Random SAEs that fit a model and fire at a sensible rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from demur.model import capture
from demur.saes import ActivationName, DenseSae, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATE = 0.1  # fraction of tokens at which a feature fires
_TOKENS = (16, 32)  # sequences, and tokens of each, that the thresholds are set on


@torch.no_grad()
def tiny_suite(
    model: PreTrainedModel, *, d_sae: int = 64, seed: int = 0, activation: ActivationName = "jumprelu"
) -> Suite:
    """A random SAE for every decoder layer of `model`, whose features fire at about one token in ten.

    Thresholds (or biases) are set on the model's own residuals over random tokens, the first of each sequence left
    out. Decoder rows are unit vectors near their encoder columns, so that scaling a feature changes what it reads, as
    in trained SAEs. `seed` is that of the tokens and the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab: int = cast("Any", model.config).get_text_config().vocab_size
    ids = torch.randint(vocab, _TOKENS, generator=generator).to(model.device)
    with capture(tuple(cast("Any", model.get_decoder()).layers)) as residuals:
        model(input_ids=ids, use_cache=False)
    flat = {layer: residuals[layer][:, 1:].flatten(0, 1).float().cpu() for layer in sorted(residuals)}
    return Suite.from_dense({layer: _sae(layer, x, d_sae, activation, generator) for layer, x in flat.items()})


def _sae(
    layer: int,
    residual: Float[Tensor, "token d_model"],
    d_sae: int,
    activation: ActivationName,
    generator: torch.Generator,
) -> DenseSae:
    mean = residual.mean(0)
    w_enc = torch.nn.functional.normalize(torch.randn(residual.shape[1], d_sae, generator=generator), dim=0)
    noise = torch.randn(d_sae, residual.shape[1], generator=generator) / residual.shape[1] ** 0.5
    w_dec = torch.nn.functional.normalize(w_enc.T + noise, dim=-1)
    b_enc = -(mean @ w_enc)
    edge = (residual @ w_enc + b_enc).quantile(1 - _RATE, dim=0)
    return DenseSae(
        layer=layer,
        w_enc=w_enc,
        b_enc=b_enc - edge if activation == "relu" else b_enc,
        threshold=edge if activation == "jumprelu" else None,
        k=max(1, round(_RATE * d_sae)) if activation == "topk" else None,
        w_dec=w_dec,
        b_dec=mean,
    )
