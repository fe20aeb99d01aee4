"""Interventions: frozen values that say what to do to a model, and the one place where they become hooks.

Decoding is affine and the SAE's error is kept, so changing feature `i` from `f_i(x)` to another value moves the
residual by the difference times decoder row `d_i`: only the chosen features' rows are needed, and the result equals
encoding densely, clamping, decoding and adding the error back.

A transcoder's features are read from what enters the MLP, and written to what it adds to the residual, its error kept.

Every change of a layer's features has the form `f ← s·f + t`, so all feature interventions on a layer, shared or
one set per prompt, fuse into `x ← x + ((s − 1)·f(x) + t) W_dec`, with every feature read from the same incoming `x`.

A new intervention is one class: a frozen dataclass that derives from `Intervention` and gives `change`, or from
`FeatureIntervention` and gives `affine`. Its id, its use in `Compiled`, padding and `where` come from the base.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demur.errors import InputError, SaeError
from demur.model import NO_SITES, Batch, ChatModel, Cursor, Edit, Region, Sites
from demur.saes import Rows, Suite
from demur.types import FeatureId, Prompt

Where = Literal["all", "prompt"]
"""Tokens that are changed: all of them (the answer's too), or the prompt's only, even where an answer is given.
Padding never is."""

Change = Callable[[Tensor], Tensor]
"""`residual [batch, pos, d_model] -> residual` of one layer; padding and `where` are seen to by `Compiled`."""


def _canonical(value: object) -> object:
    """A value whose `repr` is the same for equal values: 1 and 1.0, a feature and its pair, a tensor on any device."""
    if isinstance(value, Tensor):
        numbers = value.detach().float().cpu().contiguous().numpy()
        return numbers.shape, hashlib.sha256(numbers.tobytes()).hexdigest()
    if isinstance(value, Intervention):
        return value.id
    if isinstance(value, Mapping):
        return [(key, _canonical(value[key])) for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    return value if isinstance(value, str) or value is None else float(value)  # pyright: ignore


class Intervention:
    """Base of interventions. One on the residual gives `change`, and `acts_on` unless it means every layer."""

    where: Where = "all"
    """Tokens that are changed; a subclass may make it a field."""
    regions: tuple[Region, ...] | None = None
    """Regions whose tokens are changed (None: all), where a batch says them. A token that is generated is a response's.
    """

    @property
    def label(self) -> str:
        """What it does, in a word, for its id."""
        return type(self).__name__

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys: its label and a digest of its class and all its fields."""
        values = (_canonical(getattr(self, each.name)) for each in fields(cast("Any", self)))
        digest = hashlib.sha256(repr([type(self).__qualname__, *values]).encode()).hexdigest()
        return f"{self.label}@{digest[:10]}"

    def acts_on(self, model: ChatModel) -> Iterable[int]:
        """Layers whose output is changed."""
        return range(model.n_layers)

    def change(self, model: ChatModel, layer: int) -> Change:
        """What happens to the output of `layer`; asked for once, before any pass."""
        raise NotImplementedError(f"{type(self).__name__} says of no layer what happens there; give it `change`")

    def bind(self, suite: Suite | None = None) -> Bound:
        """With the SAEs that it needs: what `ChatModel.intervene` takes."""
        return bind(suite, self)

    def compile(self, model: ChatModel) -> Compiled:
        """Ready for `model`, without SAEs."""
        return Compiled(model, None, [self])


class FeatureIntervention(Intervention):
    """Base of interventions on features: `f ← scale·f + shift`, given by `affine` in the order of `features`."""

    features: tuple[FeatureId, ...]
    one_prompt: ClassVar[bool] = False
    """It belongs to one prompt, and is refused outside a `PerPrompt`."""

    def affine(self) -> tuple[float | Tensor, Float[Tensor, "*pos k"]]:
        """The scale of all features, and the shift of each: `[k]`, or `[pos, k]` by token of the prompt. A scale that
        differs by token or feature is such a tensor too."""
        raise NotImplementedError(f"{type(self).__name__} does not say what becomes of its features; give it `affine`")

    def answer_shift(self) -> Float[Tensor, " k"] | None:
        """The shift of each on the answer's tokens (None: that of the prompt, or of its last token)."""
        return None


@dataclass(frozen=True)
class ScaleFeatures(FeatureIntervention):
    """`f ← factor·f`. Factor 0 removes the features, negative ones reverse them (paper, section 4.1)."""

    features: tuple[FeatureId, ...]
    factor: float
    where: Where = "all"

    @property
    def label(self) -> str:
        return f"scale({self.factor:g})x{len(self.features)}"

    def affine(self) -> tuple[float, Float[Tensor, "*pos k"]]:
        return self.factor, torch.zeros(len(self.features))


@dataclass(frozen=True)
class ScaleFrom(FeatureIntervention):
    """`f ← factor·f`, each feature from a token of its own on, the answer's tokens too (paper, section 4.2). `starts`
    are places in the prompt, its padding left out, one for each feature, and `length` is the prompt's number of tokens.
    It belongs to one prompt: give it in a `PerPrompt`."""

    features: tuple[FeatureId, ...]
    factor: float
    starts: tuple[int, ...]
    length: int
    one_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.features):
            raise InputError(
                f"{len(self.starts)} starts were given for {len(self.features)} features; give one for each"
            )

    @property
    def label(self) -> str:
        return f"scale-from({self.factor:g})x{len(self.features)}"

    def affine(self) -> tuple[Float[Tensor, "pos k"], Float[Tensor, " k"]]:
        acts = torch.arange(self.length)[:, None] >= torch.tensor(self.starts)
        return torch.where(acts, self.factor, 1.0), torch.zeros(len(self.features))


