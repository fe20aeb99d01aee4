"""What each token of a prompt gives to, or takes from, some features' activations (section 4.3, word by word).

A token's score is its embedding, less the mean embedding, which says nothing of the token, times the gradient of the
features' summed activation. The exact counterpart is to leave words out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.method.activations import mean_within
from demur.method.path import estimator
from demur.model import Batch, ChatModel, Items, Region, hooked
from demur.saes import Suite
from demur.types import FeatureId, by_layer


def embedding_excess(
    model: ChatModel, batch: Batch, embedded: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """Embeddings (float32) less the mean embedding of the vocabulary, as large as the model makes it."""
    weight = model.hf.get_input_embeddings().weight.detach()  # pyright: ignore
    # Some classes scale embeddings as they look them up.
    scale = embedded.norm() / weight[batch.input_ids].float().norm()
    return embedded - weight.float().mean(0) * scale


def token_effects(
    model: ChatModel,
    suite: Suite,
    items: Items,
    features: Sequence[FeatureId],
    *,
    varied: Mapping[str, Bool[Tensor, " _"]] | None = None,
    method: Literal["gradient", "ig"] = "ig",
    steps: int = 10,
) -> list[Float[Tensor, " pos"]]:
    """For each prompt, what each of its tokens adds to the sum of the features' mean activations over the template's
    tokens after the user's words, in the SAE's units, float32; negative: it takes some away. 0 at tokens that do not
    vary: `varied` says which do, by prompt id and token of the prompt (default: the user's words).

    `gradient` takes the gradient at the prompt itself. `ig` averages gradients over `steps` points of the straight path
    from the varied tokens all being the mean embedding to the prompt: the scores add up to the difference of the
    activation between the two, but for jumps of the features (JumpReLU) and the number of steps. Raises InputError:
    `steps` is below 1, or `method` neither of the two.
    """
    if varied is None:
        varied = {item.prompt_id: torch.tensor(item.regions) == Region.INSTRUCTION for item in items}
    wanted, alphas = by_layer(features), estimator(method, steps).alphas
    rows = {layer: suite[layer].rows(indices).to(model.layer_device(layer)) for layer, indices in wanted.items()}
    inputs: Any = model.hf.get_input_embeddings()

    def gradient(batch: Batch, alpha: float) -> tuple[Tensor, Tensor]:
        """Of the activation, a share `alpha` of the way to the mean embedding; and the way there."""
        start, excess = list[Tensor](), list[Tensor]()
        total = torch.zeros(len(batch))

        def embed(output: Tensor) -> Tensor:
            varies = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
            varies[batch.real.cpu()] = torch.cat([varied[prompt] for prompt in batch.prompt_ids])
            excess.append(embedding_excess(model, batch, output.detach().float()) * varies.to(output.device)[..., None])
            start.append((output.detach() - alpha * excess[0].to(output.dtype)).requires_grad_())
            return start[0]

        def read(layer: int, residual: Tensor) -> None:
            nonlocal total
            values = rows[layer].encode(residual)
            total = total + mean_within(values, batch.within([Region.POST_INSTRUCTION])).sum(-1).cpu()

        functions, points = {layer: partial(read, layer) for layer in rows}, model.points(suite.reads)
        with torch.enable_grad(), hooked([inputs], {0: embed}), hooked(points, functions):
            model.last_logits(batch)
        if not total.requires_grad:
            return torch.zeros_like(excess[0]), excess[0]
        return torch.autograd.grad(total.sum(), start[0])[0].float(), excess[0]

    def run(batch: Batch) -> list[Tensor]:
        found = torch.zeros(batch.input_ids.shape)
        for alpha in alphas:
            slope, excess = gradient(batch, alpha)
            found += (slope * excess).sum(-1).cpu() / len(alphas)
        return [scores[real] for scores, real in zip(found, batch.real.cpu(), strict=True)]

    with model.in_float32():
        return model.each(items, run, gradients=True)
