"""The path from the clean to the patched run, and the gradients taken along it (paper, section 3).

No SAE takes part. Decoding is affine and the SAE's error is interpolated too, so a fraction α of the way a layer's
output is `x + α(x_patch − x)` whatever the dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError
from demur.method.interventions import Compiled
from demur.model import NO_SITES, Batch, ChatModel, Residuals, Sites, hooked

# On a CPU larger passes are no faster, they only hold more activations.
_CPU_PATH_TOKENS = 256

Method = Literal["gradient", "ig", "paper", "exact"]


@dataclass(frozen=True)
class Estimator:
    """A linear estimate of what moving one feature to its patched value does to the metric. Every layer's output is
    moved a fraction α of the way to its patched value, gradients are taken there, and a feature's attribution is its
    difference times the gradient along its decoder row, averaged over α."""

    alphas: tuple[float, ...]
    straight_through: bool = True
    """Gradients pass each layer's mixing unchanged (else they are scaled by 1 − α there, the true derivative)."""
    path: bool = False
    """Differences are taken from the current point of the path (else from the clean run)."""
    patch_before_edit: bool = False
    """Residuals of the patched run are taken before the layer's own edit, as the paper's code does."""

    @property
    def begins_clean(self) -> bool:
        """The first pass of the path is the clean run, which then need not be made apart."""
        return self.alphas[0] == 0.0


def estimator(method: Method, steps: int = 10) -> Estimator:
    """The estimator of that name.

    `gradient`: attribution patching, one gradient at the clean run. `paper`: integrated gradients as the paper's code
    computes them (α = k/N, straight-through). `ig`: the path-complete form (midpoints α = (k + ½)/N, true gradients,
    differences along the path), whose features and error terms over all layers add up to the metric's whole change.
    Raises InputError: the name is none of these, or `steps` is below 1.
    """
    if steps < 1:
        raise InputError(f"integrated gradients need at least 1 step; {steps} were asked for")
    known = {
        "gradient": Estimator((0.0,)),
        "paper": Estimator(tuple(k / steps for k in range(steps)), patch_before_edit=True),
        "ig": Estimator(tuple((k + 0.5) / steps for k in range(steps)), straight_through=False, path=True),
    }
    if method not in known:
        raise InputError(f"{method!r} is not an estimate; expected gradient, ig or paper")
    return known[method]


@dataclass(frozen=True)
class Metric:
    """`m = logit(t_jb) − logit(t_refuse)` at the last position, in logits; positive when the model would rather comply.
    `t_jb` is, per prompt, the patched run's most likely token. Several refusal tokens count as one: the log of the sum
    of their exponentials."""

    refusal_ids: tuple[int, ...]
    allow_refusal_target: bool = False
    """Take the patched run's most likely token even if it is a refusal token (as the paper's code does; the metric is
    then 0). By default the most likely other token is taken."""

    def targets(self, patched_logits: Float[Tensor, "batch vocab"]) -> tuple[int, ...]:
        """`t_jb` of each row."""
        logits = patched_logits.clone()
        if not self.allow_refusal_target:
            logits[:, list(self.refusal_ids)] = -torch.inf
        return tuple(logits.argmax(-1).tolist())

    def __call__(self, logits: Float[Tensor, "batch vocab"], targets: Sequence[int]) -> Float[Tensor, " batch"]:
        chosen = logits.gather(1, torch.tensor(targets, device=logits.device)[:, None])[:, 0]
        return chosen - logits[:, list(self.refusal_ids)].logsumexp(-1)


_AtAlphas = Float[Tensor, "alpha batch pos d_model"]
Visit = Callable[[int, _AtAlphas, _AtAlphas, _AtAlphas], None]
"""`(layer, residual that entered the mixing, what the layer's dictionary reads, gradient of the metric at the mixing's
output)`, float32, detached."""