@dataclass(frozen=True)
class SetFeatures(FeatureIntervention):
    """`f ← value`: one activation for all features, or one for each."""

    features: tuple[FeatureId, ...]
    value: float | tuple[float, ...]
    where: Where = "all"

    def __post_init__(self) -> None:
        if isinstance(self.value, tuple) and len(self.value) != len(self.features):
            raise InputError(
                f"{len(self.value)} values were given for {len(self.features)} features; give one for each"
            )

    @property
    def label(self) -> str:
        shown = "each" if isinstance(self.value, tuple) else f"{self.value:g}"
        return f"set({shown})x{len(self.features)}"

    def affine(self) -> tuple[float, Float[Tensor, "*pos k"]]:
        return 0.0, torch.tensor(self.value, dtype=torch.float32).expand(len(self.features))


@dataclass(frozen=True, eq=False)
class HoldFeatures(FeatureIntervention):
    """`f ← its value in another run`. On prompt tokens `values`: `[k]` (the same at every token) or `[pos, k]` (one row
    for each token of the prompt, its padding left out), columns in the order of `features`; a feature is left alone
    where its value is nan. The answer's tokens have no counterpart in the other run: there features are `after`, `[k]`,
    or released (None). It belongs to one prompt: give it in a `PerPrompt`."""

    features: tuple[FeatureId, ...]
    values: Float[Tensor, "*pos k"]
    after: Float[Tensor, " _"] | None = None
    one_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        k = len(self.features)
        if self.values.ndim not in (1, 2) or self.values.shape[-1] != k:
            raise InputError(f"held values have shape {tuple(self.values.shape)}; expected [{k}] or [tokens, {k}]")
        if self.after is not None and self.after.shape != (k,):
            raise InputError(f"values held after the prompt have shape {tuple(self.after.shape)}; expected [{k}]")

    @property
    def where(self) -> Where:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "prompt" if self.after is None else "all"

    @property
    def label(self) -> str:
        return f"hold x{len(self.features)}"

    def affine(self) -> tuple[float | Tensor, Float[Tensor, "*pos k"]]:
        values = self.values.detach().float().cpu()
        return values.isnan().float(), values.nan_to_num(0.0)

    def answer_shift(self) -> Float[Tensor, " k"] | None:
        return None if self.after is None else self.after.detach().float().cpu()


