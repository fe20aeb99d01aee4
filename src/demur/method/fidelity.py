"""How faithful an SAE is to a model: what it makes of the residual, and what the model does on that.

Everything is measured on given conversations, prompt by prompt, and by region of the prompt: SAEs are trained on text,
and template tokens are where they fail and where refusal is decided. BOS, headers and padding are never counted nor
replaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.method.direction import residuals_at
from demur.method.interventions import Change, Intervention
from demur.model import Batch, ChatModel, Items, Region
from demur.saes import DenseSae

REGIONS: Final = (Region.INSTRUCTION, Region.POST_INSTRUCTION, Region.RESPONSE)
"""Where SAEs are judged: the user's words, the template's tokens after them, and the answer."""


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an SAE makes of one layer's residual: sums over the tokens of each region of each conversation, float64, and
    which features fired on any of them. Arrays have the shape (conversation, region)."""

    tokens: np.ndarray
    error: np.ndarray
    """Squared distance of the reconstruction from the residual."""
    spread: np.ndarray
    """Squared distance of the residual from its mean over all tokens of the region."""
    active: np.ndarray
    """Features that are active."""
    fired: Bool[np.ndarray, " d_sae"]
    """Features that are active on any counted token."""
    mean: Float[Tensor, " d_model"]
    """The residual's mean over all counted tokens."""

    @property
    def dead(self) -> float:
        """The share of features that fire on no counted token."""
        return 1.0 - float(self.fired.mean())


class _Sums(NamedTuple):
    """Sums over a conversation's tokens, by region."""

    tokens: Float[Tensor, " region"]
    error: Float[Tensor, " region"]
    square: Float[Tensor, " region"]
    active: Float[Tensor, " region"]
    total: Float[Tensor, "region d_model"]

    @classmethod
    def of(cls, x: Tensor, found: Tensor, error: Tensor, inside: Bool[Tensor, "region pos"]) -> Self:
        weights = inside.double()
        error, square, active = (weights @ each.double() for each in (error, x.square().sum(-1), (found > 0).sum(-1)))
        return cls(weights.sum(-1), error, square, active, weights @ x.double())


def direction_cosine(model: ChatModel, sae: DenseSae, harmful: Items, harmless: Items, position: int) -> float:
    """Cosine of the difference of class means with that of the means of reconstructions, after the SAE's layer, at one
    position counted from the end; nan where the classes do not differ."""
    true, made = (torch.zeros(model.d_model) for _ in range(2))
    size = 0.0
    for sign, items in ((1, harmful), (-1, harmless)):
        x = residuals_at(model, items, sae.layer, position)
        true += sign * x.mean(0)
        made += sign * sae.decode(sae.encode(x)).mean(0)
        size += float(x.norm(dim=-1).mean())
    # Before any attention a template token is the same in every prompt: there is no direction to reconstruct.
    if float(true.norm()) < 1e-5 * size:
        return math.nan
    return float(torch.nn.functional.cosine_similarity(true, made, dim=0))


def reconstruction(
    model: ChatModel, sae: DenseSae, items: Items, regions: Sequence[Region] = REGIONS
) -> Reconstruction:
    """What an SAE makes of the residual that leaves its layer, or a transcoder of what the MLP adds to it, on the clean
    model; the pass ends there."""
    sae = sae.to(model.layer_device(sae.layer))
    fired = torch.zeros(len(sae.b_enc), dtype=torch.bool)

    def run(batch: Batch) -> list[_Sums]:
        nonlocal fired
        with model.capture([sae.layer], sites={sae.layer: sae.reads}) as read:
            written = model.residuals(batch, [sae.layer], {sae.layer: sae.writes})[sae.layer].float()
        inside = torch.stack([batch.within([region]) for region in regions], 1).to(written.device)
        rows: list[_Sums] = []
        with torch.no_grad():
            # Row by row: a batch's features over a whole dictionary would not fit beside the model.
            for x, y, where in zip(read[sae.layer].float(), written, inside, strict=True):
                found = sae.encode(x)
                error = (y - sae.decode(found, x)).square().sum(-1)
                rows.append(_Sums(*(each.cpu() for each in _Sums.of(y, found, error, where))))
                fired = fired | (found[where.any(0)] > 0).any(0).cpu()
        return rows

    parts = model.each(items, run)
    tokens, error, square, active, total = (torch.stack(each) for each in zip(*parts, strict=True))
    mean = total.sum(0) / tokens.sum(0)[:, None].clamp(min=1)
    # Σ |x − μ|² over a conversation's tokens, with the region's mean over all conversations.
    spread = square - 2 * (total * mean).sum(-1) + tokens * mean.square().sum(-1)
    return Reconstruction(
        tokens=tokens.numpy(),
        error=error.numpy(),
        spread=spread.clamp(min=0).numpy(),
        active=active.numpy(),
        fired=fired.numpy(),
        mean=(total.sum((0, 1)) / tokens.sum().clamp(min=1)).float(),
    )


Replacement = Literal["sae", "zero", "mean"]


@dataclass(frozen=True, eq=False)
class Splice(Intervention):
    """The residual of one layer replaced by its reconstruction, by 0, or by its mean, on the tokens of some regions.
    Unlike interventions on features, the reconstruction leaves out what the SAE cannot express. `key` is the SAE's
    identity; `by` is the SAE, or the mean."""

    layer: int
    kind: Replacement
    key: str
    by: DenseSae | Float[Tensor, " d_model"] | None = None
    regions: tuple[Region, ...] | None = REGIONS

    @property
    def label(self) -> str:
        return f"splice-{self.kind}-{self.layer}"

    @property
    def id(self) -> str:
        where = "-".join(region.name.lower() for region in self.regions or Region)
        return f"{self.label}@{self.key}:{where}"

    def acts_on(self, model: ChatModel) -> tuple[int, ...]:
        del model
        return (self.layer,)

    def change(self, model: ChatModel, layer: int) -> Change:
        if self.by is None:
            return torch.zeros_like
        if isinstance(self.by, Tensor):
            mean = self.by.to(model.layer_device(layer))
            return lambda residual: mean.to(residual.dtype).expand_as(residual)
        sae = self.by.to(model.layer_device(layer))
        # Row by row, as above.
        return lambda residual: torch.stack([sae.decode(sae.encode(row)) for row in residual])
