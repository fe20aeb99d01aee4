"""Types and tensor shapes of the package, checked at each call while its tests run.

`jaxtyping.install_import_hook` does the same, but also decorates functions inside functions, and that anew at each call
of the outer one: two thirds of the time of whole studies went there.
"""

from __future__ import annotations

import ast
import contextlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

# An int is accepted for a float, as static type checkers do.
_check_types = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))


def check(target: Any) -> Any:
    """A function whose arguments and result are checked, or a dataclass whose fields are.

    Axes of one name have one size within a call. Names that only static type checkers import are not checked, nor is
    `Self`, which stands for nothing in a single function.
    """
    if isinstance(target, type):
        return jaxtyped(target, typechecker=_check_types)
    annotations: dict[str, Any] = {}
    for name, annotation in target.__annotations__.items():
        with contextlib.suppress(NameError):
            annotations[name] = eval(annotation, target.__globals__) if isinstance(annotation, str) else annotation
    target.__annotations__ = {name: each for name, each in annotations.items() if "Self" not in str(each)}
    if "jaxtyping." in str(annotations):
        return jaxtyped(target, typechecker=_check_types)
    # The same without the book of axes, which costs more than the checks.
    return _check_types(target)


class Loader(SourceFileLoader):
    """Decorates a module's functions, its classes' methods and its dataclasses."""

    def get_code(self, fullname: str) -> Any:  # noqa: ARG002
        # Never from the cache of compiled files, which holds the code without checks.
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, **_: Any) -> Any:
        tree = ast.parse(data, path)
        decorate(tree)
        # After the docstring and `from __future__ import annotations`.
        place = next(i for i, node in enumerate(tree.body[1:], start=1) if not _is_future(node)) if tree.body[1:] else 1
        tree.body.insert(place, ast.parse(f"import {__name__}").body[0])
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


def decorate(parent: ast.Module | ast.ClassDef) -> None:
    for node in parent.body:
        if isinstance(node, ast.ClassDef):
            # First of all, so that `dataclass` has made its `__init__`.
            node.decorator_list.insert(0, _decorator(node))
            decorate(node)
        elif isinstance(node, ast.FunctionDef):
            # Last, because other decorators hide the annotations.
            node.decorator_list.append(_decorator(node))


def _decorator(node: ast.stmt) -> ast.expr:
    return ast.copy_location(ast.parse(f"{__name__}.check", mode="eval").body, node)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


class Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """Checks everything of a package that is imported from now on."""
    sys.meta_path.insert(0, Finder(package))
