"""The probe of harm that decides where a change acts: one linear probe of a residual, or a guard's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from demur.data import Attack
from demur.stats import Estimate, auroc
from demur.types import Prompt, PromptSet, Value

if TYPE_CHECKING:
    from demur.guard import Pooling, Probe
    from demur.model import ChatModel
    from demur.saes import Rows
    from demur.studies.context import Context

POOLINGS: tuple[Pooling, ...] = ("last", "mean")
"""What is read of a prompt; the validation prompts choose, as they choose the layer."""


class Fitted(Value):
    """A probe as it is kept in the run folder; `auroc` is that of the validation prompts that chose it."""

    layer: int
    pooling: str
    weights: tuple[float, ...]
    bias: float
    auroc: Estimate


@dataclass
class Gate:
    """P(harmful) of prompts, each set read once."""

    title: str
    model: ChatModel
    probe: Probe
    rows: Mapping[int, Rows] = field(default_factory=dict[int, "Rows"])
    """Encoder rows of the features that the probe reads, if it reads any."""
    known: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])

    def scores(self, prompts: PromptSet) -> np.ndarray:
        """P(harmful), shape (prompt,)."""
        if prompts.digest not in self.known:
            self.known[prompts.digest] = self.fresh(prompts)
        return self.known[prompts.digest]

    @property
    def digest(self) -> str:
        """Names the probe in keys."""
        parts = (self.probe.reading.model_dump_json(), self.probe.weights.tobytes(), self.probe.bias, self.probe.unit)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def fresh(self, prompts: Iterable[Prompt]) -> np.ndarray:
        """The same, read now, under whatever interventions are open on the model."""
        from demur.guard import read_prompts

        return self.probe.probability(read_prompts(self.model, prompts, [self.probe.reading], self.rows)[0])

    @classmethod
    def of(cls, context: Context[Any], attacks: Sequence[Attack]) -> Gate:
        """The guard that is named, or a probe fitted on the direction and selection prompts, plain and (unless the
        configuration says otherwise) in the templates of the attacks that choose; the tuning prompts, in them too,
        choose layer, pooling and regularisation, and calibrate."""
        from demur.guard import Guard, Probe, Reading

        model, config = context.model, context.config
        if config.guard is not None:
            guard = Guard.load(config.guard, model)
            return cls(f"the harm probe of the guard {config.guard}", model, guard.harm, guard.rows)
        fitted = _fitted(context, attacks)
        reading = Reading(kind="dense", layer=fitted.layer, pooling=fitted.pooling)  # pyright: ignore[reportArgumentType]
        probe = Probe(reading, np.array(fitted.weights, dtype=np.float32), fitted.bias)
        trained = "plain prompts" if config.probe_on == "plain" else "plain prompts and the choosing attacks' templates"
        title = (
            f"a probe of the residual after layer {fitted.layer} ({fitted.pooling} token), fitted on {trained}; AUROC "
            f"{fitted.auroc.value:.3f} on its validation prompts"
        )
        return cls(title, model, probe)


def _fitted(context: Context[Any], attacks: Sequence[Attack]) -> Fitted:
    from demur.guard import Labelled, Reading, best_probe, fit_probe, read_prompts

    splits, model = context.splits.choosing, context.model
    templates = [t for attack in attacks for t in attack.templates] if context.config.probe_on == "attacks" else []
    train = [
        _in_templates(context, [getattr(s, label) for s in (splits.direction, splits.selection)], templates)
        for label in ("harmless", "harmful")
    ]
    validation = [
        _in_templates(context, [getattr(splits.tuning, label)], templates) for label in ("harmless", "harmful")
    ]
    readings = [Reading(kind="dense", layer=layer, pooling=p) for layer in range(model.n_layers) for p in POOLINGS]

    def labelled(classes: Sequence[PromptSet]) -> list[Labelled]:
        values = [read_prompts(model, prompts, readings) for prompts in classes]
        labels = np.repeat([False, True], [len(prompts) for prompts in classes])
        return [Labelled(np.concatenate(both), labels) for both in zip(*values, strict=True)]

    def compute() -> Fitted:
        sides = dict(zip(readings, zip(labelled(train), labelled(validation), strict=True), strict=True))
        probe = best_probe((fit_probe(reading, one, two), two) for reading, (one, two) in sides.items())
        _, two = sides[probe.reading]
        p = probe.probability(two.values)
        return Fitted(
            layer=int(probe.reading.layer or 0),
            pooling=probe.reading.pooling,
            weights=tuple(probe.weights.tolist()),
            bias=float(probe.bias),
            auroc=auroc(p[two.labels], p[~two.labels]),
        )

    depends: dict[str, Any] = {"train": [p.digest for p in train], "validation": [p.digest for p in validation]}
    return context.cached("gate", depends, Fitted, compute, "probe of harm")


def _in_templates(context: Context[Any], parts: Sequence[PromptSet], templates: Sequence[str]) -> PromptSet:
    """Prompts as they are, and each once more in one of the templates, which take turns."""
    from demur.data.attacks import HOLE
    from demur.studies.jailbreaks import fits

    plain = [prompt for part in parts for prompt in part]
    inside = [
        Prompt(id=f"{p.id}+{n % len(templates)}", text=templates[n % len(templates)].replace(HOLE, p.text))
        for n, p in enumerate(plain if templates else [])
    ]
    return PromptSet(name="probe", prompts=(*plain, *(p for p in inside if fits(context, p.text))))
