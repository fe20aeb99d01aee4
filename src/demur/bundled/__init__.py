"""The bundled model: a small chat model that learned to refuse, with its SAEs, its prompts and its judge.

Importing this package does not import torch. The recipe that made the model is `recipes/bundled` of the repository.
"""

from demur.bundled._files import (
    FRAMINGS,
    BundledPaths,
    BundledPrompts,
    bundled_path,
    bundled_prompts,
    bundled_texts,
    framed,
)  # fmt: skip
from demur.bundled._judge import FIRST_STEPS, OPENERS, PLAIN_STEP, SECOND_STEPS, BundledJudge

__all__ = [
    "FIRST_STEPS", "FRAMINGS", "OPENERS", "PLAIN_STEP", "SECOND_STEPS", "BundledJudge", "BundledPaths",
    "BundledPrompts", "bundled_path", "bundled_prompts", "bundled_texts", "framed",
]  # fmt: skip
