"""Express F* in other SAEs of the same model: which features have a counterpart there, and whether the effect carries.

A counterpart is the other's nearest by decoder cosine *and* by correlation of activations over the same tokens, in both
directions. What the counterparts do to refusal is measured beside F* itself and beside matched random sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
