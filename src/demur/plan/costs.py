"""What work costs: the sizes of the real model, counted on a model without weights, and the speed of this machine."""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from dataclasses import astuple, dataclass
from operator import add
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from demur.errors import InputError, ModelError
from demur.model import find_layers

EFFICIENCY: Final = 0.5
"""Share of a large matrix product's speed that a forward pass is assumed to reach."""


@dataclass(frozen=True)
class Work:
    """What a stage does.

    Attributes:
        passes, tokens: forward passes, and token slots read in them, padding included.
        logits: positions at which logits were computed.
        backward_passes, backward_tokens: backward passes (to activations: parameters are frozen), token slots in them.
        steps, written: steps of writing answers, one token for each row, and tokens written.
        dictionary: floating-point operations of products with whole dictionaries.
    """

    passes: int = 0
    tokens: int = 0
    logits: int = 0
    backward_passes: int = 0
    backward_tokens: int = 0
    steps: int = 0
    written: int = 0
    dictionary: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class ModelSizes:
    """What the cost of a model depends on.

    Attributes:
        parameters: all of them, embeddings too.
        n_layers, d_model: of the text decoder.
        value_bytes: bytes of a weight or an activation.
        token_flops, logit_flops: of a forward pass, for each token, and for each position whose logits are computed.
        saved_bytes: kept for the gradient of activations, for each token.
    """

    parameters: int
    n_layers: int
    d_model: int
    value_bytes: int
    token_flops: float
    logit_flops: float
    saved_bytes: float


def model_sizes(config: Any, dtype: torch.dtype, tokens: int) -> ModelSizes:
    """Sizes of the text decoder of a Hugging Face configuration, with costs as in a pass over `tokens`. Raises
    ModelError: the configuration is not of a causal language model."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # Masks of this attention ask nothing of the values, which a model without weights has not.
            model: Any = auto.from_config(text, dtype=dtype, attn_implementation="eager")
    except (ValueError, KeyError) as error:
        raise ModelError(f"{text.model_type!r} is not a causal language model that can be planned: {error}") from error
    model.eval().requires_grad_(False)
    flops, saved = _pass(model, tokens, logits=1)
    logit_flops = _pass(model, tokens, logits=2)[0] - flops
    return ModelSizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_layers=len(find_layers(model, int(text.num_hidden_layers))),
        d_model=int(text.hidden_size),
        value_bytes=dtype.itemsize,
        token_flops=(flops - logit_flops) / tokens,
        logit_flops=logit_flops,
        saved_bytes=saved / tokens,
    )


def _pass(model: nn.Module, tokens: int, logits: int) -> tuple[float, float]:
    """One forward pass over `tokens` on the meta device, with the logits of the last: operations, and bytes kept for
    the gradient of activations."""
    from torch.utils.flop_counter import FlopCounterMode

    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # pyright: ignore[reportPrivateUsage]
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        return tensor

    hf: Any = model
    embedded = hf.get_input_embeddings()(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    mask = torch.ones(1, tokens, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        hf(inputs_embeds=embedded.requires_grad_(), attention_mask=mask, use_cache=False, logits_to_keep=logits)
    kept = sum(size for storage, size in saved.items() if storage not in held)
    return float(counter.get_total_flops()), float(kept)


@dataclass(frozen=True)
class Machine:
    """Measured speed.

    Attributes:
        flops: floating-point operations per second of a large product.
        bandwidth: bytes per second of a copy.
        layer_call: seconds that one call of a decoder layer takes however little it has to do.
        resident: bytes that Python and the libraries hold before any model is loaded (0 on a GPU).
    """

    flops: float
    bandwidth: float
    layer_call: float = 0.0
    resident: int = 0

    def flops_of(self, work: Work, model: ModelSizes) -> float:
        """Floating-point operations of counted work. A backward pass to activations costs as much as a forward one."""
        tokens = work.tokens + work.backward_tokens + work.written
        return tokens * model.token_flops + (work.logits + work.written) * model.logit_flops + work.dictionary

    def seconds(self, work: Work, model: ModelSizes) -> float:
        """Seconds of counted work: its operations at half the product's speed, or the bytes of the weights for each
        written token where those take longer; and the calls of layers, backward ones twice."""
        speed = EFFICIENCY * self.flops
        writing = work.written * (model.token_flops + model.logit_flops) / speed
        moving = work.steps * model.parameters * model.value_bytes / self.bandwidth
        calls = model.n_layers * (work.passes + 2 * work.backward_passes + work.steps)
        reading = self.flops_of(work, model) / speed - writing
        return reading + max(writing, moving) + calls * self.layer_call


def planned_device(name: str) -> torch.device:
    """The device on which a study with `--device name` would run. Raises InputError: it cannot be used here."""
    if name in ("auto", "balanced", "balanced_low_0", "sequential"):
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {name} cannot be used here ({reason}); expected auto, cpu, cuda, cuda:N, mps or balanced"
        ) from None


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Speed of a large matrix product and of a copy, best of several, in well under a second."""
    side, values = (8192, 1 << 27) if device.type == "cuda" else (1024, 1 << 24)
    a = torch.ones(side, side, device=device, dtype=dtype)
    source = torch.ones(values, device=device)
    target = torch.empty_like(source)
    return Machine(
        flops=2 * side**3 / _best_seconds(lambda: a @ a, device),
        # A copy reads and writes every byte.
        bandwidth=2 * 4 * values / _best_seconds(lambda: target.copy_(source), device),
        layer_call=_layer_call(device),
        resident=_resident_bytes() if device.type == "cpu" else 0,
    )


def _layer_call(device: torch.device, layers: int = 4, steps: int = 12) -> float:
    """Seconds of one call of a decoder layer that has nothing to do: a tiny model writes a few tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64}
    config: Any = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    model: Any = LlamaForCausalLM(config).to(device).eval()  # pyright: ignore[reportArgumentType]
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    # `generate` does the work of inference mode itself, but not for the mask's tensors.
    with torch.inference_mode():
        seconds = _best_seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), device)
    return seconds / (layers * steps)


def _resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    def once() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return min(timeit.repeat(once, number=1, repeat=4))
