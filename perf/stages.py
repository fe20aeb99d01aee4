"""A study's stages at the shape of a real model: what each takes of the machine's speed, and what copies of the output
embedding would cost.

Every stage runs in two arms, in turns: `now`, and `strided`, where the output embedding gets its hidden states as a
slice of longer sequences, as transformers hands them over. `share` is of the machine's own best: floating-point
operations (counted by torch) against a matrix product, for decoding the bytes of the weights against a plain read.
Dictionaries have no output embedding and one arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from demur.method.activations import dictionary_means
from demur.method.interventions import Compiled, ScaleFeatures
from demur.method.likelihood import token_losses
from demur.method.selection import cosine_pool
from demur.model import Batch, Region, TokenizedPrompt, decode_greedily, folded_head
from demur.saes import Sae, Suite
from perf import attribution, common, generation

DICTIONARY_PROMPTS, DICTIONARY_LAYERS = 64, 2
NEW_TOKENS, ANSWER_TOKENS = 8, 128


class Stages:
    """All stages on one set-up, whose SAEs are narrow: attribution and interventions read a few rows only. The whole
    dictionaries that are looked through have the shape's own width."""

    def __init__(self, shape: common.Shape, options: Any) -> None:
        narrow = common.replace(shape, d_sae=512)
        dtype = common.dtype_of(options)
        build = partial(common.build, device=options.device, dtype=dtype, n_tokens=options.tokens)
        self.setup = build(narrow, n_prompts=4)
        self.model, self.items = self.setup.model, self.setup.items
        self.scaled = Compiled(
            self.model, self.setup.suite, [ScaleFeatures(generation.features_of(narrow), generation.FACTOR)]
        )
        self.shape, self.dtype = shape, dtype
        self.n_dictionaries = min(DICTIONARY_LAYERS, shape.n_layers)

    @cached_property
    def dictionaries(self) -> Suite:
        """SAEs of the first layers, at their full width."""
        shape, residuals = self.shape, torch.randn(256, self.shape.d_model, device=self.setup.device)
        saes: list[Sae] = []
        for layer in range(self.n_dictionaries):
            sae = common.WholeSae(shape.d_model, shape.d_sae, self.setup.device, torch.float32).requires_grad_(False)
            sae.fit(residuals)
            saes.append(sae.lean(layer))
        return Suite(saes, "random")

    def attribute(self, method: Any, steps: int, n_prompts: int) -> object:
        setup = common.replace(self.setup, items=self.items[:n_prompts])
        return attribution.Variants(setup, steps=steps).lean(method)

    def forward(self) -> object:
        with torch.inference_mode():
            return self.model.last_logits(self.model.batch(self.items))

    def losses(self) -> object:
        """Cross-entropy of answers that are given."""
        answer, regions = (7,) * ANSWER_TOKENS, (int(Region.RESPONSE),) * ANSWER_TOKENS
        answered = [TokenizedPrompt(item.prompt_id, item.ids + answer, item.regions + regions) for item in self.items]
        return token_losses(self.model, answered)

    def decode(self, batch: Batch, n: int, *, features: bool) -> object:
        with torch.inference_mode(), self.scaled.on(batch) if features else nullcontext():
            return decode_greedily(self.model, batch, n, [()] * len(batch))

    @property
    def passes(self) -> dict[str, Callable[[], object]]:
        """Stages that are bound by arithmetic."""
        return {
            "forward, 4 prompts, last logits": self.forward,
            "attribution, gradient, 4 prompts": partial(self.attribute, "gradient", 1, 4),
            "integrated gradients, 3 steps, 2 prompts": partial(self.attribute, "ig", 3, 2),
            f"losses of 4 answers of {ANSWER_TOKENS} tokens": self.losses,
        }

    @property
    def answers(self) -> dict[str, Callable[[int], object]]:
        """Stages that are bound by reading the weights, given how many tokens to write."""
        four, one = self.model.batch(self.items), self.model.batch(self.items[:1])
        return {
            f"{NEW_TOKENS} tokens, batch 4": lambda n: self.decode(four, n, features=False),
            f"{NEW_TOKENS} tokens, batch 4, 20 features": lambda n: self.decode(four, n, features=True),
            f"{NEW_TOKENS} tokens, batch 1, 20 features": lambda n: self.decode(one, n, features=True),
        }

    def encode(self) -> object:
        """Means over the features of whole dictionaries."""
        items = [self.items[n % len(self.items)] for n in range(DICTIONARY_PROMPTS)]
        return dictionary_means(self.model, self.dictionaries, [items], ["mean", "rate"])

    def pool(self) -> object:
        """Cosines of every decoder row with a direction."""
        return cosine_pool(self.dictionaries, torch.ones(self.shape.d_model), 10)


