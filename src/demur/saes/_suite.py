"""A suite: layer → SAE, lazy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

from demur.errors import SaeError
from demur.saes._features import SaeSpec, width_name
from demur.saes._sae import DenseSae, Sae


def _spans(numbers: Sequence[int]) -> str:
    """`0–25`, or `0–3, 7, 9–11`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


class MissingLayerError(SaeError, KeyError):
    """The suite has no SAE for a layer. Also a `KeyError`, so that a suite is a proper mapping."""

    __str__ = Exception.__str__


def missing_layer(source: str, layer: int, there: Sequence[int]) -> MissingLayerError:
    near = min(there, key=lambda other: abs(other - layer))
    return MissingLayerError(f"{source} has no SAE for layer {layer}; it has layers {_spans(there)} (nearest: {near})")


class Suite(Mapping[int, Sae]):
    """SAEs by decoder layer, ascending. Making one reads configurations; weights are read when asked for."""

    def __init__(self, saes: Sequence[Sae], source: str) -> None:
        self._saes = {sae.spec.layer: sae for sae in sorted(saes, key=lambda sae: sae.spec.layer)}
        self.source = source
        if not saes:
            raise SaeError(f"{source} holds no SAEs")
        if len(self._saes) != len(saes):
            raise SaeError(f"{source} holds two SAEs for one layer")

    @classmethod
    def from_dense(cls, saes: Mapping[int, DenseSae]) -> Suite:
        for layer, sae in saes.items():
            if layer != sae.layer:
                raise SaeError(f"an SAE of layer {sae.layer} was given for layer {layer}")
        return cls([sae.sae() for sae in saes.values()], "memory")

    def __getitem__(self, layer: int) -> Sae:
        if layer not in self._saes:
            raise missing_layer(self.source, layer, self.layers)
        return self._saes[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._saes)

    def __len__(self) -> int:
        return len(self._saes)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._saes)

    @property
    def specs(self) -> tuple[SaeSpec, ...]:
        """What is known of each SAE without its weights, by layer."""
        return tuple(sae.spec for sae in self._saes.values())

    @property
    def identity(self) -> str:
        """SHA-256, hex, of every layer's content key: the suite's key in the hashes of runs."""
        return hashlib.sha256("".join(f"{spec.layer} {spec.identity}\n" for spec in self.specs).encode()).hexdigest()

    def describe(self) -> str:
        """One line for people: layers, widths, activation, sparsity, source."""
        widths = " and ".join(map(width_name, sorted({spec.d_sae for spec in self.specs})))
        kinds = " and ".join(sorted({spec.activation for spec in self.specs}))
        l0s = [spec.average_l0 for spec in self.specs if spec.average_l0 is not None]
        sparsity = f", average L0 {min(l0s):g} to {max(l0s):g}" if l0s else ""
        return (
            f"{len(self)} SAEs on layers {_spans(self.layers)}, {widths} features, d_model {self.specs[0].d_model}, "
            f"{kinds}{sparsity}, from {self.source}"
        )

    def check(self, *, d_model: int, n_layers: int) -> None:
        """SaeError where an SAE's configuration does not fit a model; no weight is read or downloaded."""
        for spec in self.specs:
            wrong = ""
            if spec.d_model != d_model:
                wrong = f"reads residuals of width {spec.d_model}, but the model's are {d_model}"
            elif spec.layer >= n_layers:
                wrong = f"sits on layer {spec.layer}, but the model has 0 to {n_layers - 1}"
            if wrong:
                raise SaeError(f"{spec.source} {wrong}; choose SAEs that were trained on this model or its base")

    def check_files(self) -> None:
        """`Sae.check_file` of every layer, so that damage shows before anything is computed."""
        for sae in self._saes.values():
            sae.check_file()