@dataclass(frozen=True)
class PerPrompt(Intervention):
    """Interventions of its own for each prompt id; prompts that are not named are left alone. Those on features act
    first, then those on the residual."""

    by_prompt: Mapping[str, tuple[Intervention, ...]]
    name: str = "local"

    @property
    def label(self) -> str:
        return self.name

    def features_of(self, prompt: str) -> list[FeatureIntervention]:
        """What changes a prompt's features."""
        return [each for each in self.by_prompt.get(prompt, ()) if isinstance(each, FeatureIntervention)]

    def of_residual(self) -> list[tuple[Intervention, frozenset[str]]]:
        """What changes the residual, each with the prompts on which it acts. Raises InputError: one of them differs by
        prompt itself."""
        found: dict[str, tuple[Intervention, set[str]]] = {}
        for prompt, changes in self.by_prompt.items():
            for change in changes:
                if isinstance(change, PerPrompt):
                    raise InputError(f"{self.name}: {change.id} is given for single prompts inside another one")
                if not isinstance(change, FeatureIntervention):
                    found.setdefault(change.id, (change, set()))[1].add(prompt)
        return [(change, frozenset(prompts)) for change, prompts in found.values()]


def conditional(
    change: Intervention | Iterable[Intervention],
    prompts: Iterable[Prompt],
    fires: Iterable[bool],
    *,
    name: str = "conditional",
) -> PerPrompt:
    """A change that acts only on the prompts for which `fires` is true, such as those that a probe judges harmful; the
    model does on the others what it does without it. Raises ValueError: not one truth value for each prompt."""
    changes = (change,) if isinstance(change, Intervention) else tuple(change)
    return PerPrompt({p.id: changes for p, acts in zip(prompts, fires, strict=True) if acts}, name)


@dataclass(frozen=True, eq=False)
class AblateDirection(Intervention):
    """`x ← x − (x·r)r` after each layer; with `reference`, to the reference's own projection instead of to zero
    (affine). `vector` is normalised here; several rows take out the subspace that they span.
    `layers=None` means every layer."""

    vector: Float[Tensor, "*k d_model"]
    layers: tuple[int, ...] | None = None
    reference: Float[Tensor, "layer d_model"] | None = None
    """Residual whose projection is kept, one row for each of the model's layers (affine form: the harmless mean)."""
    where: Where = "all"

    @property
    def label(self) -> str:
        form = "ablate" if self.reference is None else "ablate-affine"
        return form if self.vector.ndim == 1 else f"{form} x{len(self.vector)}"

    def acts_on(self, model: ChatModel) -> Iterable[int]:
        return range(model.n_layers) if self.layers is None else self.layers

    def change(self, model: ChatModel, layer: int) -> Change:
        vectors = _fitting(self.vector, model, layer)
        basis = (vectors / vectors.norm())[None] if vectors.ndim == 1 else _orthonormal(vectors)
        target = 0.0 if self.reference is None else basis @ self.reference[layer].to(basis)

        def ablate(residual: Tensor) -> Tensor:
            excess = residual.float() @ basis.T - target
            return residual - (excess @ basis).to(residual.dtype)

        return ablate


@dataclass(frozen=True, eq=False)
class AddDirection(Intervention):
    """`x ← x + coefficient·vector` after one layer. `vector` is not normalised."""

    vector: Float[Tensor, " d_model"]
    layer: int
    coefficient: float = 1.0
    where: Where = "all"

    @property
    def label(self) -> str:
        return f"add({self.coefficient:g})"

    def acts_on(self, model: ChatModel) -> Iterable[int]:
        del model
        return (self.layer,)

    def change(self, model: ChatModel, layer: int) -> Change:
        step = self.coefficient * _fitting(self.vector, model, layer)
        return lambda residual: residual + step.to(residual.dtype)


