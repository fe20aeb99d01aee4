"""The command line: studies by their typed options, and the commands beside them. Starting it loads nothing heavy."""

from demur.cli.app import main

__all__ = ["main"]
