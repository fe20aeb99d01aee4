"""Things that demur knows by name and others can add: studies, selection methods, judges, SAE layouts, prompt sets.

A built-in entry is named by the module that holds it and imported when it is first asked for. Another package adds one
through an entry point of the registry's group, a script by calling `register`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from demur.errors import DemurError, InputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name: built-in ones, those registered in this process, and those of installed packages. `group` is the
    entry-point group that other packages use, such as `demur.studies`; `noun` what an entry is, for error messages;
    `builtin` name → `"module:attribute"`."""

    def __init__(self, group: str, noun: str, builtin: Mapping[str, str] | None = None) -> None:
        self.group = group
        self.noun = noun
        self._builtin = dict(builtin or {})
        self._registered: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add an entry for this process, or replace one of the same name; returns it."""
        self._registered[name] = entry
        return entry

    @property
    def registered(self) -> Mapping[str, T]:
        """What `register` added in this process, by name."""
        return self._registered

    def unregister(self, name: str) -> None:
        """Take back what `register` added."""
        self._registered.pop(name, None)

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._builtin, *self._registered, *self._installed)))

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in self._registered or name in self._installed

    def where(self, name: str) -> str | None:
        """`"module:attribute"` of an entry that has not been imported by `register`, else None."""
        if name in self._registered:
            return None
        if name in self._builtin:
            return self._builtin[name]
        point = self._installed.get(name)
        return None if point is None else point.value

    def __getitem__(self, name: str) -> T:
        """The entry of that name. Raises InputError: there is none; names those that exist; DemurError: the package
        that provides it cannot be imported."""
        if name in self._registered:
            return self._registered[name]
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return cast("T", getattr(import_module(module), attribute))
        if name not in self._installed:
            raise InputError(f"there is no {self.noun} {name!r}{nearest(name, self)}; there are {', '.join(self)}")
        try:
            entry: Any = self._installed[name].load()
        except (ImportError, AttributeError) as error:
            package = getattr(self._installed[name].dist, "name", "an installed package")
            raise DemurError(f"the {self.noun} {name!r} of {package} cannot be loaded: {error}") from error
        return cast("T", entry)
