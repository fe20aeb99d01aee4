"""What both scripts share: shapes, random models and SAEs, prompts, timing, peak memory, and output."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from demur.errors import DemurError
from demur.model import ChatModel, Region, TokenizedPrompt
from demur.saes import DenseSae, Sae, Suite
from demur.testing import tiny_model

FIRING_RATE = 0.05
"""Fraction of tokens at which a feature fires. Higher than in trained SAEs, so that many of the pool's attributions are
not zero when the variants are compared; it costs neither variant anything."""


@dataclass(frozen=True)
class Shape:
    """A model and its SAEs, by size."""

    family: Literal["gemma2", "llama"]
    n_layers: int
    d_model: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    d_sae: int
    tie_embeddings: bool = True


SHAPES = {
    "toy": Shape("gemma2", 3, 32, 64, 4, 2, 8, 256, 128),
    # Gemma-2-2B's proportions: MLP 4 x d_model, queries as wide as d_model (0.9 x there), SAE 32 x d_model (28 x),
    # and an unembedding that costs 0.27 of the blocks (0.29).
    "cpu": Shape("gemma2", 8, 512, 2048, 8, 4, 64, 16_384, 16_384),
    "gemma-2-2b": Shape("gemma2", 26, 2304, 9216, 8, 4, 256, 256_000, 65_536),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, 32_768, tie_embeddings=False),
}
CUDA_SHAPES = ("gemma-2-2b", "llama-3.1-8b")


class Disagreement(DemurError):
    """Two variants that must compute the same do not, so timing them would mean nothing."""


class WholeSae(nn.Module):
    """One layer's whole JumpReLU SAE as the dense variants use it: a module with parameters, in the model's dtype."""

    def __init__(self, d_model: int, d_sae: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # Decoder rows of unit norm on average, near their encoder columns, as in trained SAEs.
        w_enc = torch.randn(d_model, d_sae, device=device, dtype=dtype) / d_model**0.5
        w_dec = torch.randn(d_sae, d_model, device=device, dtype=dtype) / d_model**0.5
        w_dec.add_(w_enc.T).mul_(0.5**0.5)
        self.w_enc = nn.Parameter(w_enc)
        self.w_dec = nn.Parameter(w_dec)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_model, device=device, dtype=dtype))
        self.threshold = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype))

    @torch.no_grad()
    def fit(self, residual: Float[Tensor, "token d_model"]) -> None:
        """Centre on the residuals, and set thresholds so that every feature fires at `FIRING_RATE` of the tokens."""
        mean = residual.mean(0)
        self.b_dec.copy_(mean)
        self.b_enc.copy_(-(mean @ self.w_enc))
        pre = residual @ self.w_enc + self.b_enc
        n_active = max(1, round(FIRING_RATE * len(residual)))
        # Between two tokens' values, not on one: there, rounding would decide whether the feature fires.
        self.threshold.copy_(pre.topk(n_active + 1, dim=0).values[-2:].mean(0).clamp(min=0))

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        pre = x @ self.w_enc + self.b_enc
        return pre * (pre > self.threshold)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        return f @ self.w_dec + self.b_dec

    def lean(self, layer: int) -> Sae:
        """The same numbers, not copied, behind demur's own interface."""
        dense = DenseSae(
            layer=layer,
            w_enc=self.w_enc.detach(),
            b_enc=self.b_enc.detach(),
            threshold=self.threshold.detach(),
            k=None,
            w_dec=self.w_dec.detach(),
            b_dec=self.b_dec.detach(),
        )
        return dense.sae(identity="random")  # the default key would be a hash of every weight


@dataclass
class Setup:
    """A random model, its SAEs, and prompts."""

    shape: Shape
    model: ChatModel
    saes: list[WholeSae]
    items: list[TokenizedPrompt]

    @property
    def suite(self) -> Suite:
        return Suite([sae.lean(layer) for layer, sae in enumerate(self.saes)], "random")

    @property
    def device(self) -> torch.device:
        return self.model.device