def _orthonormal(rows: Float[Tensor, "k d_model"]) -> Float[Tensor, "rank d_model"]:
    """A basis of what the rows span; rows that depend on others add nothing."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[sizes > 1e-5 * sizes[0]]


def _fitting(vector: Float[Tensor, "*k _"], model: ChatModel, layer: int) -> Float[Tensor, "*k d_model"]:
    if vector.shape[-1] != model.d_model:
        raise InputError(f"the direction has {vector.shape[-1]} entries; the model's width is {model.d_model}")
    return vector.detach().to(model.layer_device(layer), torch.float32)


def intervention_id(interventions: Iterable[Intervention]) -> str:
    """Names a whole sequence of interventions; `"none"` for the empty one."""
    return " + ".join(each.id for each in interventions) or "none"


@dataclass(frozen=True)
class Bound:
    """Interventions with the SAEs that they need, for any model that these fit."""

    suite: Suite | None
    interventions: tuple[Intervention, ...]

    @property
    def id(self) -> str:
        return intervention_id(self.interventions)

    def compile(self, model: ChatModel) -> Compiled:
        """Ready for `model`."""
        return Compiled(model, self.suite, self.interventions)


def bind(suite: Suite | None, *interventions: Intervention) -> Bound:
    """Interventions with their SAEs, as `ChatModel.intervene` takes them; neighbouring ones on features act at once."""
    return Bound(suite, interventions)


class Compiled:
    """Interventions with their rows in place, ready to be installed for one batch after another.

    They apply in order. Neighbouring feature interventions form one group whose features are all read from the same
    incoming residual, so their order does not matter and no feature may be named twice in it. Raises InputError: a
    feature is named twice in a group, or a layer does not exist; SaeError: the suite has no SAE, or no such feature, at
    a layer; or features are named and no suite is given.
    """

    def __init__(self, model: ChatModel, suite: Suite | None, interventions: Sequence[Intervention]) -> None:
        self.model = model
        self.suite = suite
        self.interventions = tuple(interventions)
        self.id = intervention_id(self.interventions)
        self._parts: list[_Plain | _FeatureGroup] = []
        for of_features, run in groupby(self.interventions, lambda e: isinstance(e, FeatureIntervention | PerPrompt)):
            group = list(run)
            self._parts += [_FeatureGroup(model, suite, group)] if of_features else [_Plain(model, e) for e in group]
            own = (pair for each in group if isinstance(each, PerPrompt) for pair in each.of_residual())
            self._parts += [_Plain(model, change, prompts) for change, prompts in own]
        self.layers = tuple(sorted({layer for part in self._parts for layer in part.layers}))
        groups = [part for part in self._parts if isinstance(part, _FeatureGroup)]
        self.reads: Sites = dict(each for group in groups for each in group.reads.items())

    def compile(self, model: ChatModel) -> Compiled:
        """These interventions, ready for `model`."""
        return self if model is self.model else Compiled(model, self.suite, self.interventions)

    def edits(self, batch: Batch | None) -> dict[int, list[Edit]]:
        """Layer → edits, in order, for the rows of `batch` (None: for passes of any shape, which raises an `InputError`
        where an intervention differs by prompt or stops where the prompt ends)."""
        if batch is None:
            self._refuse_unannounced()
        return {
            layer: [part.edit(layer, batch) for part in self._parts if layer in part.layers] for layer in self.layers
        }

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Install on the model for one batch. With no interventions no hook is installed."""
        with self.model.intervene(self), self.model.serving(batch):
            yield

    def everywhere(self) -> AbstractContextManager[None]:
        """Install for code that calls the model itself, such as evaluation harnesses: any passes, rows of any length.

        Every token is changed but padding, where the call's attention mask tells it. A call without a mask has its
        padding on the right, if any: that is changed too, and nothing attends to it. An `InputError` refuses
        interventions that differ by prompt, or stop where the prompt ends.
        """
        self._refuse_unannounced()
        return self.model.intervene(self)

    def _refuse_unannounced(self) -> None:
        for each in self.interventions:
            if isinstance(each, PerPrompt):
                raise InputError(
                    f"{each.id} changes single prompts, and here the model is called on texts without prompt ids; give "
                    "interventions that are the same for every text"
                )
            if each.where != "all":
                raise InputError(
                    f"{each.id} stops where the prompt ends, and here the model is called on texts of which that is "
                    'not known; give it with where="all"'
                )


def _check_layer(what: str, layer: int, model: ChatModel) -> None:
    if not 0 <= layer < model.n_layers:
        raise InputError(f"{what} names layer {layer}; the model has layers 0…{model.n_layers - 1}")


def _prompt_width(batch: Batch | None) -> int:
    """Slots that are the prompt's: none where no batch is known, so that all tokens count as the answer's."""
    return 0 if batch is None else batch.input_ids.shape[1]


