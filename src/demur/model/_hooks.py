"""The only way in which demur touches a model: forward hooks inside context managers.

Contexts nest. Hooks on one layer run in the order in which their contexts were opened, each seeing what the ones
before it made: a capture opened before an edit records the residual that enters the edit, one opened inside it records
what comes out. Every hook is removed on the way out, also after an exception, and nobody else's hooks are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from demur.errors import ModelError
from demur.types import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from demur.model._chat_format import Batch
    from demur.model._chat_model import ChatModel

Residuals = dict[int, Float[Tensor, "batch pos d_model"]]
"""Layer → what left it, or what was seen at another place of it."""


@dataclass(frozen=True)
class Input:
    """What enters a module, as a place to hook. A module itself stands for what leaves it."""

    module: nn.Module


Point = nn.Module | Input
"""A place that `hooked` hooks."""
Sites = Mapping[int, Site]
"""Layer → the place where its dictionary reads, for layers where that is not the residual that leaves it."""
NO_SITES: Sites = MappingProxyType({})


@dataclass
class Cursor:
    """Which tokens the hidden states passing by belong to, kept up to date by `track`. HF's `generate` calls the model
    once on the prompt and then once a token; a hook sees only hidden states. The cursor tells it which slots of the
    whole sequence they are, and which of them are padding."""

    real: Bool[Tensor, "batch pos"] | None = None
    """True at real tokens of the current slots; None when all of them are."""
    start: int = 0
    """Slot of the first current token, counted from the left end of the padded prompt."""
    length: int = 0
    """Number of current slots."""
    read: Residuals = field(default_factory=Residuals)
    """What dictionaries read in the current pass, where that is not the residual that leaves their layer."""


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

    @property
    def reads(self) -> Sites:
        """Where edits read that do not read the residual which they edit."""
        ...

    def edits(self, batch: Batch | None) -> Mapping[int, Sequence[Edit]]:
        """Layer → edits, in order. `batch` is None where the model is called on texts that nobody has announced: what
        differs by prompt then raises an `InputError`."""
        ...


@runtime_checkable
class BoundIntervention(Protocol):
    """What `ChatModel.intervene` takes: an intervention that has everything it needs but the model."""

    @property
    def id(self) -> str: ...

    def compile(self, model: ChatModel) -> CompiledIntervention: ...


@contextmanager
def hooked(layers: Sequence[Point], functions: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Call `functions[l]` with the residual (`[batch, pos, d_model]`, the model's dtype) that leaves layer `l` of
    `layers`, or enters it where that is an `Input`; what it returns, if anything, replaces it."""

    def hook(function: Callable[[Tensor], Tensor | None], _module: nn.Module, _inputs: Any, output: Any) -> Any:
        # Layers return a tensor in transformers 5, a tuple before.
        residual = output[0] if isinstance(output, tuple) else output
        if not isinstance(residual, Tensor):
            raise ModelError(
                f"a decoder layer returned {type(residual).__name__} where its output residual was expected; "
                "this architecture is not supported"
            )
        changed = function(residual)
        return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed

    def entering(function: Callable[[Tensor], Tensor | None], _module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        changed = function(inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    with ExitStack() as stack:
        for layer, function in functions.items():
            point = layers[layer]
            if isinstance(point, Input):
                handle = point.module.register_forward_pre_hook(partial(entering, function))
            else:
                handle = point.register_forward_hook(partial(hook, function))
            stack.enter_context(handle)
        yield


@contextmanager
def capture(
    layers: Sequence[Point], which: Sequence[int] | None = None, transform: Callable[[Tensor], Tensor] | None = None
) -> Iterator[Residuals]:
    """Record detached residuals `x[l]` of `layers`, or of those in `which`, while the context is open: the last forward
    pass's. `transform` is applied before storing, for example to keep the last position only."""
    captured: Residuals = {}

    def keep(layer: int, residual: Tensor) -> None:
        captured[layer] = residual.detach() if transform is None else transform(residual.detach())

    with hooked(layers, {layer: partial(keep, layer) for layer in (range(len(layers)) if which is None else which)}):
        yield captured


class _DeepEnough(Exception):
    """Ends a forward pass: what was asked for has been read."""


@contextmanager
def reading(layers: Sequence[Point], which: Collection[int]) -> Iterator[Residuals]:
    """Keep what passes the points of some layers in each pass, with its gradients. A layer's input is there before its
    output is, so that hooks on the one can use the other."""
    found: Residuals = {}
    with hooked(layers, {layer: partial(found.__setitem__, layer) for layer in which}):
        yield found


def residuals_of(
    layers: Sequence[Point], which: Sequence[int], run: Callable[[], object]
) -> dict[int, Float[Tensor, "batch pos d_model"]]:
    """Residuals `x[l]` of the layers in `which`, from the pass that `run` makes, which is stopped after the deepest of
    them. Interventions that are open act first, as in any other pass; without gradients."""
    if not which:
        return {}
    deepest = max(which)
    found: Residuals = {}

    def keep(layer: int, residual: Tensor) -> None:
        found[layer] = residual.detach()
        if layer == deepest:
            raise _DeepEnough

    with torch.no_grad(), hooked(layers, {layer: partial(keep, layer) for layer in which}), suppress(_DeepEnough):
        run()
    return found


@runtime_checkable
class AnswerWatch(Protocol):
    """Watches one batch of answers while they are written."""

    def stopped(self) -> Bool[Tensor, " batch"]:
        """Rows that must not be written any further."""
        ...

    def released(self) -> Sequence[int | None]:
        """Of each row, how many answer tokens came before the one that stopped it; None where nothing did."""
        ...


@runtime_checkable
class AnswerGuard(Protocol):
    """What `ChatModel.generate` takes as its `guard`: it reads answers in the pass that writes them, and stops them."""

    def watch(self, batch: Batch) -> AbstractContextManager[AnswerWatch]:
        """Watch the answers to the conversations of a batch while the context is open."""
        ...


@contextmanager
def _instead(modules: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Compute something else in place of some modules while the context is open; hooks on them stay."""
    before = [(module, vars(module).get("forward")) for module in modules]
    try:
        for module, function in modules.items():
            module.forward = function
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def resumed(
    layers: Sequence[nn.Module], layer: int, output: Float[Tensor, "batch pos d_model"]
) -> AbstractContextManager[None]:
    """Skip `layers` up to `layer`, which gives `output` whatever goes in; hooks on it see that. For passes that differ
    only from there on."""

    def skip(each: int, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return output if each == layer else hidden

    return _instead({module: partial(skip, each) for each, module in enumerate(layers[: layer + 1])})


def final_states_of(model: PreTrainedModel, run: Callable[[], object]) -> Float[Tensor, "batch pos d_model"]:
    """What the output embedding reads (the last residual, normalised), from the pass that `run` makes, which ends
    before any logits are computed; without gradients."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        found.append(output[0].detach())
        raise _DeepEnough

    with torch.no_grad(), model.base_model.register_forward_hook(keep), suppress(_DeepEnough):
        run()
    return found[0]


def head_only(model: PreTrainedModel, states: Float[Tensor, "batch pos d_model"]) -> AbstractContextManager[None]:
    """Skip everything before the output embedding, which reads `states` whatever goes in. No hook on a layer runs."""
    return _instead({model.base_model: lambda *_args, **_kwargs: _FinalStates(states)})


class _FinalStates:
    """What a decoder returns that has nothing to say but its last hidden states."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, place: int) -> Tensor:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        """Caches, router's logits and all else that some models pass on: none."""


@contextmanager
def track(model: nn.Module) -> Iterator[Cursor]:
    """Keep a `Cursor` up to date while `model` (the whole causal LM) runs, in single passes and in `generate`. A
    prepared attention mask (a dictionary or 4-D tensor, as static caches make), which hides padding, is a `ModelError`.
    """
    cursor = Cursor()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        cursor.length = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[1]
        mask = kwargs.get("attention_mask")
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

    with model.register_forward_pre_hook(before, with_kwargs=True):
        yield cursor


@contextmanager
def folded_head(model: PreTrainedModel) -> Iterator[None]:
    """Hand the output embedding its hidden states as one block while the context is open. The last positions of longer
    sequences are a strided slice, of which torch makes a batched product, and copies the embedding for every row: 1.1
    GiB each at 256k tokens. `contiguous()` would not do: at batch 1 it returns the slice, strides and all."""
    head = model.get_output_embeddings()

    def fold(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = inputs
        return (hidden.clone(memory_format=torch.contiguous_format), *others)

    with ExitStack() as stack:
        if isinstance(head, nn.Module):
            stack.enter_context(head.register_forward_pre_hook(fold))
        yield


def count_hooks(model: nn.Module) -> int:
    """Forward hooks and pre-hooks on `model` and its submodules (tests and `demur doctor`)."""
    # torch offers no public way to count hooks.
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())  # pyright: ignore[reportPrivateUsage]
