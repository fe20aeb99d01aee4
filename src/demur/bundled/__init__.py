"""The bundled model: a small chat model that learned to refuse, its SAEs, its prompts and its judge.

Importing this package does not import torch; `build` and `evaluate` do when they are called.
"""

from __future__ import annotations

from pathlib import Path

from demur.bundled._app import app
from demur.bundled._judge import BundledJudge
from demur.bundled._metrics import BundledMetrics, Check, checks
from demur.bundled._paths import BundledPaths, bundled_path
from demur.bundled._prompts import (
    HELD_OUT_SUFFIXES,
    HELD_OUT_WRAPPERS,
    SUFFIXES,
    WRAPPERS,
    BundledPrompts,
    bundled_prompts,
    framed,
)
from demur.bundled._texts import bundled_texts


def build(out: Path | str, seed: int = 0) -> BundledMetrics:
    """Train the model and its SAEs from nothing into the folder `out`, and measure them; see
    `demur.bundled._build`.

    The same seed gives the same files on one machine with the same versions.

    Raises:
        DemurError: SAELens is not installed (`pip install 'demur[saelens]'`).
    """
    from demur.bundled._build import build as run

    return run(out, seed)


def evaluate(path: Path | str | None = None, test_seed: int | None = None) -> BundledMetrics:
    """Measure a built model (default: the bundled one) on held-out topics, phrasings and framings.

    Args:
        path: folder of a built model.
        test_seed: draws the held-out prompts (default: the model card's).

    Raises:
        ModelError: the folder holds no such model.
        SaeError: or no such SAEs.
    """
    from demur.bundled._evaluate import TEST_SEED
    from demur.bundled._evaluate import evaluate as run

    return run(path or bundled_path().root, TEST_SEED if test_seed is None else test_seed)


__all__ = [
    "HELD_OUT_SUFFIXES",
    "HELD_OUT_WRAPPERS",
    "SUFFIXES",
    "WRAPPERS",
    "BundledJudge",
    "BundledMetrics",
    "BundledPaths",
    "BundledPrompts",
    "Check",
    "app",
    "build",
    "bundled_path",
    "bundled_prompts",
    "bundled_texts",
    "checks",
    "evaluate",
    "framed",
]
