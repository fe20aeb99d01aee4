"""Attribution of a pool: demur against a dense variant that does what the paper's code does.

Inside each integrated-gradients step the dense variant encodes and decodes every layer's residual with the whole SAE,
keeps the SAE's error, interpolates features and errors between the two runs, and collects the gradients of the
interpolated features. All layers' features are stored densely, and all of them are scored. `dense` leaves the
parameters of model and SAEs trainable, as the paper's code does, so that the backward pass computes their gradients
too; `dense_frozen` does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from demur.method.attribution import Attribution, attribute
from demur.method.interventions import AblateDirection, Compiled
from demur.method.path import Method, Metric
from demur.method.selection import cosine_pool
from demur.model import Batch, hooked
from perf import common

K0, TOP = 10, 20
METRIC = Metric((7,), allow_refusal_target=True)
LEAN: tuple[Method, ...] = ("paper", "ig", "gradient")
TOLERANCE = 1e-4


class Mixing(nn.Module):
    """What the dense variant puts behind a layer: the whole SAE, with features and errors of the two runs mixed."""

    def __init__(self, sae: common.WholeSae, patched: Tensor, patched_error: Tensor) -> None:
        super().__init__()
        self.sae = sae
        self.patched = patched
        self.patched_error = patched_error
        self.alpha = 0.0
        self.mixed: Tensor | None = None
        self.handle = self.register_full_backward_hook(lambda _module, _inputs, outputs: outputs)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        features = self.sae.encode(x)
        error = x - self.sae.decode(features)
        self.mixed = (1 - self.alpha) * features + self.alpha * self.patched
        self.mixed.retain_grad()
        return self.sae.decode(self.mixed) + (1 - self.alpha) * error + self.alpha * self.patched_error


@dataclass
class Dense:
    """The dense variant."""

    setup: common.Setup
    direction: Float[Tensor, " d_model"]
    steps: int

    def run(self, batch: Batch, *, frozen: bool) -> list[Float[Tensor, "batch pos d_sae"]]:
        """Attribution of every feature of every layer at every token."""
        parts: list[nn.Module] = [self.setup.model.hf, *self.setup.saes]
        for part in parts:
            part.requires_grad_(not frozen)
        try:
            return self._scores(batch)
        finally:
            for part in parts:
                part.zero_grad()
                part.requires_grad_(False)

    @torch.no_grad()
    def _scores(self, batch: Batch) -> list[Tensor]:
        clean, patched, errors, target = self._ends(batch)
        mixings = [Mixing(*each) for each in zip(self.setup.saes, patched, errors, strict=True)]
        gradients = [torch.zeros_like(each) for each in clean]
        for step in range(self.steps):
            for mixing in mixings:
                mixing.alpha = step / self.steps
            with torch.enable_grad(), hooked(self.setup.model.layers, {n: _behind(m) for n, m in enumerate(mixings)}):
                METRIC(self._last_logits(batch), target).sum().backward()
            for total, mixing in zip(gradients, mixings, strict=True):
                assert mixing.mixed is not None
                assert mixing.mixed.grad is not None
                total += mixing.mixed.grad / self.steps
                mixing.mixed = None
        for mixing in mixings:
            mixing.handle.remove()
        return [(p - c) * g for p, c, g in zip(patched, clean, gradients, strict=True)]

    def _ends(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor], tuple[int, ...]]:
        """Dense features of the clean run; features, SAE errors and most likely tokens of the ablated one."""
        saes, layers = self.setup.saes, self.setup.model.layers
        unit = (self.direction / self.direction.norm()).to(self.setup.model.dtype)
        clean: dict[int, Tensor] = {}
        patched: dict[int, Tensor] = {}
        errors: dict[int, Tensor] = {}

        def keep(layer: int, x: Tensor) -> None:
            clean[layer] = saes[layer].encode(x)

        def ablate(layer: int, x: Tensor) -> Tensor:
            out = x - (x @ unit)[..., None] * unit
            patched[layer] = saes[layer].encode(out)
            # The path runs to the residual before the layer's own projection; the error makes up the difference.
            errors[layer] = x - saes[layer].decode(patched[layer])
            return out

        with hooked(layers, {n: partial(keep, n) for n in range(len(layers))}):
            self._last_logits(batch)
        with hooked(layers, {n: partial(ablate, n) for n in range(len(layers))}):
            target = METRIC.targets(self._last_logits(batch))
        order = range(len(layers))
        return [clean[n] for n in order], [patched[n] for n in order], [errors[n] for n in order], target

    def _last_logits(self, batch: Batch) -> Float[Tensor, "batch vocab"]:
        """The logits of all positions are computed, and the last one's read."""
        output: Any = self.setup.model.hf(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        return output.logits[:, -1].float()


def _behind(mixing: Mixing) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        # With frozen parameters the graph begins at the first layer's output, sparing the dense variant that layer.
        return mixing(x if x.requires_grad else x.detach().requires_grad_())

    return run


@dataclass
class Variants:
    """Both variants on one set-up."""

    setup: common.Setup
    steps: int = 10

    @cached_property
    def direction(self) -> Float[Tensor, " d_model"]:
        """One that the residuals really vary along: mean of half of the prompts − mean of the others, last position."""
        middle = self.setup.shape.n_layers // 2
        with torch.no_grad(), self.setup.model.capture([middle], lambda x: x[:, -1:]) as caught:
            self.setup.model.last_logits(self.batch)
        half = len(self.batch) // 2
        return (caught[middle][:half].mean((0, 1)) - caught[middle][half:].mean((0, 1))).float()

    @cached_property
    def batch(self) -> Batch:
        return self.setup.model.batch(self.setup.items)

    @cached_property
    def pool(self) -> dict[int, tuple[int, ...]]:
        return cosine_pool(self.setup.suite, self.direction, K0).by_layer

    @cached_property
    def patch(self) -> Compiled:
        return Compiled(self.setup.model, None, [AblateDirection(self.direction)])

    @cached_property
    def named(self) -> dict[str, Callable[[], object]]:
        """All variants by name."""
        variants: dict[str, Callable[[], object]] = {
            "dense": partial(self.dense, frozen=False),
            "dense_frozen": partial(self.dense, frozen=True),
        }
        return variants | {f"lean_{method}": partial(self.lean, method) for method in LEAN}

    def lean(self, method: Method) -> Attribution:
        setup = self.setup
        return attribute(
            setup.model,
            setup.suite,
            setup.items,
            self.pool,
            patch=self.patch,
            metric=METRIC,
            method=method,
            steps=self.steps,
        )

    def dense(self, *, frozen: bool) -> list[Float[Tensor, "batch pos d_sae"]]:
        return Dense(self.setup, self.direction, self.steps).run(self.batch, frozen=frozen)

    def agreement(self) -> dict[str, float]:
        """How far the variants are apart on the pool, and whether they would select the same features.

        Raises:
            Disagreement: by more than 1e-4 of the largest attribution, or the global 20 best differ.
        """
        lean = self.lean("paper")
        scored = self.batch.within((common.Region.INSTRUCTION, common.Region.POST_INSTRUCTION))
        worst = 0.0
        for frozen in (False, True):
            totals = [(scores * scored[..., None]).sum(1) for scores in self.dense(frozen=frozen)]
            dense = torch.cat([totals[layer][:, list(self.pool[layer])] for layer in sorted(self.pool)], 1)
            if not bool((dense != 0).any()):
                raise common.Disagreement("no feature of the pool has an attribution, so nothing can be compared")
            counts = scored.sum(1, keepdim=True)
            best = _top(lean.means), _top(dense / counts)
            worst = max(worst, common.relative_error(lean.totals, dense))
            if not worst <= TOLERANCE or best[0] != best[1]:
                raise common.Disagreement(
                    f"lean and dense attributions differ by {worst:.1e} of the largest (allowed: {TOLERANCE:g}), and "
                    f"of the {len(best[0])} best features {len(best[0] & best[1])} are the same"
                )
        active = float((lean.totals != 0).double().mean())
        return {"relative_error": worst, "same_top": len(best[0]), "share_not_zero": active}


def _top(means: Tensor) -> set[int]:
    return set(means.double().mean(0).topk(min(TOP, means.shape[1])).indices.tolist())


def _options() -> argparse.Namespace:
    options = common.parser(__doc__ or "")
    options.add_argument("--prompts", type=int, default=4, help="prompts in the batch")
    options.add_argument("--steps", type=int, default=10, help="integrated-gradients steps")
    options.add_argument("--batch-tokens", type=int, help="tokens of one lean pass (default: demur's own choice)")
    return options.parse_args()


def _setup(options: argparse.Namespace, shape: common.Shape, dtype: torch.dtype) -> common.Setup:
    setup = common.build(shape, device=options.device, dtype=dtype, n_prompts=options.prompts, n_tokens=options.tokens)
    setup.model.max_batch_tokens = options.batch_tokens
    return setup


def main() -> None:
    options = _options()
    shape = common.shape_of(options)
    dtype = common.dtype_of(options)
    if options.only_memory:
        variants = Variants(_setup(options, shape, dtype), options.steps)
        print(common.added_peak(variants.named[options.only_memory], variants.setup.device))
        return
    agreement = _agreement(options, shape, dtype)
    variants = Variants(_setup(options, shape, dtype), options.steps)
    seconds = common.interleaved(variants.named, repeats=options.repeats, device=variants.setup.device)
    peak = {} if options.no_memory else common.peaks(list(variants.named))
    _report(variants, options, agreement, seconds, peak)


def _agreement(options: argparse.Namespace, shape: common.Shape, dtype: torch.dtype) -> dict[str, float]:
    """Compare values in float32; a lower precision is timed on weights that two layers of it were compared with."""
    if dtype == torch.float32:
        return Variants(_setup(options, shape, dtype), options.steps).agreement()
    shallow = common.replace(shape, n_layers=2)
    return Variants(_setup(options, shallow, torch.float32), options.steps).agreement()


def _report(
    variants: Variants,
    options: argparse.Namespace,
    agreement: dict[str, float],
    seconds: dict[str, list[float]],
    peak: dict[str, int],
) -> None:
    setup = variants.setup
    model, saes = common.n_bytes([setup.model.hf]), common.n_bytes(setup.saes)
    rows_of_pool = sum(map(len, variants.pool.values())) * (2 * setup.shape.d_model + 2) * 4
    gpu = setup.device.type == "cuda"
    rows: list[list[str]] = []
    ratios: dict[str, common.Ratio] = {}
    for name in variants.named:
        ratios[name] = common.ratio(seconds["dense" if name.startswith("lean") else name], seconds[name])
        against = [str(common.ratio(seconds[dense], seconds[name])) for dense in ("dense", "dense_frozen")]
        static = model + (rows_of_pool if name.startswith("lean") else saes)
        memory = ["–", "–", "–"]
        if peak:
            memory = [common.mib(peak[name])] + [f"{peak[d] / peak[name]:.1f}" for d in ("dense", "dense_frozen")]
        absolute = [f"{median(seconds[name]) * 1e3:.1f} ms"] if gpu else []
        rows.append([name, *absolute, *against, common.mib(static), *memory])
    head = ["variant", *(["time"] if gpu else []), "× faster than dense", "× faster than dense_frozen"]
    head += ["static", "added peak", "dense's ÷ this", "dense_frozen's ÷ this"]
    print(common.table(head, rows))
    print(f"\nGradients of parameters within the added peak of `dense`: {common.mib(model + saes)}.")
    print(common.when_not_cuda(setup.device))
    against_frozen = {n: common.ratio(seconds["dense_frozen"], seconds[n]) for n in variants.named}
    values: dict[str, Any] = {
        "prompts": len(setup.items),
        "tokens": variants.batch.input_ids.shape[1],
        "steps": options.steps,
        "pool": sum(map(len, variants.pool.values())),
        "batch_tokens": setup.model.budgets.gradients,
        "repeats": options.repeats,
        "agreement": agreement,
        "speedup": {n: common.ratio(seconds["dense"], seconds[n]) for n in variants.named},
        "speedup_frozen": against_frozen,
        "static_bytes": {"dense": model + saes, "lean": model + rows_of_pool},
        "added_peak_bytes": peak,
    }
    if gpu:
        values["seconds"] = {name: median(each) for name, each in seconds.items()}
    print(common.json_line("attribution", setup, **values))


if __name__ == "__main__":
    main()