@contextmanager
def head(arm: str, model: Any) -> Iterator[None]:
    """The output embedding in one of the two arms."""
    if arm == "now":
        with folded_head(model.hf):
            yield
    else:
        with patch("demur.model._chat_model.folded_head", lambda _model: nullcontext()):
            yield


class Flops(TorchDispatchMode):
    """Floating-point operations of matrix products, forward and backward, by torch's own formulas. (Its
    `FlopCounterMode` hooks modules, which gradients of activations alone do not survive.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula, options = flop_registry.get(func._overloadpacket), kwargs or {}
        if formula is None:
            # In inference mode a linear layer arrives whole.
            with self:
                parts = func.decompose(*args, **options)
            return func(*args, **options) if parts is NotImplemented else parts
        out = func(*args, **options)
        self.total += formula(*args, **options, out_val=out)
        return out


def flops_of(run: Callable[[], object]) -> int:
    with Flops() as counter:
        run()
    return counter.total


def best_product(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best matrix product."""
    weight = torch.randn(2304, 9216, device=device, dtype=dtype)
    rates = []
    for rows in (160, 1024, 4096):
        x = torch.randn(rows, 2304, device=device, dtype=dtype)
        rates.append(2 * x.numel() * 9216 / _fastest(lambda x=x: x @ weight, device))
    return max(rates)


def best_read(device: torch.device) -> float:
    """Bytes a second of the best plain read of a gibibyte."""
    block = torch.ones(1 << 28, device=device)
    return block.nbytes / min(_fastest(block.sum, device), _fastest(block.view(1 << 14, -1).sum, device))


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    found: list[float] = []
    while len(found) < 6 and sum(found) < 5.0:
        found.append(common.seconds_of(run, device))
    return min(found)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", help="stages whose name holds this")
    options = parser.parse_args()
    stages = Stages(common.shape_of(options), options)
    device, model = stages.setup.device, stages.model
    product, read = best_product(device, stages.dtype), best_read(device)
    rows: list[list[str]] = []
    records: dict[str, Any] = {}

    def measure(name: str, run: Callable[[], object], arms: tuple[str, ...], share: Callable[[float], float]) -> None:
        def in_arm(arm: str) -> object:
            with head(arm, model):
                return run()

        variants = {arm: partial(in_arm, arm) for arm in arms}
        seconds = common.interleaved(variants, repeats=options.repeats, device=device)
        memory = {} if options.no_memory else {arm: common.added_peak(each, device) for arm, each in variants.items()}
        now = median(seconds["now"])
        slower = str(common.ratio(seconds[arms[-1]], seconds["now"])) if len(arms) > 1 else "–"
        peaks = [common.mib(memory[arm]) if arm in memory else "–" for arm in ("now", "strided")]
        rows.append([name, f"{now:.2f} s", slower, *peaks, f"{share(now):.0%}"])
        records[name] = {"seconds": seconds, "added_peak_bytes": memory, "share": share(now)}
        print(*rows[-1], sep=" | ", flush=True)

    both = ("now", "strided")
    for name, run in stages.passes.items():
        if options.only in name:
            flops = flops_of(run)
            measure(name, run, both, lambda now, flops=flops: flops / now / product)
    weights = common.n_bytes([model.hf])
    for name, run in stages.answers.items():
        if options.only not in name:
            continue
        first = median(common.seconds_of(partial(run, 1), device) for _ in range(options.repeats))
        read_again = weights * (NEW_TOKENS - 1)
        measure(name, partial(run, NEW_TOKENS), both, lambda now, n=read_again, f=first: n / max(1e-9, now - f) / read)
    if options.only in "whole dictionaries":
        encoding = flops_of(stages.encode)
        measure("whole dictionaries encoded", stages.encode, ("now",), lambda now: encoding / now / product)
        decoders = 4 * stages.shape.d_model * stages.shape.d_sae * stages.n_dictionaries
        measure("cosines of whole decoders", stages.pool, ("now",), lambda now: decoders / now / read)
    print(common.table(["stage", "now", "strided ÷ now", "added peak", "strided", "share"], rows))
    known = {"product_flops": product, "read_bytes": read, "repeats": options.repeats, "tokens": options.tokens}
    print(common.json_line("stages", common.replace(stages.setup, shape=stages.shape), **known, stages=records))


if __name__ == "__main__":
    main()