def build(shape: Shape, *, device: str, dtype: torch.dtype, n_prompts: int, n_tokens: int, seed: int = 0) -> Setup:
    """Random weights made on the device itself; nothing is downloaded."""
    torch.manual_seed(seed)
    where = torch.device(device)
    with where:
        hf = random_model(shape, dtype).eval()
    model = ChatModel(hf, tiny_model("gemma2", n_layers=1, d_model=8)[1], name="random")
    items = _prompts(shape.vocab, max(n_prompts, 4), n_tokens)
    with torch.no_grad(), model.capture(transform=lambda x: x[:, n_tokens // 4 :]) as caught:
        model.last_logits(model.batch(items[:16]))
    saes: list[WholeSae] = []
    for layer in range(shape.n_layers):
        saes.append(WholeSae(shape.d_model, shape.d_sae, where, dtype).requires_grad_(False))
        saes[-1].fit(caught[layer].flatten(0, 1))
    return Setup(shape, model, saes, items[:n_prompts])


def random_model(shape: Shape, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape with random weights, on the current device."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape.tie_embeddings,
        "dtype": dtype,
        # Without an end-of-turn token every answer has the full number of tokens.
        "eos_token_id": None,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.family == "gemma2":
        # The sdpa kernel leaves out Gemma 2's soft-capping of attention logits.
        config = Gemma2Config(**common, query_pre_attn_scalar=shape.head_dim)
        model: Any = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    else:
        model = LlamaForCausalLM._from_config(LlamaConfig(**common), attn_implementation="sdpa")
    return cast("PreTrainedModel", model)


def _prompts(vocab: int, n_prompts: int, n_tokens: int) -> list[TokenizedPrompt]:
    """Random tokens, 10 % shorter to 10 % longer than `n_tokens`; the first is a header, the last five a template's."""
    generator = torch.Generator().manual_seed(1)
    spread = max(1, n_tokens // 10)
    items: list[TokenizedPrompt] = []
    for n in range(n_prompts):
        length = n_tokens - spread + (2 * spread * n) // max(1, n_prompts - 1)
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        regions = [Region.SPECIAL, *[Region.INSTRUCTION] * (length - 6), *[Region.POST_INSTRUCTION] * 5]
        items.append(TokenizedPrompt(str(n), tuple(ids), tuple(int(region) for region in regions)))
    return items


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found.double().cpu() - expected.double().cpu()).abs().max() / expected.double().abs().max().cpu())


# Timing.


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each variant, round by round, after one warm-up round.

    The variants take turns, so that whatever else the machine does slows all of them; ratios are taken within a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            gc.collect()
            took = seconds_of(run, device)
            if turn:
                seconds[name].append(took)
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of one variant's time divided by another's, and the smallest and largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(of: Sequence[float], to: Sequence[float]) -> Ratio:
    rounds = [a / b for a, b in zip(of, to, strict=True)]
    return Ratio(median(rounds), min(rounds), max(rounds))


# Peak memory.


def added_peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which `run` raises memory above what is resident before it, once everything is warm.

    On a GPU: the allocator's peak. On a CPU: the kernel's own high-water mark of this process's resident memory, reset
    just before, so nothing is sampled and scratch space of the libraries counts too. Each variant therefore has a
    process of its own (`peaks`). In it, blocks of 64 KiB and more are mapped from the system one by one and given back
    when freed; otherwise memory that the allocator keeps would hide what the next run needs.
    """
    run()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux only")
    return int(found[1]) * 1024


def peaks(variants: Sequence[str]) -> dict[str, int]:
    """Run this very command again for each variant, in a fresh process that measures that variant's memory only."""
    found: dict[str, int] = {}
    for variant in variants:
        command = [*sys.orig_argv, "--only-memory", variant]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found[variant] = int(done.stdout.split()[-1])
    return found


def n_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 10 * 2**20 else f"{size / 2**20:,.0f} MiB"


# Options and output.


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--shape", choices=tuple(SHAPES), help="default: cpu; with --device cuda: gemma-2-2b")
    options.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    options.add_argument("--d-sae", type=int, help="another number of features per layer")
    options.add_argument("--tokens", type=int, default=40, help="mean length of the prompts")
    options.add_argument("--repeats", type=int, default=5, help="timed rounds after the warm-up")
    options.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; on a GPU bfloat16")
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    options.add_argument("--only-memory", metavar="VARIANT", help="print only one variant's added peak, in bytes")
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    """The chosen shape; sets the number of threads on the way.

    Raises:
        SystemExit: a GPU was asked for and there is none: nothing is measured in its place.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("not run: --device cuda was asked for, and torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape or ("gemma-2-2b" if options.device == "cuda" else "cpu")]
    return replace(shape, n_layers=options.layers or shape.n_layers, d_sae=options.d_sae or shape.d_sae)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine().replace('_', '-')}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def json_line(name: str, setup: Setup, **values: Any) -> str:
    """Everything in one line for machines."""
    record = {
        "script": name,
        "hardware": hardware(setup.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "shape": asdict(setup.shape),
        **values,
    }
    return json.dumps(record, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Ratio):
        return {key: round(each, 3) for key, each in asdict(value).items()}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def when_not_cuda(device: torch.device) -> str:
    """Says so when full shapes were not run."""
    if device.type == "cuda":
        return ""
    reason = "run with --device cuda" if torch.cuda.is_available() else "torch sees no CUDA device"
    return f"Full shapes ({', '.join(CUDA_SHAPES)}) were not run: {reason}."
