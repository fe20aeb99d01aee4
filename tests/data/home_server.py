"""What a server of files has, and what it was asked: shared by the tests of downloads."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Home:
    """A server of files, for GitHub and for the hub. `files` maps an address's path to status and content."""

    url: str = ""
    files: dict[str, tuple[int, bytes]] = field(default_factory=dict[str, tuple[int, bytes]])
    breaks_off: bool = False
    """The connection ends after half of a file."""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list[tuple[str, str, str | None]])
    """Method, path and authorization of each request."""
