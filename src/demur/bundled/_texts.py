"""Plain text of the bundled model's world: what its helpful stage read besides chats."""

from __future__ import annotations

import random
from typing import Final

from demur.bundled._corpus import statements, topics

_SEED: Final = 11


def bundled_texts(count: int = 100) -> tuple[str, ...]:
    """Texts that say what several topics are and whether they hurt or help, the same every time."""
    rng = random.Random(_SEED)
    return tuple(statements(topics(), rng).response for _ in range(count))


__all__ = ["bundled_texts"]