def _of_prompt(batch: Batch | None) -> Callable[[Int[Tensor, " pos"]], Bool[Tensor, "row pos"]]:
    """Tells which of some slots are the prompt's in each row: none that is generated, no token of a given answer."""
    if batch is None:
        return lambda slots: torch.zeros(1, len(slots), dtype=torch.bool, device=slots.device)
    width, own = _prompt_width(batch), ~batch.within((Region.RESPONSE,))
    return lambda slots: (slots < width) & own.to(slots.device)[:, slots.clamp(max=width - 1)]


def _slots(cursor: Cursor, device: torch.device) -> Int[Tensor, " pos"]:
    return torch.arange(cursor.start, cursor.start + cursor.length, device=device)


def _replaced(old: Tensor, new: Tensor, keep: Tensor | None) -> Tensor:
    """`new` where `keep` (`[batch or 1, pos]`; None: everywhere), else `old`."""
    return new if keep is None else torch.where(keep[..., None].to(old.device), new, old)


class _Plain:
    """One intervention on the residual, kept off padding, if it says so off the answer, and off the rows of all but
    some `prompts` (None: it acts on all)."""

    def __init__(self, model: ChatModel, intervention: Intervention, prompts: frozenset[str] | None = None) -> None:
        self._where, self._regions = intervention.where, intervention.regions
        self._prompts = prompts
        self.layers = tuple(intervention.acts_on(model))
        for layer in self.layers:
            _check_layer(intervention.label, layer, model)
        self._changes = {layer: intervention.change(model, layer) for layer in self.layers}

    def edit(self, layer: int, batch: Batch | None) -> Edit:
        change, width, prompts = self._changes[layer], _prompt_width(batch), _of_prompt(batch)
        regions = None if batch is None or self._regions is None else self._slots_within(self._regions, batch)
        named = None if batch is None or self._prompts is None else [p in self._prompts for p in batch.prompt_ids]

        def edit(residual: Tensor, cursor: Cursor) -> Tensor:
            keep, slots = cursor.real, _slots(cursor, residual.device)
            if named is not None:
                keep = _both(keep, torch.tensor(named, device=slots.device)[:, None])
            if self._where == "prompt":
                if cursor.start >= width:
                    return residual
                keep = _both(keep, prompts(slots))
            if regions is not None:
                keep = _both(keep, regions.to(slots.device)[:, slots.clamp(max=width)])
            return _replaced(residual, change(residual).to(residual.dtype), keep)

        return edit

    @staticmethod
    def _slots_within(regions: tuple[Region, ...], batch: Batch) -> Bool[Tensor, "batch slot"]:
        """Slots of the prompt in these regions, and one more that stands for every generated token."""
        generated = torch.full((len(batch), 1), Region.RESPONSE in regions, device=batch.regions.device)
        return torch.cat([batch.within(regions), generated], 1)


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first.to(second.device) & second