@dataclass(frozen=True)
class Ends:
    """Both ends of the path for one batch. Residuals are after each layer; metrics in logits. `clean` and
    `clean_metric` are filled in by the path's own first pass where that is the clean run (α = 0)."""

    clean: Residuals
    patched: Residuals
    """After the layer's own edit."""
    mixed: Residuals
    """What the path runs to: `patched`, or the patched run's residuals before the layer's own edit."""
    read: Residuals
    """What dictionaries read in the clean run: `clean`, unless they read elsewhere; filled in as that is."""
    reads: Sites
    """Where dictionaries read that do not read the residual that leaves their layer."""
    targets: tuple[int, ...]
    clean_metric: Float[Tensor, " batch"]
    patched_metric: Float[Tensor, " batch"]


def run_ends(
    model: ChatModel,
    batch: Batch,
    patch: Compiled,
    metric: Metric,
    how: Estimator | None = None,
    reads: Sites = NO_SITES,
) -> Ends:
    """Run the batch patched, and clean unless the estimator's path begins with that very run. `reads`: where
    dictionaries read that do not read the residual."""
    with torch.no_grad():
        outer = model.capture() if how is not None and how.patch_before_edit else nullcontext()
        with outer as entering, patch.on(batch), model.capture() as leaving:
            patched_logits = model.last_logits(batch)
        targets = metric.targets(patched_logits)
        patched_metric = metric(patched_logits, targets)
        clean, read = Residuals(), Residuals()
        clean_metric = torch.zeros_like(patched_metric)
        if how is None or not how.begins_clean:
            with model.capture() as clean, model.reading(reads) as read:
                clean_metric = metric(model.last_logits(batch), targets)
    mixed = leaving if entering is None else entering
    return Ends(clean, leaving, mixed, clean | read, reads, targets, clean_metric, patched_metric)


def run_path(model: ChatModel, batch: Batch, ends: Ends, metric: Metric, how: Estimator, visit: Visit) -> None:
    """One forward and one backward pass for each α, as many of them batched together as memory is planned for.
    Gradients of activations only; `visit` is called with each layer's gradient as soon as the backward pass reaches it,
    so they are never all held at once. The clean end is filled in where the path begins with it."""
    run = partial(_run_alphas, model, batch, ends, metric, how, visit)
    tokens = model.budgets.gradients
    if model.device.type == "cpu":
        tokens = min(tokens, _CPU_PATH_TOKENS)
    at_once = max(1, tokens // batch.input_ids.numel())
    alphas = how.alphas
    if how.begins_clean:
        run(alphas[:1])
        alphas = alphas[1:]
    for start in range(0, len(alphas), at_once):
        run(alphas[start : start + at_once])


def _run_alphas(
    model: ChatModel, batch: Batch, ends: Ends, metric: Metric, how: Estimator, visit: Visit, alphas: Sequence[float]
) -> None:
    shape = (len(alphas), len(batch), batch.input_ids.shape[1], model.d_model)
    roots: list[Tensor] = []

    def mix(layer: int, residual: Tensor) -> Tensor:
        entered = residual.detach()
        read = seen.get(layer, entered).detach()
        if alphas[0] == 0.0:
            ends.clean[layer], ends.read[layer] = entered, read
            mixed = residual
        else:
            fraction = torch.tensor(alphas, device=residual.device, dtype=residual.dtype)[:, None, None, None]
            shift = (fraction * (ends.mixed[layer] - residual.view(shape))).view_as(residual)
            mixed = residual + (shift.detach() if how.straight_through else shift)
        if not mixed.requires_grad:
            # Parameters are frozen, so the graph begins here, at the first layer.
            mixed = mixed.detach().requires_grad_()
            roots.append(mixed)

        def arrived(gradient: Tensor) -> None:
            visit(layer, *(each.view(shape).float() for each in (entered, read, gradient)))

        mixed.register_hook(arrived)
        return mixed

    mixing = hooked(model.layers, {layer: partial(mix, layer) for layer in range(model.n_layers)})
    with torch.enable_grad(), model.reading(ends.reads) as seen, mixing:
        logits = model.last_logits(batch.repeat(len(alphas)))
        values = metric(logits, ends.targets * len(alphas))
    if alphas[0] == 0.0:
        ends.clean_metric.copy_(values.detach())
    torch.autograd.grad(values.sum(), roots)
