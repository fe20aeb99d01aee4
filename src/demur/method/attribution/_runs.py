"""The passes that attribution is made of: clean, patched, and the ones along the path between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from demur.method.attribution._values import Estimator, Metric
from demur.method.interventions import Compiled
from demur.model import Batch, ChatModel, hooked

Residuals = dict[int, Float[Tensor, "batch pos d_model"]]

Visit = Callable[[int, Float[Tensor, "alpha batch pos d_model"], Float[Tensor, "alpha batch pos d_model"]], None]
"""`(layer, residual that entered the mixing, gradient of the metric at the mixing's output)`, float32, detached."""


@dataclass(frozen=True)
class Ends:
    """Both ends of the path for one batch. Residuals are after each layer; metrics in logits.

    `clean` and `clean_metric` are filled in by the path's own first pass where that is the clean run (α = 0).
    """

    clean: Residuals
    patched: Residuals
    """After the layer's own edit."""
    mixed: Residuals
    """What the path runs to: `patched`, or the patched run's residuals before the layer's own edit."""
    targets: tuple[int, ...]
    clean_metric: Float[Tensor, " batch"]
    patched_metric: Float[Tensor, " batch"]


def run_ends(
    model: ChatModel,
    batch: Batch,
    patch: Compiled,
    metric: Metric,
    estimator: Estimator | None = None,
) -> Ends:
    """Run the batch patched, and clean unless the estimator's path begins with that very run."""
    before_edit = estimator is not None and estimator.patch_before_edit
    with torch.no_grad():
        outer = model.capture() if before_edit else nullcontext()
        with outer as entering, patch.on(batch), model.capture() as leaving:
            patched_logits = model.last_logits(batch)
        targets = metric.targets(patched_logits)
        patched_metric = metric(patched_logits, targets)
        clean: Residuals = {}
        clean_metric = torch.zeros_like(patched_metric)
        if estimator is None or not estimator.begins_clean:
            with model.capture() as captured:
                clean_metric = metric(model.last_logits(batch), targets)
            clean = captured.residuals
    mixed = leaving.residuals if entering is None else entering.residuals
    return Ends(clean, leaving.residuals, mixed, targets, clean_metric, patched_metric)


def run_path(
    model: ChatModel,
    batch: Batch,
    ends: Ends,
    metric: Metric,
    estimator: Estimator,
    visit: Visit,
    *,
    alphas_at_once: int,
) -> None:
    """One forward and one backward pass for each α, `alphas_at_once` of them batched together.

    No SAE takes part: decoding is affine and the SAE's error is interpolated too, so what leaves the mixing is
    `x + α(x_patch − x)` whatever the dictionary. Gradients of activations only; each layer's gradient is handed to
    `visit` as soon as the backward pass reaches it, so they are never all held at once.
    """
    alphas = estimator.alphas
    if estimator.begins_clean:
        _run_alphas(model, batch, ends, metric, estimator, visit, alphas[:1])
        alphas = alphas[1:]
    for start in range(0, len(alphas), alphas_at_once):
        _run_alphas(model, batch, ends, metric, estimator, visit, alphas[start : start + alphas_at_once])


def _run_alphas(
    model: ChatModel,
    batch: Batch,
    ends: Ends,
    metric: Metric,
    estimator: Estimator,
    visit: Visit,
    alphas: Sequence[float],
) -> None:
    shape = (len(alphas), len(batch), batch.input_ids.shape[1], model.d_model)
    roots: list[Tensor] = []

    def mix(layer: int) -> Callable[[Tensor], Tensor]:
        def run(residual: Tensor) -> Tensor:
            entered = residual.detach()
            if alphas[0] == 0.0:
                ends.clean[layer] = entered
                mixed = residual
            else:
                fraction = torch.tensor(alphas, device=residual.device, dtype=residual.dtype)[:, None, None, None]
                shift = (fraction * (ends.mixed[layer] - residual.view(shape))).view_as(residual)
                mixed = residual + (shift.detach() if estimator.straight_through else shift)
            if not mixed.requires_grad:
                # Parameters are frozen, so the graph begins here, at the first layer.
                mixed = mixed.detach().requires_grad_()
                roots.append(mixed)

            def arrived(gradient: Tensor) -> None:
                visit(layer, entered.view(shape).float(), gradient.view(shape).float())

            mixed.register_hook(arrived)
            return mixed

        return run

    with torch.enable_grad(), hooked(model.layers, {layer: mix(layer) for layer in range(model.n_layers)}):
        logits = model.last_logits(batch.repeat(len(alphas)))
        values = metric(logits, ends.targets * len(alphas))
    if alphas[0] == 0.0:
        ends.clean_metric.copy_(values.detach())
    torch.autograd.grad(values.sum(), roots)
