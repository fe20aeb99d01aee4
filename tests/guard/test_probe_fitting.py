"""Probes against scikit-learn's own predictions and values by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from demur.errors import InputError
from demur.guard import Labelled, Probe, Reading, fit_centroids, fit_probe
from demur.runs import Run
from demur.types import FeatureId

READING = Reading(kind="dense", layer=0)


def drawn(n: int, seed: int, dim: int = 6, gap: float = 1.0) -> Labelled:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    x = random.normal(size=(n, dim)) * np.geomspace(0.1, 100, dim) + 5
    x[:, 2] += gap * labels * np.geomspace(0.1, 100, dim)[2]
    return Labelled(x.astype(np.float32), labels)


def test_standardisation_and_calibration_are_folded_in() -> None:
    train, validation, other = drawn(200, 0), drawn(100, 1), drawn(50, 2)
    probe = fit_probe(READING, train, validation, strengths=[0.1])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)).fit(*train)
    raw = pipeline.decision_function(validation.values)
    # Platt (1999): smoothed targets, maximum likelihood.
    positives, negatives = validation.labels.sum(), (~validation.labels).sum()
    target = np.where(validation.labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(ab: np.ndarray) -> float:
        p = expit(ab[0] * raw + ab[1])
        return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).sum())

    a, b = minimize(loss, [1.0, 0.0], tol=1e-10).x
    np.testing.assert_allclose(probe.logit(other.values), a * pipeline.decision_function(other.values) + b, atol=1e-3)
    np.testing.assert_allclose(probe.probability(other.values), expit(probe.logit(other.values)))


def test_log_losses_are_those_of_the_label_however_sure_the_probe_is() -> None:
    probe = Probe(READING, np.ones(1, np.float32), 1.0)
    held = Labelled(
        np.array([[-1.0], [2.0], [2.0], [999.0], [999.0]], np.float32), np.array([True, True, False, True, False])
    )
    # P = 1/2, and P = e³ / (1 + e³).
    expected = [np.log(2), np.log1p(np.exp(-3)), np.log1p(np.exp(3)), 0, 1000]
    np.testing.assert_allclose(probe.log_losses(held), expected)


def test_more_values_than_prompts_give_the_same_weights() -> None:
    """The short way round for wide readings, against scikit-learn on all values."""
    train, validation = drawn(40, 0, dim=80), drawn(40, 1, dim=80)
    probe = fit_probe(READING, train, validation, strengths=[0.1])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)).fit(*train)
    raw = pipeline.decision_function(validation.values)
    assert np.corrcoef(raw, probe.logit(validation.values))[0, 1] == pytest.approx(1, abs=1e-5)


def test_the_strength_is_chosen_on_validation_prompts() -> None:
    train, validation = drawn(40, 0, dim=30, gap=1.5), drawn(400, 1, dim=30, gap=1.5)
    strong, weak, chosen = (
        fit_probe(READING, train, validation, strengths=each) for each in ([0.01], [100.0], [0.01, 100.0])
    )
    np.testing.assert_array_equal(chosen.weights, strong.weights)
    assert not np.allclose(strong.weights, weak.weights)


def test_l1_drops_what_says_nothing() -> None:
    probe = fit_probe(READING, drawn(200, 0, gap=3), drawn(100, 1, gap=3), penalty="l1", strengths=[0.05])
    assert probe.weights[2] > 0
    assert (probe.weights != 0).sum() <= 2


def test_separated_classes_have_finite_calibration() -> None:
    train, validation = drawn(60, 0, gap=50), drawn(40, 1, gap=50)
    p = fit_probe(READING, train, validation).probability(validation.values)
    # The smoothed targets of 20 prompts a class are 21/22 and 1/22.
    assert p[validation.labels].mean() == pytest.approx(21 / 22, abs=0.02)
    assert p[~validation.labels].mean() == pytest.approx(1 / 22, abs=0.02)


def test_a_value_that_never_changes_gets_no_weight() -> None:
    train, validation = drawn(60, 0), drawn(40, 1)
    train.values[:, 4], validation.values[:, 4] = 7.0, 9.0
    assert fit_probe(READING, train, validation).weights[4] == 0


def test_centroids_rank_as_cosines_to_the_two_means_do() -> None:
    train, validation, other = drawn(60, 0), drawn(40, 1), drawn(30, 2)
    probe = fit_centroids(READING, train, validation)

    def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x @ y / np.linalg.norm(x, axis=1) / np.linalg.norm(y)

    means = [train.values[train.labels == label].mean(0) for label in (True, False)]
    expected = cosine(other.values, means[0]) - cosine(other.values, means[1])
    slope = np.polyfit(expected, probe.logit(other.values), 1)[0]
    assert slope > 0
    assert np.corrcoef(expected, probe.logit(other.values))[0, 1] == pytest.approx(1, abs=1e-6)


def test_a_probe_by_hand() -> None:
    values = np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    weights = np.array([1.0, 2.0], dtype=np.float32)
    assert Probe(READING, weights, -1.0).logit(values).tolist() == [10.0, -1.0]
    assert Probe(READING, weights, -1.0, unit=True).logit(values).tolist() == pytest.approx([1.2, -1.0])


def test_a_probe_comes_back_equal_from_a_run_folder(tmp_path: Path) -> None:
    features = (FeatureId(1, 5), FeatureId(2, 7))
    probe = Probe(
        Reading(kind="features", features=features, pooling="max"), np.array([0.1, -3], np.float32), 0.3, True
    )
    with Run.open(tmp_path, config={}) as run:
        found = run.cached("probe", {}, Probe, lambda: probe)
    assert (found.reading, found.bias, found.unit) == (probe.reading, 0.3, True)
    assert (found.weights.dtype, found.weights.tolist()) == (np.float32, probe.weights.tolist())


def test_what_is_missing_is_named() -> None:
    train, validation = drawn(60, 0), drawn(40, 1)
    one = Labelled(train.values, np.ones(60, dtype=bool))
    with pytest.raises(InputError, match="4 negative train prompts, and there are 0"):
        fit_probe(READING, one, validation)
    few = Labelled(validation.values[:6], validation.labels[:6])
    with pytest.raises(InputError, match="4 positive validation prompts, and there are 3"):
        fit_centroids(READING, train, few)
    train.values[0, 0] = np.nan
    with pytest.raises(InputError, match="train prompts holds NaN"):
        fit_probe(READING, train, validation)
