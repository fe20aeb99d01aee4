"""A guard behind HTTP: `demur guard serve` (extra `serve`)."""

from __future__ import annotations

from demur.serve._app import create_app
from demur.serve._limits import Limits
from demur.serve._server import serve

__all__ = ["Limits", "create_app", "serve"]
