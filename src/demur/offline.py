"""Whether downloads are switched off."""

from __future__ import annotations

import os

OFFLINE = ("DEMUR_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables, any of which forbids downloads when it is set to something other than 0."""


def is_offline() -> bool:
    """Whether the environment forbids downloads."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in OFFLINE)
