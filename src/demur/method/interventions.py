"""Interventions: frozen values that say what to do to a model, and the one place where they become hooks.

On features (`scale`, `set`, `hold`) and on the residual along a direction (`ablate`, `add`). Decoding is affine and the
SAE's error is kept, so changing feature `i` from `f_i(x)` to any other value moves the residual by the difference times
decoder row `d_i`: only the chosen features' rows are needed, and the result equals encoding densely, clamping, decoding
and adding the error back.

Every change of a layer's features has the form `f ← s·f + t`, so all feature interventions on a layer, shared or
one set per prompt, fuse into `x ← x + ((s − 1)·f(x) + t) W_dec`, with every feature read from the same incoming `x`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from demur.errors import InputError, SaeError
from demur.model import Batch, ChatModel, Cursor, Edit
from demur.saes import Rows, Suite
from demur.types import FeatureId

Where = Literal["all", "prompt"]
"""Tokens that are changed: all of them (the answer's too), or the prompt's only. Padding never is."""


def _digest(*parts: object) -> str:
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            state.update(repr(part).encode())
        state.update(b"\x00")
    return state.hexdigest()[:10]


def _plain(features: Sequence[FeatureId]) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(index)) for layer, index in features)


@dataclass(frozen=True)
class ScaleFeatures:
    """`f ← factor·f`. Factor 0 removes the features, negative ones reverse them (paper, section 4.1)."""

    features: tuple[FeatureId, ...]
    factor: float
    where: Where = "all"

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        digest = _digest(_plain(self.features), float(self.factor), self.where)
        return f"scale({self.factor:g})x{len(self.features)}@{digest}"


@dataclass(frozen=True)
class SetFeatures:
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
    def values(self) -> tuple[float, ...]:
        """One activation for each feature."""
        value = self.value if isinstance(self.value, tuple) else (self.value,) * len(self.features)
        return tuple(float(each) for each in value)

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        shown = f"{self.value:g}" if isinstance(self.value, float | int) else "each"
        return f"set({shown})x{len(self.features)}@{_digest(_plain(self.features), self.values, self.where)}"


@dataclass(frozen=True, eq=False)
class HoldFeatures:
    """`f ← its value in another run`, on prompt tokens only: the answer's tokens have no counterpart there.

    `values` is `[k]` (the same at every token) or `[pos, k]` (one row for each token of the prompt, its padding left
    out), float32, columns in the order of `features`. It belongs to one prompt: give it in a `PerPrompt`.
    """

    features: tuple[FeatureId, ...]
    values: Float[Tensor, "*pos k"]

    def __post_init__(self) -> None:
        if self.values.ndim not in (1, 2) or self.values.shape[-1] != len(self.features):
            raise InputError(
                f"held values have shape {tuple(self.values.shape)}; expected [{len(self.features)}] or "
                f"[tokens, {len(self.features)}]"
            )

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        return f"hold x{len(self.features)}@{_digest(_plain(self.features), self.values)}"


FeatureIntervention = ScaleFeatures | SetFeatures | HoldFeatures


@dataclass(frozen=True)
class PerPrompt:
    """A feature intervention of its own for each prompt id; prompts that are not named are left alone."""

    by_prompt: Mapping[str, tuple[FeatureIntervention, ...]]
    name: str = "local"

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        parts = [(prompt, tuple(each.id for each in self.by_prompt[prompt])) for prompt in sorted(self.by_prompt)]
        return f"{self.name}@{_digest(parts)}"


@dataclass(frozen=True, eq=False)
class AblateDirection:
    """`x ← x − (x·r)r` after each layer; with `reference`, to the reference's own projection instead of to zero
    (affine).

    `vector` is normalised here. `layers=None` means every layer.
    """

    vector: Float[Tensor, " d_model"]
    layers: tuple[int, ...] | None = None
    reference: Float[Tensor, "layer d_model"] | None = None
    """Residual whose projection is kept, one row for each of the model's layers (affine form: the harmless mean)."""
    where: Where = "all"

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        form = "ablate" if self.reference is None else "ablate-affine"
        parts = (self.vector, self.layers, self.where) + (() if self.reference is None else (self.reference,))
        return f"{form}@{_digest(*parts)}"


@dataclass(frozen=True, eq=False)
class AddDirection:
    """`x ← x + coefficient·vector` after one layer. `vector` is not normalised."""

    vector: Float[Tensor, " d_model"]
    layer: int
    coefficient: float = 1.0
    where: Where = "all"

    @property
    def id(self) -> str:
        """Names this intervention in files and cache keys."""
        return f"add({self.coefficient:g})@{_digest(self.vector, self.layer, float(self.coefficient), self.where)}"


Intervention = FeatureIntervention | PerPrompt | AblateDirection | AddDirection
_FEATURES = (ScaleFeatures, SetFeatures, HoldFeatures, PerPrompt)


def intervention_id(interventions: Sequence[Intervention]) -> str:
    """Names a whole sequence of interventions; `"none"` for the empty one."""
    return " + ".join(each.id for each in interventions) or "none"


class Compiled:
    """Interventions with their rows in place, ready to be installed for one batch after another.

    Interventions apply in order. Neighbouring feature interventions form one group whose features are all read from the
    same incoming residual, so their order does not matter and no feature may be named twice in it.

    Raises:
        InputError: a feature is named twice in a group, or a layer does not exist.
        SaeError: the suite has no SAE, or no such feature, at a layer; or features are named and no suite is given.
    """

    def __init__(self, model: ChatModel, suite: Suite | None, interventions: Sequence[Intervention]) -> None:
        self.model = model
        self.interventions = tuple(interventions)
        self.id = intervention_id(self.interventions)
        self._parts: list[_FeatureGroup | _DirectionEdit] = []
        group: list[FeatureIntervention | PerPrompt] = []
        for each in self.interventions:
            if isinstance(each, _FEATURES):
                group.append(each)
                continue
            if group:
                self._parts.append(_FeatureGroup(model, suite, group))
                group = []
            self._parts.append(_DirectionEdit(model, each))
        if group:
            self._parts.append(_FeatureGroup(model, suite, group))

    def edits(self, batch: Batch | None) -> dict[int, list[Edit]]:
        """Layer → edits, in order, for the rows of `batch`.

        Without a batch they are for passes of any shape; see `everywhere`.
        """
        if batch is None:
            _refuse_bound(self.interventions)
        edits: dict[int, list[Edit]] = {}
        for part in self._parts:
            for layer, edit in part.edits(batch):
                edits.setdefault(layer, []).append(edit)
        return edits

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Install on the model for one batch. With no interventions no hook is installed."""
        with self.model.edited(self.edits(batch)):
            yield

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Install for whatever the model is called on while the context is open, with no batch known beforehand.

        For code that calls the model itself, such as evaluation harnesses: single passes and `generate`, rows of any
        number and length. Every token is changed, in prompts and in answers; padding is not, where the call's
        attention mask tells it. A call without a mask has its padding on the right, if any: that is changed too, and
        nothing attends to it.

        Raises:
            InputError: an intervention belongs to single prompts (`PerPrompt`), or to the prompts' tokens alone
                (`where="prompt"`): which tokens those are is known of a batch only.
        """
        with self.model.edited(self.edits(None)):
            yield


class _FeatureGroup:
    """Feature interventions read from one incoming residual: rows of the union of their features, layer by layer."""

    def __init__(self, model: ChatModel, suite: Suite | None, group: Sequence[FeatureIntervention | PerPrompt]) -> None:
        self._shared = [each for each in group if not isinstance(each, PerPrompt)]
        self._local = [each for each in group if isinstance(each, PerPrompt)]
        _refuse_shared_hold(self._shared)
        for changes in _simultaneous(self._shared, self._local):
            _refuse_twice(changes)
        features = {f for each in self._shared for f in each.features}
        features |= {f for local in self._local for each in local.by_prompt.values() for e in each for f in e.features}
        if features and suite is None:
            raise SaeError("these interventions change features, so they need a suite of SAEs; none was given")
        columns: dict[int, list[int]] = {}
        for layer, index in sorted(features):
            columns.setdefault(layer, []).append(index)
        self._rows: dict[int, Rows] = {}
        for layer, indices in columns.items():
            if not 0 <= layer < model.n_layers:
                raise InputError(
                    f"feature {layer}:{indices[0]} names layer {layer}; the model has 0…{model.n_layers - 1}"
                )
            assert suite is not None
            self._rows[layer] = suite[layer].rows(indices).to(model.layer_device(layer))
        self._column = {(layer, i): k for layer, ids in columns.items() for k, i in enumerate(ids)}

    def edits(self, batch: Batch | None) -> Iterator[tuple[int, Edit]]:
        for layer, rows in self._rows.items():
            yield layer, self._edit(layer, rows, batch)

    def _edit(self, layer: int, rows: Rows, batch: Batch | None) -> Edit:
        n_rows = len(batch) if self._local and batch is not None else 1
        prompt = _Affine(n_rows, len(rows.indices), rows.w_dec.device)
        answer = _Affine(n_rows, len(rows.indices), rows.w_dec.device)
        for row in range(n_rows):
            named = [c for each in self._local if batch for c in each.by_prompt.get(batch.prompt_ids[row], ())]
            for change in (*self._shared, *named):
                picked = [(n, self._column[f]) for n, f in enumerate(change.features) if f[0] == layer]
                if picked:
                    prompt.change(row, change, picked, batch)
                    if not isinstance(change, HoldFeatures) and change.where == "all":
                        answer.change(row, change, picked, batch)
        return _feature_edit(rows, prompt.frozen(), answer.frozen(), _prompt_width(batch))


def _feature_edit(
    rows: Rows, prompt: tuple[Tensor, Tensor] | None, answer: tuple[Tensor, Tensor] | None, width: int
) -> Edit:
    """`x ← x + ((s−1)·f(x) + t) W_dec`, with one pair `(s−1, t)` for the prompt's slots and one for the answer's."""

    def moved(residual: Tensor, affine: tuple[Tensor, Tensor] | None, start: int) -> Tensor | None:
        if affine is None:
            return None
        scale, shift = affine
        if shift.shape[1] > 1:
            shift = shift[:, start : start + residual.shape[1]]
        return (rows.encode(residual) * scale + shift) @ rows.w_dec

    def edit(residual: Tensor, cursor: Cursor) -> Tensor:
        cut = max(0, min(cursor.length, width - cursor.start))
        if cut == cursor.length:
            delta = moved(residual, prompt, cursor.start)
        elif cut == 0:
            delta = moved(residual, answer, 0)
        else:
            parts = [moved(residual[:, :cut], prompt, cursor.start), moved(residual[:, cut:], answer, 0)]
            zeros = torch.zeros_like(residual, dtype=torch.float32).split([cut, cursor.length - cut], 1)
            delta = torch.cat([zero if part is None else part for part, zero in zip(parts, zeros, strict=True)], 1)
        if delta is None:
            return residual
        if cursor.real is not None:
            delta = delta * cursor.real[..., None].to(delta.device)
        return residual + delta.to(residual.dtype)

    return edit


class _Affine:
    """`s − 1` and `t` of one layer, filled change by change: `[rows, 1, k]`, `t` with a position axis when held."""

    def __init__(self, n_rows: int, k: int, device: torch.device) -> None:
        self.scale = torch.zeros(n_rows, 1, k)
        self.shift = torch.zeros(n_rows, 1, k)
        self.device = device
        self.touched = False

    def change(
        self, row: int, change: FeatureIntervention, picked: Sequence[tuple[int, int]], batch: Batch | None
    ) -> None:
        self.touched = True
        source = [n for n, _ in picked]
        columns = [column for _, column in picked]
        if isinstance(change, ScaleFeatures):
            self.scale[row, :, columns] = change.factor - 1.0
            return
        self.scale[row, :, columns] = -1.0
        if isinstance(change, SetFeatures):
            self.shift[row, :, columns] = torch.tensor([change.values[n] for n in source])
            return
        assert batch is not None, "held values are refused where no batch is known"
        width = batch.input_ids.shape[1]
        if self.shift.shape[1] == 1:
            self.shift = self.shift.repeat(1, width, 1)
        values = change.values.detach().float().cpu()[..., source]
        length = int(batch.attention_mask[row].sum())
        if values.ndim == 2 and values.shape[0] != length:
            raise InputError(f"values for {values.shape[0]} tokens are held on a prompt of {length} tokens")
        start = width - length
        for n, column in enumerate(columns):
            self.shift[row, start:, column] = values[..., n]

    def frozen(self) -> tuple[Tensor, Tensor] | None:
        return (self.scale.to(self.device), self.shift.to(self.device)) if self.touched else None


def _prompt_width(batch: Batch | None) -> int:
    """Slots that are the prompt's: none where no batch is known, so that all tokens count as the answer's."""
    return 0 if batch is None else batch.input_ids.shape[1]


def _simultaneous(
    shared: Sequence[FeatureIntervention], local: Sequence[PerPrompt]
) -> Iterator[Sequence[FeatureIntervention]]:
    """Every list of changes that act on one prompt at once."""
    prompts = {prompt for each in local for prompt in each.by_prompt}
    yield shared
    for prompt in prompts:
        yield [*shared, *(change for each in local for change in each.by_prompt.get(prompt, ()))]


def _refuse_twice(changes: Sequence[FeatureIntervention]) -> None:
    seen: set[FeatureId] = set()
    for change in changes:
        for feature in change.features:
            if feature in seen:
                raise InputError(
                    f"feature {feature[0]}:{feature[1]} is changed by two interventions at once; name it in one only"
                )
            seen.add(feature)


def _refuse_shared_hold(shared: Sequence[FeatureIntervention]) -> None:
    if any(isinstance(each, HoldFeatures) for each in shared):
        raise InputError("held values belong to one prompt; give HoldFeatures inside PerPrompt, by prompt id")


def _refuse_bound(interventions: Sequence[Intervention]) -> None:
    """Refuse what needs a batch: changes of single prompts, and changes of the prompt's tokens alone."""
    for each in interventions:
        if isinstance(each, PerPrompt | HoldFeatures):
            raise InputError(
                f"{each.id} changes single prompts, and here the model is called on texts that have no prompt id; give "
                "interventions that are the same for every text"
            )
        if each.where != "all":
            raise InputError(
                f"{each.id} stops where the prompt ends, and here the model is called on texts of which that is not "
                'known; give it with where="all"'
            )


class _DirectionEdit:
    """Ablation of a direction after some layers, or its addition after one."""

    def __init__(self, model: ChatModel, change: AblateDirection | AddDirection) -> None:
        self._change = change
        chosen = (change.layer,) if isinstance(change, AddDirection) else change.layers
        self._layers = tuple(range(model.n_layers)) if chosen is None else chosen
        for layer in self._layers:
            if not 0 <= layer < model.n_layers:
                raise InputError(f"the direction is used at layer {layer}; the model has layers 0…{model.n_layers - 1}")
        if change.vector.shape != (model.d_model,):
            raise InputError(
                f"the direction has {tuple(change.vector.shape)} entries; the model's width is {model.d_model}"
            )
        self._devices = {layer: model.layer_device(layer) for layer in self._layers}

    def edits(self, batch: Batch | None) -> Iterator[tuple[int, Edit]]:
        for layer in self._layers:
            yield layer, self._edit(layer, _prompt_width(batch))

    def _edit(self, layer: int, width: int) -> Edit:
        change = self._change
        vector = change.vector.detach().to(self._devices[layer], torch.float32)
        target: Tensor | None = None
        if isinstance(change, AblateDirection):
            vector = vector / vector.norm()
            if change.reference is not None:
                target = change.reference[layer].to(vector) @ vector
        coefficient = change.coefficient if isinstance(change, AddDirection) else None

        def edit(residual: Tensor, cursor: Cursor) -> Tensor:
            if change.where == "prompt" and cursor.start >= width:
                return residual
            if coefficient is not None:
                delta = (coefficient * vector).expand(residual.shape)
            else:
                projection = residual.float() @ vector
                delta = ((projection if target is None else projection - target)[..., None]) * -vector
            keep = None if cursor.real is None else cursor.real.to(delta.device)
            if change.where == "prompt" and cursor.start + cursor.length > width:
                inside = torch.arange(cursor.start, cursor.start + cursor.length, device=delta.device) < width
                keep = inside.expand(residual.shape[:2]) if keep is None else keep & inside
            if keep is not None:
                delta = delta * keep[..., None]
            return residual + delta.to(residual.dtype)

        return edit
