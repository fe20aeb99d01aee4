"""Private modules are used within their own package only, and the tests use public names only.

That imports point one way is checked by import-linter (`lint-imports`, configured in pyproject.toml).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports from demur."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "demur")


def owner(name: str) -> str | None:
    """The package that a name is private to: `demur.saes` for `demur.saes._suite.Suite`; None for public names."""
    parts = name.split(".")
    private = (place for place, part in enumerate(parts) if part.startswith("_") and not part.startswith("__"))
    place = next(private, None)
    return None if place is None else ".".join(parts[:place])


@pytest.mark.parametrize("folder", ["src", "tests", "recipes", "perf"])
def test_private_names_stay_in_their_package(folder: str) -> None:
    wrong: list[str] = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT / folder).with_suffix("").parts) if folder == "src" else folder
        for line, name in imports(file):
            package = owner(name)
            if package is not None and not f"{module}.".startswith(f"{package}."):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []
