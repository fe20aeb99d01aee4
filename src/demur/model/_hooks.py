"""The only way in which demur touches a model: forward hooks inside context managers.

Contexts nest. Hooks on one layer run in the order in which their contexts were opened, each seeing what the ones
before it made: a capture opened before an edit records the residual that enters the edit, one opened inside it records
what comes out. Every hook is removed on the way out, also after an exception, and nobody else's hooks are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from demur.errors import ModelError

if TYPE_CHECKING:
    from demur.model._chat_format import Batch
    from demur.model._chat_model import ChatModel


@dataclass
class Cursor:
    """Which tokens the hidden states passing by belong to, kept up to date by `track`.

    HF's `generate` calls the model once on the prompt and then once a token; a hook sees only hidden states. The cursor
    tells it which slots of the whole sequence they are, and which of them are padding.
    """

    real: Bool[Tensor, "batch pos"] | None = None
    """True at real tokens of the current slots; None when all of them are."""
    start: int = 0
    """Slot of the first current token, counted from the left end of the padded prompt."""
    length: int = 0
    """Number of current slots."""


Edit = Callable[[Tensor, Cursor], Tensor]
"""`(residual [batch, pos, d_model], cursor) -> residual`: what replaces a layer's output."""


@runtime_checkable
class CompiledIntervention(Protocol):
    """An intervention made ready for one model: it gives the edits of each layer's output, batch by batch."""

    @property
    def id(self) -> str:
        """Names it in answers, files and cache keys; "none" when it does nothing."""
        ...

    @property
    def layers(self) -> Collection[int]:
        """Layers that it edits."""
        ...

    def edits(self, batch: Batch | None) -> Mapping[int, Sequence[Edit]]:
        """Layer → edits, in order. `batch` is None where the model is called on texts that nobody has announced.

        Raises:
            InputError: it differs by prompt, and no batch is known.
        """
        ...


@runtime_checkable
class BoundIntervention(Protocol):
    """What `ChatModel.intervene` takes: an intervention that has everything it needs but the model."""

    @property
    def id(self) -> str:
        """Names it in answers, files and cache keys."""
        ...

    def compile(self, model: ChatModel) -> CompiledIntervention:
        """The same, ready for `model`."""
        ...


def residual_of(output: Any) -> Tensor:
    """The residual in a decoder layer's output: a tensor in transformers 5, the first of a tuple before."""
    residual = output[0] if isinstance(output, tuple) else output
    if not isinstance(residual, Tensor):
        raise ModelError(
            f"a decoder layer returned {type(residual).__name__} where its output residual was expected; "
            "this architecture is not supported"
        )
    return residual


def _replaced(output: Any, residual: Tensor) -> Any:
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


@contextmanager
def hooked(layers: Sequence[nn.Module], functions: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call `functions[l]` with the residual that leaves layer `l`; what it returns, if anything, replaces it.

    Args:
        layers: the decoder layers, in model order.
        functions: layer → function of the residual `[batch, pos, d_model]` in the model's dtype.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def hook(function: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        def run(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            residual = function(residual_of(output))
            return None if residual is None else _replaced(output, residual)

        return run

    try:
        for layer, function in functions.items():
            handles.append(layers[layer].register_forward_hook(hook(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Captured:
    """Residuals recorded by `capture`, by layer, from the last forward pass inside the context."""

    residuals: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict[int, Tensor])

    def __getitem__(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        return self.residuals[layer]

    def stacked(self) -> Float[Tensor, "layer batch pos d_model"]:
        """All captured layers, ascending."""
        return torch.stack([self.residuals[layer] for layer in sorted(self.residuals)])


@contextmanager
def capture(
    layers: Sequence[nn.Module],
    which: Sequence[int] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Captured]:
    """Record detached residuals `x[l]` while the context is open.

    Args:
        layers: the decoder layers, in model order.
        which: layers to record (default: all).
        transform: applied before storing, for example to keep the last position only.
    """
    captured = Captured()

    def keep(layer: int) -> Callable[[Tensor], None]:
        def store(residual: Tensor) -> None:
            residual = residual.detach()
            captured.residuals[layer] = residual if transform is None else transform(residual)

        return store

    with hooked(layers, {layer: keep(layer) for layer in (range(len(layers)) if which is None else which)}):
        yield captured


@contextmanager
def track(model: nn.Module) -> Iterator[Cursor]:
    """Keep a `Cursor` up to date while `model` (the whole causal LM) runs, in single passes and in `generate`.

    Raises:
        ModelError: the model is called with a prepared attention mask (a dictionary or 4-D tensor, as static caches
            do), from which padding cannot be read.
    """
    cursor = Cursor()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        cursor.length = tokens.shape[1]
        if mask is None:
            cache = kwargs.get("past_key_values")
            cursor.start = int(cache.get_seq_length()) if cache is not None else 0
            cursor.real = None
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise ModelError(
                "interventions need the two-dimensional attention mask, but the model was called with a prepared one; "
                "generate with the default (dynamic) cache"
            )
        cursor.start = mask.shape[1] - cursor.length
        current = mask[:, cursor.start :].bool()
        cursor.real = None if bool(current.all()) else current

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield cursor
    finally:
        handle.remove()


@contextmanager
def edited(model: nn.Module, layers: Sequence[nn.Module], edits: Mapping[int, Sequence[Edit]]) -> Iterator[None]:
    """Apply `edits[l]`, in order, to the residual that leaves layer `l`. With no edits, no hook is installed."""
    if not any(edits.values()):
        yield
        return
    with track(model) as cursor:

        def apply(chain: Sequence[Edit]) -> Callable[[Tensor], Tensor]:
            def run(residual: Tensor) -> Tensor:
                for edit in chain:
                    residual = edit(residual, cursor)
                return residual

            return run

        with hooked(layers, {layer: apply(chain) for layer, chain in edits.items() if chain}):
            yield


def count_hooks(model: nn.Module) -> int:
    """Forward hooks and pre-hooks on `model` and its submodules (tests and `demur doctor`)."""
    # torch offers no public way to count hooks.
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())  # pyright: ignore[reportPrivateUsage]
