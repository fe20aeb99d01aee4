"""Studies by name. A study is one module; it is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from demur.registry import Registry

if TYPE_CHECKING:
    from demur.studies.base import Study

STUDIES: Registry[Study[Any, Any]] = Registry(
    "demur.studies",
    "study",
    {
        "study": "demur.studies.study:STUDY",
        "benchmark": "demur.studies.benchmark:STUDY",
        "jailbreaks": "demur.studies.jailbreaks:STUDY",
    },
)

__all__ = ["STUDIES"]
