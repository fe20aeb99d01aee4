"""Probes that score prompts and answers, and the guard that is made of them, kept in a folder."""

from demur.guard.artifact import (
    ExplainedFeature,
    ExplainedToken,
    Explanation,
    Guard,
    GuardScore,
    ModelName,
    OperatingPoint,
    SaeName,
    Sparse,
    verdict_of,
)
from demur.guard.files import copy_guard, guard_model
from demur.guard.probes import Labelled, Probe, best_probe, fit_centroids, fit_probe
from demur.guard.readings import Pooling, Reader, Reading, read_prompts
from demur.guard.streaming import Stream, Watch

__all__ = [
    "ExplainedFeature", "ExplainedToken", "Explanation", "Guard", "GuardScore", "Labelled", "ModelName",
    "OperatingPoint", "Pooling", "Probe", "Reader", "Reading", "SaeName", "Sparse", "Stream", "Watch",
    "best_probe", "copy_guard", "fit_centroids", "fit_probe", "guard_model", "read_prompts", "verdict_of",
]  # fmt: skip
