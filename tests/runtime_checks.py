"""Types and tensor shapes of the package, checked while its tests run: the first calls of each function in each test.

`jaxtyping.install_import_hook` checks every call, and also decorates functions inside functions, anew at each call of
the outer one. That took two thirds of the time of whole studies, and checks of each call still a fifth: decoding calls
the same few functions thousands of times with the same shapes.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

# An int is accepted for a float, as static type checkers do.
_check_types = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))

# Calls of one function that are checked in one test.
CALLS = 10

# Calls checked in this test so far, by function.
_counts: dict[Any, int] = {}


def start_test() -> None:
    """Check each function's next calls again."""
    _counts.clear()


def check(target: Any) -> Any:
    """A function whose arguments and result are checked, or a dataclass whose fields are.

    Axes of one name have one size within a call. Names that only static type checkers import are not checked, nor is
    `Self`, which stands for nothing in a single function.
    """
    if isinstance(target, type):
        return jaxtyped(target, typechecker=_check_types)
    # Now, and not at the first call: a test may have put something else in a class's place by then.
    annotations: dict[str, Any] = {}
    for name, annotation in target.__annotations__.items():
        with contextlib.suppress(NameError):
            annotations[name] = eval(annotation, target.__globals__) if isinstance(annotation, str) else annotation
    target.__annotations__ = {name: each for name, each in annotations.items() if "Self" not in str(each)}
    if not target.__annotations__:
        return target
    checked: Callable[..., Any] | None = None

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        count = _counts.get(target, 0)
        if count >= CALLS:
            return target(*args, **kwargs)
        _counts[target] = count + 1
        # At the first call, as the tests of one process call few of a package's functions.
        checked = checked or _checked(target)
        return checked(*args, **kwargs)

    return call


def _checked(target: Any) -> Callable[..., Any]:
    if "jaxtyping." in str(target.__annotations__):
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
