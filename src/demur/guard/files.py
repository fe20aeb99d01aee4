"""A guard's folder: written whole, read only where every file is what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from demur.errors import InputError
from demur.guard.artifact import Guard, ModelName, OperatingPoint, SaeName, Sparse
from demur.guard.probes import Probe
from demur.guard.readings import Reading
from demur.guard.streaming import Stream
from demur.model import ChatModel
from demur.report.format import percent, rate_text
from demur.runs import write_text
from demur.saes import FeatureRows, Rows, TopKEncoder, TopKRows
from demur.types import FeatureField, FeatureId, Value

JSON, ARRAYS, CARD = "guard.json", "guard.safetensors", "README.md"
_FORMAT = 1


class _StoredProbe(Value):
    reading: Reading
    bias: float
    unit: bool


class _StoredRows(Value):
    layer: int
    indices: tuple[int, ...]
    top: int | None
    """Features kept per token, of TopK dictionaries."""


class _StoredStream(Value):
    window: int
    threshold: float


class _Reference(Value):
    feature: FeatureField
    value: float


class _Stored(Value):
    """`guard.json`. `files` holds the SHA-256 of the other files, `digest` that of this one without it."""

    format: Literal[1] = 1
    version: str
    model: ModelName
    saes: SaeName | None
    probes: dict[str, _StoredProbe]
    thresholds: dict[str, dict[str, float]]
    stream: _StoredStream | None
    rows: tuple[_StoredRows, ...]
    reference: tuple[_Reference, ...]
    points: tuple[OperatingPoint, ...]
    files: dict[str, str]
    digest: str = ""

    def own_digest(self) -> str:
        return hashlib.sha256(self.model_copy(update={"digest": ""}).model_dump_json().encode()).hexdigest()


# -- writing -------------------------------------------------------------------------------------------------------


def save_guard(guard: Guard, folder: Path) -> Path:
    """Write a guard into a folder; see `Guard.save`."""
    probes = _probes(guard)
    arrays = {f"{name}.weights": torch.from_numpy(probe.weights) for name, probe in probes.items()}
    arrays |= {f"rows.{rows.layer}.{name}": tensor for rows in guard.rows.values() for name, tensor in _tensors(rows)}
    # Cloned: one probe may be the guard's and its explanation's too, and safetensors stores no tensor twice.
    packed = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in arrays.items()})
    card = card_of(guard)
    stored = _Stored(
        version=guard.version,
        model=ModelName.of(guard.model),
        saes=guard.saes,
        probes={name: _StoredProbe(reading=p.reading, bias=p.bias, unit=p.unit) for name, p in probes.items()},
        thresholds={axis: dict(levels) for axis, levels in guard.thresholds.items()},
        stream=guard.stream and _StoredStream(window=guard.stream.window, threshold=guard.stream.threshold),
        rows=tuple(
            _StoredRows(
                layer=rows.layer, indices=rows.indices, top=rows.dictionary.top if isinstance(rows, TopKRows) else None
            )
            for rows in guard.rows.values()
        ),
        reference=tuple(
            _Reference(feature=feature, value=value)
            for feature, value in (guard.sparse.reference.items() if guard.sparse else ())
        ),
        points=guard.points,
        files={ARRAYS: hashlib.sha256(packed).hexdigest(), CARD: hashlib.sha256(card.encode()).hexdigest()},
    )
    _write(folder, stored.model_copy(update={"digest": stored.own_digest()}), packed, card.encode())
    return folder


def _write(folder: Path, stored: _Stored, packed: bytes, card: bytes) -> None:
    """Write the three files. A folder that is left half-written is refused: the hashes come last."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the guard")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / JSON).is_file():
        raise InputError(f"{folder} holds other files and no {JSON}; name an empty folder, or that of a guard")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON).unlink(missing_ok=True)
        (folder / ARRAYS).write_bytes(packed)
        (folder / CARD).write_bytes(card)
        write_text(folder / JSON, stored.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write the guard to {folder}: {error.strerror}") from error


def _probes(guard: Guard) -> dict[str, Probe]:
    found = {"harmful": guard.harm, "refuse": guard.refuse}
    if guard.sparse is not None:
        found |= {"explain-harm": guard.sparse.harm, "explain-refusal": guard.sparse.refusal}
    return found | ({"stream": guard.stream.probe} if guard.stream else {})


def _tensors(rows: Rows) -> Iterator[tuple[str, Tensor]]:
    # Scoring never decodes, so decoder rows stay where they are.
    yield from (("w_enc", rows.w_enc), ("b_enc", rows.b_enc))
    if rows.threshold is not None:
        yield "threshold", rows.threshold
    if isinstance(rows, TopKRows):
        yield from (("dictionary_w_enc", rows.dictionary.w_enc), ("dictionary_b_enc", rows.dictionary.b_enc))


def card_of(guard: Guard) -> str:
    """The card, as Markdown: what the guard is for, of what it is made, and what was measured."""
    name = ModelName.of(guard.model)
    lines = [
        f"# Guard of {name.name}",
        "",
        "Probes that score prompts, and answers while they are written, for this one model. They were fitted on plain "
        "prompts and measured on those below. They promise nothing beyond: an adaptive attacker, longer inputs and "
        "other kinds of prompts can get past them, and benign prompts of other kinds can be flagged more often.",
        "",
        f"- Model: {name}",
        f"- SAEs: {guard.saes.source if guard.saes else 'none'}",
        f"- Reads layers: {', '.join(map(str, guard.layers))}",
        f"- Harm probe: {_read_by(guard.harm)}; refusal probe: {_read_by(guard.refuse)}",
        f"- Written by demur {guard.version or '(unknown version)'}",
        "",
        "| detector | prompts | should be flagged | FPR on validation | flagged [95 %] | n |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.detector} | {p.prompts} | {'yes' if p.positive else 'no'} | {percent(p.fpr)} | "
        f"{rate_text(p.flagged)} | {p.flagged.n} |"
        for p in guard.points
    ]
    return "\n".join(lines) + "\n"


def _read_by(probe: Probe) -> str:
    reading = probe.reading
    what = f"residual of layer {reading.layer}" if reading.kind == "dense" else f"{len(reading.features)} SAE features"
    return f"{what}, pooled by {reading.pooling}"


def copy_guard(source: Path, out: Path) -> ModelName:
    """Copy a whole guard into another folder, every file compared with its hash, and say whose it is. Raises
    InputError: as `Guard.load` and `Guard.save`."""
    if not (source / JSON).is_file():
        raise InputError(
            f"there is no guard in {source.parent}; RUN is the folder of a finished `demur probes` (its --out)"
        )
    stored, packed = _checked(source)
    card = _bytes(source / CARD)
    _write(out, stored, packed, card)
    return stored.model


# -- reading -------------------------------------------------------------------------------------------------------


def load_guard(folder: Path, model: ChatModel, fpr: float) -> Guard:
    """Read a guard; see `Guard.load`."""
    stored, packed = _checked(folder)
    here = ModelName.of(model)
    if here.fingerprint != stored.model.fingerprint:
        raise InputError(
            f"{folder} is the guard of {stored.model}, and the model is {here}: a guard reads the insides of one model "
            "(weights, chat template and system message), and scores another at random. Load that model, or fit a guard"
        )
    try:
        arrays = load(packed)
        return _guard(stored, arrays, model, fpr)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder / ARRAYS} does not hold what {JSON} says ({error}); fit the guard again") from error


