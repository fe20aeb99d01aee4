"""The process: an address, a key where others can reach it, logs without prompt texts, and an end without lost work."""

from __future__ import annotations

import ipaddress
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import uvicorn

from demur.errors import InputError
from demur.serve.app import create_app
from demur.serve.gate import LOG
from demur.serve.limits import Limits
from demur.serve.transport import patient_protocol

if TYPE_CHECKING:
    from demur.guard import Guard


def serve(
    guard: Guard, *, host: str = "127.0.0.1", port: int = 8765, key: str | None = None, limits: Limits | None = None
) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish what was taken on. Raises InputError: the address is open to
    other machines and there is no key; the port cannot be used.

    Args:
        guard: scores the prompts.
        host: address to listen on; others than this machine's own need a key.
        port: port to listen on; 0 takes a free one.
        key: what clients must send.
        limits: what is taken on.
    """
    if key is None and not _is_loopback(host):
        raise InputError(f"{host} can be reached from other machines; set a key with DEMUR_API_KEY or --key-file")
    limits = limits or Limits()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(guard, limits, key=key),
            host=host,
            port=port,
            http=patient_protocol(limits.head_timeout),
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            limit_concurrency=limits.connections,
            timeout_keep_alive=max(1, round(limits.head_timeout)),
            timeout_graceful_shutdown=max(1, round(limits.timeout)),
        )
    )
    try:
        # uvicorn ends in good order on a signal, and then raises it once more.
        with _log_lines(), suppress(KeyboardInterrupt):
            server.run()
    except SystemExit as stop:
        if stop.code:
            raise InputError(f"cannot listen on {host}:{port}; is it in use? Choose another with --port") from stop


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _log_lines() -> Iterator[None]:
    """One JSON line a request on standard error while the context is open."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
