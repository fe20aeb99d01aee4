"""Studies by name. A study is one module; it is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from demur.registry import Registry

if TYPE_CHECKING:
    from demur.studies.base import Study

_BUILTIN = (
    "study", "benchmark", "dictionaries", "features", "categories", "minimal", "circuit", "jailbreaks", "probes",
    "harden", "audit", "checkpoints", "transfer",
)  # fmt: skip
STUDIES: Registry[Study[Any, Any]] = Registry(
    "demur.studies", "study", {name: f"{__name__}.{name}:STUDY" for name in _BUILTIN}
)

__all__ = ["STUDIES"]
