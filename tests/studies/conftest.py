"""Fixtures of the studies' tests."""

from __future__ import annotations

from planted_study import planted_files

__all__ = ["planted_files"]
