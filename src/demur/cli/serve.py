"""Serve a guard over HTTP: scores, explanations, OpenAI's moderation endpoint and LiteLLM's guardrail.

Needs the extra `serve`. On another address than this machine's own, clients must send a key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from demur.cli.console import note
from demur.cli.options import ConfigCommand, read_config
from demur.errors import InputError
from demur.serve.limits import Limits
from demur.studies.config import Options


class WhereOptions(Options):
    """Which guard is served, and where."""

    group: ClassVar[str] = "Server"

    guard: str
    """Folder that `demur guard fit` wrote."""
    model: str | None = None
    """Model of the guard, folder or hub id (default: the bundled model)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    fpr: float = Field(default=0.01, gt=0, lt=1)
    """False-positive rate on validation prompts of the threshold that flags."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8765, ge=0, le=65535)
    """Port to listen on."""
    key_file: str | None = None
    """File whose first line is the key that clients send as bearer token or x-api-key (default: DEMUR_API_KEY)."""


class ServeOptions(WhereOptions, Limits):
    """All options of `demur guard serve`."""


def _serve(**given: Any) -> None:
    try:
        from demur.serve.server import serve
    except ImportError as error:
        raise InputError(f"the server needs the extra `serve` ({error.name}): pip install 'demur[serve]'") from error
    from demur.api import load_model
    from demur.guard import Guard

    options = read_config(ServeOptions, None, given, argument="guard")
    key = _key(options.key_file)
    model = load_model(options.model, device=options.device)
    guard = Guard.load(options.guard, model, fpr=options.fpr)
    note(f"guard of {Path(model.name).name} on http://{options.host}:{options.port}/ (Ctrl-C ends it)")
    limits = Limits.model_validate(options.model_dump(include=set(Limits.model_fields)))
    serve(guard, host=options.host, port=options.port, key=key, limits=limits)


def _key(file: str | None) -> str | None:
    if file is None:
        return os.environ.get("DEMUR_API_KEY") or None
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--key-file {file} cannot be read: {error}") from error
    if not lines or not lines[0].strip():
        raise InputError(f"--key-file {file} is empty; its first line is the key")
    return lines[0].strip()


command = ConfigCommand("serve", ServeOptions, help=__doc__ or "", run=_serve, argument="guard", required=True)