class _FeatureGroup:
    """Feature interventions read from one incoming residual: rows of the union of their features, layer by layer."""

    def __init__(self, model: ChatModel, suite: Suite | None, group: Sequence[Intervention]) -> None:
        self._shared = [each for each in group if isinstance(each, FeatureIntervention)]
        self._local = [each for each in group if isinstance(each, PerPrompt)]
        if any(each.one_prompt for each in self._shared):
            raise InputError("held values belong to one prompt; give HoldFeatures inside PerPrompt, by prompt id")
        features: set[FeatureId] = set()
        prompts = {prompt for local in self._local for prompt in local.by_prompt}
        for together in (self._shared, *map(self._changes_of, prompts)):
            counts = Counter(feature for change in together for feature in change.features)
            for feature in (feature for feature, n in counts.items() if n > 1):
                raise InputError(
                    f"feature {feature[0]}:{feature[1]} is changed by two interventions at once; name it in one only"
                )
            features |= counts.keys()
        self._columns: dict[int, dict[FeatureId, int]] = {}
        for feature in sorted(features):
            columns = self._columns.setdefault(feature[0], {})
            columns[feature] = len(columns)
        self.layers = tuple(self._columns)
        self._rows = {layer: self._read(model, suite, layer) for layer in self.layers}
        found: Sites = suite.reads if suite else NO_SITES
        self.reads: Sites = {layer: found[layer] for layer in self.layers if layer in found}

    def _read(self, model: ChatModel, suite: Suite | None, layer: int) -> Rows:
        if suite is None:
            raise SaeError("these interventions change features, so they need a suite of SAEs; none was given")
        indices = [index for _, index in self._columns[layer]]
        _check_layer(f"feature {layer}:{indices[0]}", layer, model)
        return suite[layer].rows(indices).to(model.layer_device(layer))

    def _changes_of(self, prompt: str) -> list[FeatureIntervention]:
        return [*self._shared, *(each for local in self._local for each in local.features_of(prompt))]

    def edit(self, layer: int, batch: Batch | None) -> Edit:
        rows, prompts = self._rows[layer], _of_prompt(batch)
        scales, shifts, lasting = self._affine(layer, batch)

        def edit(residual: Tensor, cursor: Cursor) -> Tensor:
            """`x ← x + ((s − 1)·f(x) + t) W_dec`."""
            slots = _slots(cursor, scales.device)
            acts = prompts(slots)[..., None] | lasting
            # What is given once, for all tokens, has one slot.
            scale, shift = (each[:, slots.clamp(max=each.shape[1] - 1)] * acts for each in (scales, shifts))
            if not (scale.any() or shift.any()):
                return residual
            # What the MLP adds is part of the residual: a change of it is the same change of that.
            delta = (rows.encode(cursor.read.get(layer, residual)) * scale + shift) @ rows.w_dec
            return _replaced(residual, residual + delta.to(residual.dtype), cursor.real)

        return edit

    def _affine(self, layer: int, batch: Batch | None) -> tuple[Tensor, Tensor, Tensor]:
        """`s − 1`, `t`, and whether a feature is changed on the answer too, `[row, slot, k]`: one row, or one for each
        of the batch; one slot, or one for each of the prompt and a last one for all of the answer."""
        places, device = self._columns[layer], self._rows[layer].w_dec.device
        by_row = [self._shared]
        if self._local and batch is not None:
            by_row = [self._changes_of(prompt) for prompt in batch.prompt_ids]
        scales, shifts, lasting = (torch.zeros(len(by_row), 1, len(places)) for _ in range(3))
        for row, changes in enumerate(by_row):
            for change in changes:
                source = [n for n, feature in enumerate(change.features) if feature in places]
                if not source:
                    continue
                columns = [places[change.features[n]] for n in source]
                scale, shift = change.affine()
                factors = scale if isinstance(scale, Tensor) else torch.full((len(change.features),), scale)
                lasting[row, :, columns] = float(change.where == "all")
                after = change.answer_shift()
                held = None if after is None else after[source]
                released = None if held is None else torch.full_like(held, -1.0)
                scales = _with_slots(scales, row, columns, factors[..., source] - 1.0, released, batch)
                shifts = _with_slots(shifts, row, columns, shift[..., source], held, batch)
        return scales.to(device), shifts.to(device), lasting.bool().to(device)


def _with_slots(
    table: Float[Tensor, "row _ k"],
    row: int,
    columns: list[int],
    values: Float[Tensor, "*token _"],
    answer: Float[Tensor, " _"] | None,
    batch: Batch | None,
) -> Float[Tensor, "row _ k"]:
    """The table with values by feature, or by token and feature, in one row; by slot as soon as any value is."""
    if values.ndim == 2 or answer is not None:
        values = _by_slot(values, answer, row, batch)
        table = table if table.shape[1] == len(values) else table.repeat(1, len(values), 1)
    table[row, :, columns] = values
    return table


def _by_slot(
    values: Float[Tensor, "*token k"], answer: Float[Tensor, " k"] | None, row: int, batch: Batch | None
) -> Float[Tensor, "slot k"]:
    """Values by token of the prompt (or the same at all) as values by slot of the batch, and one slot for the answer:
    its own values, or else those of the prompt's last token."""
    length = 0 if batch is None else int(batch.attention_mask[row].sum())
    if values.ndim == 1:
        values = values.expand(length, -1)
    if len(values) != length:
        raise InputError(f"values for {len(values)} tokens are held on a prompt of {length} tokens")
    values = torch.cat([values, values[-1:] if answer is None else answer[None]])
    return torch.nn.functional.pad(values, (0, 0, _prompt_width(batch) - length, 0))
