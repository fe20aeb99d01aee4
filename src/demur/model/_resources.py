"""Memory and threads: how many tokens fit one pass, what to do when they did not, and how many threads help."""

from __future__ import annotations

import gc
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeVar

import torch

from demur.errors import ModelError

T = TypeVar("T")
logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None] | None
"""Called with (done, all) prompts after each batch."""

# On a CPU larger batches stop paying long before memory ends, when activations no longer fit the cache; on a GPU they
# fill it.
CPU_TOKENS: Final = 1024
_GPU_SHARE = 0.5
_CPU_PADDING, _GPU_PADDING = 64, 2048

_FILL: Final = 8
_CACHE_BYTES: Final = 2**29
"""What keys and values of a batch's prompts may hold on a CPU."""

SMALL_MODEL: Final = 20_000_000
"""Parameters up to which a model gains nothing from threads."""


class Budgets(NamedTuple):
    """Tokens that one pass may hold, or bytes of each, and of one that keeps activations for a backward pass."""

    plain: int
    gradients: int


def padding_budget(device: torch.device) -> int:
    """Slots of padding for one pass: about as many as cost the time of a pass more. On a CPU a pass costs little beside
    its tokens; on a GPU it costs as much as some thousand."""
    return _GPU_PADDING if device.type == "cuda" else _CPU_PADDING


def token_budget(device: torch.device, bytes_per_token: int) -> int:
    """Tokens for one pass: half of the GPU's free memory at `bytes_per_token`, or a fixed 1,024 on a CPU."""
    if device.type != "cuda":
        return CPU_TOKENS
    free, _total = torch.cuda.mem_get_info(device)
    return tokens_in(free, bytes_per_token)


def tokens_in(free: float, bytes_per_token: int) -> int:
    """Tokens for one pass on a GPU with so much memory free."""
    return max(256, int(free * _GPU_SHARE) // max(1, bytes_per_token))


def token_bytes(config: Any, dtype: torch.dtype) -> Budgets:
    """Bytes that a pass of a text decoder of this configuration holds for each token: two layers' activations, and the
    keys and values of all, or with gradients all layers' activations."""
    d_model, layers = int(config.hidden_size), int(config.num_hidden_layers)
    per_layer = dtype.itemsize * (12 * d_model + 4 * int(getattr(config, "intermediate_size", 4 * d_model)))
    return Budgets(2 * per_layer + cache_bytes(config, dtype), layers * per_layer)


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, in all layers of a text decoder of this configuration."""
    heads = int(getattr(config, "num_attention_heads", 1))
    width = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * int(config.num_hidden_layers) * shared * width * dtype.itemsize


def answers_fill(token: int) -> int:
    """Budgets of a pass that one batch of answers fills on a CPU, where keys and values of a token take so many bytes.
    Its prompts are read in passes of one budget each. A step's time hardly grows with its rows: it is that of reading
    the weights, or in a small model of many small operations."""
    return max(1, min(_FILL, _CACHE_BYTES // (CPU_TOKENS * token)))


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on GPUs by their allocators, all of them together, elsewhere by the process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(each) for each in range(torch.cuda.device_count()))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kibibytes, macOS bytes.
    return peak if sys.platform == "darwin" else 1024 * peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation failure, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
    )


def next_batch(lengths: Sequence[int], order: Sequence[int], max_tokens: int, padding: float = math.inf) -> list[int]:
    """The first items of `order` (longest first) whose rows × width stays within `max_tokens`, and whose padding within
    `padding` slots; at least one."""
    longest, slots = lengths[order[0]], 0
    for n, item in enumerate(order):
        slots += longest - lengths[item]
        if n and ((n + 1) * longest > max_tokens or slots > padding):
            return list(order[:n])
    return list(order)


def by_length(lengths: Sequence[int]) -> list[int]:
    """Items, longest first: batches of similar length, and memory that runs out does so at once."""
    return sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))


def halving(items: Sequence[int], run: Callable[[Sequence[int]], T], shrink: Callable[[], bool]) -> Iterator[T]:
    """Run `items` as one batch; when memory runs out, as two halves, and so on. `shrink` is then called: it lowers what
    `run` itself packs into a pass (copies for several α's, features patched at a time) and says whether it could.
    Raises ModelError: one single item does not fit, with nothing left to lower."""
    try:
        result = run(items)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if not shrink() and len(items) == 1:
            raise ModelError(
                "memory ran out on a single prompt; use a smaller dtype or model, shorter prompts, or another --device"
            ) from error
    else:
        yield result
        return
    # Out of the except block, so that the failed batch's tensors are no longer held by the traceback.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(items) + 1) // 2
    logger.warning("memory ran out at %d rows; continuing with %d", len(items), middle)
    for part in (items[:middle], items[middle:]):
        if part:
            yield from halving(part, run, shrink)


@contextmanager
def fitting_threads(device: torch.device, parameters: int) -> Iterator[None]:
    """One thread for a small model on a CPU while the context is open; otherwise as many as torch would use.

    A step of a small model is done before its work is handed out, and threads that spin until the next take the cores
    from everything else: beside one other busy process, two threads were some fifty times slower than one. Sums are
    then also taken in the same order on every machine.
    """
    if device.type != "cpu" or parameters > SMALL_MODEL:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
