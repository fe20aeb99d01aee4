"""Linear probes: logistic regression, or the difference of two centroids, calibrated on held-out prompts.

Standardisation and calibration are folded into the weights, so a probe is one dot product.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from demur.errors import InputError
from demur.guard.readings import Reading, Values

Penalty = Literal["l1", "l2"]
STRENGTHS: dict[Penalty, tuple[float, ...]] = {
    "l2": tuple(10.0**power for power in range(-4, 2)),
    "l1": tuple(10.0**power for power in np.arange(-2, 2.5, 0.5)),
}
"""Inverse strengths of regularisation (scikit-learn's C) to try, the strongest first."""
MIN_PER_CLASS = 4
"""Prompts of each class that it takes to fit, and to calibrate."""


class Labelled(NamedTuple):
    """Values of a reading on some prompts, and whether each is positive."""

    values: Values
    labels: Bool[np.ndarray, " prompt"]


@dataclass(frozen=True, eq=False)
class Probe:
    """`logit = weights · x + bias`, where `x` is what `reading` gives, scaled to length 1 first if `unit` is set."""

    reading: Reading
    weights: Float[np.ndarray, " dim"]
    bias: float
    unit: bool = False

    def logit(self, values: Values) -> Float[np.ndarray, " prompt"]:
        """Log-odds (float64, nats) of each prompt."""
        return self._seen(values) @ self.weights.astype(np.float64) + self.bias

    def probability(self, values: Values) -> Float[np.ndarray, " prompt"]:
        """The chance, as calibrated on the validation prompts, that each prompt is positive."""
        from scipy.special import expit

        return np.asarray(expit(self.logit(values)))

    def log_losses(self, held: Labelled) -> Float[np.ndarray, " prompt"]:
        """Log loss (nats) on each prompt."""
        logits = self.logit(held.values)
        return np.logaddexp(0.0, np.where(held.labels, -logits, logits))

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, and the rest as JSON: a stage of a run folder can keep the probe."""
        meta = {"reading": self.reading.model_dump(mode="json"), "bias": float(self.bias), "unit": self.unit}
        return {"weights": torch.from_numpy(self.weights)}, meta

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """The probe that `to_parts` took apart."""
        reading = Reading.model_validate(meta["reading"])
        return cls(reading, tensors["weights"].numpy(), meta["bias"], meta["unit"])

    def _seen(self, values: Values) -> Float[np.ndarray, "prompt dim"]:
        return scaled(values) if self.unit else values.astype(np.float64)

    def calibrated(self, validation: Labelled) -> Probe:
        """This probe with Platt's calibration on validation prompts folded in: `logit ← a · logit + b`. His smoothed
        targets keep both finite where the classes are fully separated. A probe that ranks the validation prompts the
        wrong way round keeps its own slope."""
        model: Any = _logistic(np.inf)
        logits, labels = self.logit(validation.values)[:, None], validation.labels
        # Each prompt counts as positive by its target and as negative by the rest.
        positives, negatives = int(labels.sum()), int((~labels).sum())
        target = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
        spread = float(logits.std()) or 1.0
        model.fit(
            np.vstack([logits, logits]) / spread,
            np.repeat([1, 0], len(labels)),
            sample_weight=np.concatenate([target, 1 - target]),
        )
        slope, shift = float(model.coef_[0, 0]) / spread, float(model.intercept_[0])
        if slope <= 0:
            return self
        return replace(self, weights=(slope * self.weights).astype(np.float32), bias=slope * self.bias + shift)


def best_probe(tried: Iterable[tuple[Probe, Labelled]]) -> Probe:
    """The probe with the least mean log loss on the prompts beside it; of equals the first."""
    losses = ((float(probe.log_losses(held).mean()), probe) for probe, held in tried)
    return min(losses, key=lambda each: each[0])[1]


def fit_probe(
    reading: Reading,
    train: Labelled,
    validation: Labelled,
    *,
    penalty: Penalty = "l2",
    strengths: Sequence[float] | None = None,
    unit: bool = False,
) -> Probe:
    """Logistic regression on standardised values. The strength of regularisation with the least log loss on the
    validation prompts is taken (of equals the strongest), and the probe is calibrated there. Raises InputError: there
    are too few prompts of a class, or values are not finite; says which.

    Args:
        reading: what was read.
        train: prompts to fit.
        validation: prompts that choose the strength and calibrate.
        penalty: "l1" leaves most weights at 0, for readings of whole dictionaries.
        strengths: scikit-learn's C (default: `STRENGTHS`).
        unit: scale values to length 1 first.
    """
    from sklearn.metrics import log_loss

    _check(reading, train=train, validation=validation)
    x = scaled(train.values) if unit else train.values.astype(np.float64)
    mean, spread = x.mean(0), x.std(0)
    spread[spread < 1e-12] = np.inf  # What never changes says nothing.
    standard = (x - mean) / spread
    turned = None
    if penalty == "l2" and standard.shape[1] > len(standard):
        # With more values than prompts the weights lie in the span of the prompts, and an l2 penalty knows no axes.
        turned = np.linalg.svd(standard, full_matrices=False)[2]
        standard = standard @ turned.T
    best: tuple[float, Probe] | None = None
    for strength in sorted(strengths or STRENGTHS[penalty]):
        model: Any = _logistic(strength, penalty)
        model.fit(standard, train.labels)
        weights = (model.coef_[0] if turned is None else model.coef_[0] @ turned) / spread
        bias = float(model.intercept_[0]) - float(weights @ mean)
        probe = Probe(reading, weights.astype(np.float32), bias, unit)
        loss = float(log_loss(validation.labels, probe.probability(validation.values), labels=[False, True]))
        if best is None or loss < best[0] - 1e-6:
            best = loss, probe
    assert best is not None
    return best[1].calibrated(validation)


def fit_centroids(reading: Reading, train: Labelled, validation: Labelled) -> Probe:
    """Cosine to the mean of positive prompts less that to the mean of negative ones (Latent Guard, Zhao et al., 2025),
    which is linear in the value scaled to length 1; calibrated on the validation prompts. Errors as `fit_probe`."""
    _check(reading, train=train, validation=validation)
    # Float32 as stored, so that a saved probe scores as this one does.
    centres = [train.values[train.labels == label].astype(np.float64).mean(0) for label in (True, False)]
    positive, negative = (centre / (np.linalg.norm(centre) or 1.0) for centre in centres)
    return Probe(reading, (positive - negative).astype(np.float32), 0.0, unit=True).calibrated(validation)


def scaled(values: Values) -> Float[np.ndarray, "prompt dim"]:
    """Rows at length 1 (float64); rows of zeros stay."""
    wide = values.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(length > 0, length, 1.0)


def _logistic(strength: float, penalty: Penalty = "l2") -> Any:
    from sklearn.linear_model import LogisticRegression

    if penalty == "l1":
        return LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", max_iter=2000, random_state=0)
    return LogisticRegression(C=strength, solver="lbfgs", tol=1e-6, max_iter=5000)


def _check(reading: Reading, **sets: Labelled) -> None:
    for name, (values, labels) in sets.items():
        if len(values) != len(labels):
            raise InputError(f"{len(values)} {name} prompts were read, but {len(labels)} labels are given")
        counts = {"positive": int(labels.sum()), "negative": int((~labels).sum())}
        for kind, count in counts.items():
            if count < MIN_PER_CLASS:
                raise InputError(
                    f"a probe needs at least {MIN_PER_CLASS} {kind} {name} prompts, and there are {count} (beside "
                    f"{sum(counts.values()) - count} of the other class); give more prompts"
                )
        if not np.isfinite(values).all():
            raise InputError(
                f"the {reading.kind} reading of the {name} prompts holds NaN or infinity; load the model in another "
                "--dtype"
            )
