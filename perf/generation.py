"""Greedy generation with 20 features scaled: demur against the same model unhooked, and against a dense clamp.

The dense clamp puts a whole SAE behind every layer: encode, change the chosen features, decode, and add back what the
SAE cannot reconstruct. All variants are one `generate` call of the same model on the same batch, with a fixed number of
new tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from demur.method.interventions import Compiled, ScaleFeatures
from demur.model import Batch, hooked
from demur.types import FeatureId
from perf import common

N_FEATURES, FACTOR = 20, -3.0
TOLERANCE = 1e-4


def features_of(shape: common.Shape) -> tuple[FeatureId, ...]:
    """Features spread over all layers (over 20 of them, where there are more)."""
    generator = torch.Generator().manual_seed(2)
    layers = [n * shape.n_layers // N_FEATURES for n in range(N_FEATURES)]
    # Distinct within a layer: each has its own share of the dictionary.
    share = shape.d_sae // N_FEATURES
    return tuple(
        FeatureId(layer, n * share + int(torch.randint(share, (1,), generator=generator)))
        for n, layer in enumerate(layers)
    )


@contextmanager
def dense_clamp(setup: common.Setup, features: Sequence[FeatureId]) -> Iterator[None]:
    """Every layer encoded and decoded by its whole SAE while the context is open."""
    chosen: list[list[int]] = [[] for _ in setup.saes]
    for layer, index in features:
        chosen[layer].append(index)

    def clamp(sae: common.WholeSae, indices: list[int], x: Tensor) -> Tensor:
        encoded = sae.encode(x)
        error = x - sae.decode(encoded)
        encoded[..., indices] *= FACTOR
        return sae.decode(encoded) + error

    hooks = {n: partial(clamp, sae, indices) for n, (sae, indices) in enumerate(zip(setup.saes, chosen, strict=True))}
    with hooked(setup.model.layers, hooks):
        yield


class Variants:
    """All variants on one set-up."""

    def __init__(self, setup: common.Setup, new_tokens: int) -> None:
        self.setup = setup
        self.features = features_of(setup.shape)
        self.scaled = Compiled(setup.model, setup.suite, [ScaleFeatures(self.features, FACTOR)])
        self.unchanged = Compiled(setup.model, setup.suite, [ScaleFeatures(self.features, 1.0)])
        self.nothing = Compiled(setup.model, setup.suite, [])
        self.config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, bos_token_id=0, pad_token_id=0, eos_token_id=None
        )
        self.new_tokens = new_tokens

    def batch(self, size: int) -> Batch:
        return self.setup.model.batch([self.setup.items[n % len(self.setup.items)] for n in range(size)])

    def contexts(self, batch: Batch) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """What is installed on the model in each variant."""
        return {
            "unhooked": nullcontext,
            "lean": partial(self.scaled.on, batch),
            "dense_clamp": partial(dense_clamp, self.setup, self.features),
        }

    def tokens(self, batch: Batch, context: Callable[[], AbstractContextManager[None]]) -> Int[Tensor, "batch new"]:
        with torch.inference_mode(), context():
            hf: Any = self.setup.model.hf
            found = hf.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=self.config
            )
        new = found[:, batch.input_ids.shape[1] :]
        if new.shape[1] != self.new_tokens:
            raise common.Disagreement(f"{new.shape[1]} tokens were generated where {self.new_tokens} were to be")
        return new

    def named(self, size: int) -> dict[str, Callable[[], object]]:
        batch = self.batch(size)
        return {name: partial(self.tokens, batch, context) for name, context in self.contexts(batch).items()}

    def agreement(self, size: int) -> dict[str, float]:
        """How far demur and the dense clamp are apart at the last position, and whether doing nothing does nothing.

        Raises:
            Disagreement: logits differ by more than 1e-4 of the largest; an empty intervention, or one that scales by
                1, changes a token; or the scaled features hardly change a logit.
        """
        batch = self.batch(size)
        plain = self.tokens(batch, nullcontext)
        for variant, compiled in (("no feature", self.nothing), ("features scaled by 1", self.unchanged)):
            if not torch.equal(self.tokens(batch, partial(compiled.on, batch)), plain):
                raise common.Disagreement(f"with {variant}, other tokens were generated than by the unhooked model")
        logits = {name: self._logits(batch, context) for name, context in self.contexts(batch).items()}
        error = common.relative_error(logits["lean"], logits["dense_clamp"])
        change = common.relative_error(logits["lean"], logits["unhooked"])
        if not error <= TOLERANCE:
            raise common.Disagreement(f"logits differ from the dense clamp's by {error:.1e} of the largest")
        if change <= 10 * TOLERANCE:
            raise common.Disagreement(f"scaling the features changed logits by {change:.1e} of the largest only")
        chosen = self.contexts(batch)
        same = self.tokens(batch, chosen["lean"]) == self.tokens(batch, chosen["dense_clamp"])
        return {"logit_error": error, "logit_change": change, "same_tokens_as_dense": float(same.double().mean())}

    @torch.no_grad()
    def _logits(
        self, batch: Batch, context: Callable[[], AbstractContextManager[None]]
    ) -> Float[Tensor, "batch vocab"]:
        with context():
            return self.setup.model.last_logits(batch)


def _options() -> argparse.Namespace:
    options = common.parser(__doc__ or "")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    options.add_argument("--new-tokens", type=int, default=32, help="tokens generated for each prompt")
    options.add_argument("--memory-batch", type=int, default=32, help="batch size at which memory is measured")
    options.add_argument("--no-dense", action="store_true", help="time the unhooked and the lean variant only")
    return options.parse_args()


def _variants(options: argparse.Namespace, shape: common.Shape, dtype: torch.dtype) -> Variants:
    setup = common.build(shape, device=options.device, dtype=dtype, n_prompts=8, n_tokens=options.tokens)
    return Variants(setup, options.new_tokens)


def main() -> None:
    options = _options()
    shape = common.shape_of(options)
    dtype = common.dtype_of(options)
    if options.only_memory:
        variants = _variants(options, shape, dtype)
        print(common.added_peak(variants.named(options.memory_batch)[options.only_memory], variants.setup.device))
        return
    # Values are compared in float32; a lower precision is timed on a variant that two layers of it were compared with.
    exact = shape if dtype == torch.float32 else common.replace(shape, n_layers=2)
    agreement = _variants(options, exact, torch.float32).agreement(4)
    variants = _variants(options, shape, dtype)
    seconds: dict[int, dict[str, list[float]]] = {}
    for size in options.batches:
        named = variants.named(size)
        if options.no_dense:
            named.pop("dense_clamp")
        seconds[size] = common.interleaved(named, repeats=options.repeats, device=variants.setup.device)
    peak = {} if options.no_memory else common.peaks(["unhooked", "lean", "dense_clamp"])
    _report(variants, options, agreement, seconds, peak)


def _report(
    variants: Variants,
    options: argparse.Namespace,
    agreement: dict[str, float],
    seconds: dict[int, dict[str, list[float]]],
    peak: dict[str, int],
) -> None:
    gpu = variants.setup.device.type == "cuda"
    rows: list[list[str]] = []
    slower: dict[str, common.Ratio] = {}
    faster: dict[str, common.Ratio] = {}
    for size, each in seconds.items():
        slower[str(size)] = common.ratio(each["lean"], each["unhooked"])
        row = [str(size), str(slower[str(size)])]
        if "dense_clamp" in each:
            faster[str(size)] = common.ratio(each["dense_clamp"], each["lean"])
            row += [str(faster[str(size)]), str(common.ratio(each["dense_clamp"], each["unhooked"]))]
        else:
            row += ["–", "–"]
        rows.append(row + ([f"{median(each[a]) * 1e3:.1f} ms" for a in ("unhooked", "lean")] if gpu else []))
    head = ["batch", "lean ÷ unhooked", "dense clamp ÷ lean", "dense clamp ÷ unhooked"]
    print(common.table(head + (["unhooked", "lean"] if gpu else []), rows))
    if peak:
        shown = ", ".join(f"{name} {common.mib(size)}" for name, size in peak.items())
        print(f"\nAdded peak memory at batch {options.memory_batch}: {shown}.")
    print(common.when_not_cuda(variants.setup.device))
    values: dict[str, Any] = {
        "features": len(variants.features),
        "prompt_tokens": options.tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "agreement": agreement,
        "lean_over_unhooked": slower,
        "dense_clamp_over_lean": faster,
        "added_peak_bytes": peak,
    }
    if gpu:
        values["seconds"] = {s: {a: median(t) for a, t in each.items()} for s, each in seconds.items()}
    print(common.json_line("generation", variants.setup, **values))


if __name__ == "__main__":
    main()