def guard_model(folder: str | Path) -> ModelName:
    """Whose guard a folder holds. Raises InputError: a file is missing, cut or changed."""
    return _checked(Path(folder))[0].model


def _checked(folder: Path) -> tuple[_Stored, bytes]:
    """What `guard.json` says and the arrays' bytes, every file compared with its hash."""
    if not folder.is_dir():
        raise InputError(f"there is no guard folder {folder}; write one with: demur guard fit RUN --out {folder}")
    try:
        stored = _Stored.model_validate_json(_bytes(folder / JSON))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{folder / JSON} was cut or changed, or is of another version ({where}: {first['msg']}); fit the guard "
            "again, or restore the file"
        ) from None
    if stored.own_digest() != stored.digest:
        raise InputError(f"{folder / JSON} was changed after it was written (SHA-256); restore it, or fit again")
    if set(stored.files) != {ARRAYS, CARD}:
        raise InputError(f"{folder / JSON} names the files {', '.join(stored.files)}; expected {ARRAYS} and {CARD}")
    contents = {name: _bytes(folder / name) for name in (ARRAYS, CARD)}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != stored.files[name]:
            raise InputError(
                f"{folder / name} was cut or changed after it was written (SHA-256); restore it, or fit again"
            )
    return stored, contents[ARRAYS]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing, so {path.parent} is not a whole guard; fit it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _guard(stored: _Stored, arrays: Mapping[str, Tensor], model: ChatModel, fpr: float) -> Guard:
    probes = {name: _probe(name, each, arrays, model) for name, each in stored.probes.items()}
    rows = {each.layer: _rows(each, arrays) for each in stored.rows}
    sparse = None
    if "explain-harm" in probes:
        reference = {FeatureId(*each.feature): each.value for each in stored.reference}
        sparse = Sparse(probes["explain-harm"], probes["explain-refusal"], reference)
    stream = stored.stream and Stream(probes["stream"], stored.stream.window, stored.stream.threshold)
    return Guard(
        model=model,
        harm=probes["harmful"],
        refuse=probes["refuse"],
        thresholds=stored.thresholds,
        sparse=sparse,
        rows=rows,
        stream=stream,
        saes=stored.saes,
        points=stored.points,
        fpr=fpr,
        version=stored.version,
    )


def _probe(name: str, stored: _StoredProbe, arrays: Mapping[str, Tensor], model: ChatModel) -> Probe:
    weights = arrays[f"{name}.weights"]
    wanted = model.d_model if stored.reading.kind == "dense" else len(stored.reading.features)
    if weights.shape != (wanted,) or not bool(torch.isfinite(weights).all()):
        raise ValueError(f"{name}.weights: expected {wanted} finite numbers")
    return Probe(stored.reading, weights.numpy().astype(np.float32), stored.bias, stored.unit)


def _rows(stored: _StoredRows, arrays: Mapping[str, Tensor]) -> Rows:
    prefix = f"rows.{stored.layer}."
    w_enc, b_enc = arrays[f"{prefix}w_enc"], arrays[f"{prefix}b_enc"]
    if w_enc.shape[1:] != (len(stored.indices),) or b_enc.shape != (len(stored.indices),):
        raise ValueError(f"{prefix}w_enc: expected {len(stored.indices)} columns")
    nothing = torch.zeros(w_enc.shape[::-1])
    rows = FeatureRows(stored.layer, w_enc, b_enc, arrays.get(f"{prefix}threshold"), nothing, stored.indices)
    if stored.top is None:
        return rows
    whole = arrays[f"{prefix}dictionary_w_enc"], arrays[f"{prefix}dictionary_b_enc"]
    return TopKRows(**vars(rows), dictionary=TopKEncoder(stored.layer, *whole, threshold=None, top=stored.top))
