"""Attention with capped logits (Gemma 2) that reads keys and values where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED: Final = "demur_grouped"
"""Name of this attention among those of transformers."""


def group_queries(hf: PreTrainedModel) -> None:
    """Give a model whose attention logits are capped an attention that copies no keys and values.

    No kernel of torch caps logits. transformers does it by plain products, and repeats keys and values for the heads
    that share them, at every step, for every token so far: on a CPU that was a third of the time of a step.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    config: Any = hf.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "eager":
        AttentionInterface.register(GROUPED, attend)
        AttentionMaskInterface.register(GROUPED, eager_mask)
        hf.set_attn_implementation(GROUPED)


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch shared slot d"],
    value: Float[Tensor, "batch shared slot d"],
    attention_mask: Float[Tensor, "batch 1 pos slot"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch pos head d"], Float[Tensor, "batch head pos slot"]]:
    """What `eager_attention_forward` of transformers computes for Gemma 2: the queries of heads that share keys and
    values are one product with them."""
    batch, heads, pos, d = query.shape
    together = (batch, key.shape[1], heads // key.shape[1] * pos)
    logits = query.reshape(*together, d) @ key.transpose(2, 3) * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.view(batch, heads, pos, -1)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    found = weights.view(*together, -1) @ value
    return found.view(batch, heads, pos, d).transpose(1, 2).contiguous(), weights
