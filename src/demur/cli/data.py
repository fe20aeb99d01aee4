"""List public prompt sets, look at one, fetch their files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Final

import click

from demur import data
from demur.cli.console import PATH, Warnings, complain, console, logging_to, note, say
from demur.data import NamedSet, cache_path, named_set, prompt_sets
from demur.errors import DemurError, InputError
from demur.report.format import bytes_text

FAILED: Final = 2
EXAMPLES: Final = 3
EXAMPLE_WIDTH: Final = 200
_ROOM: Final = 110
"""Columns of a terminal that has room for licences."""
_SETS: Final = "TOML file with sets of your own; repeatable. DEMUR_PROMPT_SETS names one for all commands."


@click.group(help=__doc__)
@click.option("--sets", multiple=True, **PATH, help=_SETS)
def command(sets: tuple[Path, ...]) -> None:
    for file in sets:
        data.add_prompt_sets(file)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known of each set, as JSON.")
def list_sets(as_json: bool) -> None:
    """List the sets: what they hold, rows, whether the file is in the cache or gated, and the licence."""
    sets = [(item, cache_path(item)) for item in prompt_sets().values()]
    if as_json:
        records = [
            {**item.model_dump(), "pin": item.pin, "cached": str(path) if path.is_file() else None}
            for item, path in sets
        ]
        say(json.dumps(records, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    wide = console().width >= _ROOM
    for title in ("name", "prompts", "rows", "file", *(("licence",) if wide else ())):
        # Names are there to be copied, so they are never cut.
        table.add_column(title, justify="right" if title == "rows" else "left", no_wrap=title != "licence")
    for item, path in sets:
        what = " ".join(filter(None, (item.label, item.kind)))
        file = "cached" if path.is_file() else "gated" if item.gated else "-"
        table.add_row(item.name, what, _count(item.rows), file, *((item.licence,) if wide else ()))
    console().print(table)
    if not wide:
        say("Licences: `demur data show NAME`, or a wider terminal.")


@command.command("show")
@click.argument("name")
@click.option("--examples", is_flag=True, help="Print rows of a harmful set too.")
def show(name: str, examples: bool) -> None:
    """Show all that is known of a set; of one in the cache, its counts, and its first rows unless it is harmful."""
    item = named_set(name)
    path = cache_path(item)
    here = path.is_file()
    intact = here and data.is_intact(item, path)
    again = f"`demur data fetch {item.name}` gets it"
    cached = f"no; {again}" if not here else f"{path}" if intact else f"{path} (damaged; {again} again)"
    for field, value in (_fields(item) | {"cached": cached}).items():
        # Not a table: addresses and hashes are copied, and must not be broken over lines.
        if value:
            say(f"{field:<10} {value}")
    if not intact:
        return
    if item.kind == "prompts":
        _say_counts(item)
    if item.label == "harmful" and not examples:
        say("Its prompts are harmful and not printed; --examples prints the first.")
        return
    for number, text in enumerate(data.read_texts(item.name, limit=EXAMPLES), start=1):
        line = " ".join(text.split())
        say(f"row {number}: {line if len(line) <= EXAMPLE_WIDTH else f'{line[:EXAMPLE_WIDTH]}…'}")


@command.command("fetch")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="All sets that are listed.")
@click.option("--from", "source", **PATH, help="A file on this machine that is the set's, instead of a download.")
def fetch_sets(names: tuple[str, ...], every: bool, source: Path | None) -> None:
    """Get the files of sets into the cache. One that fails does not stop the others; the exit status is then 2."""
    items = _chosen(names, every)
    if source is not None and len(items) != 1:
        raise InputError(f"--from PATH is the file of one set; {len(items)} sets are named")
    failed: list[str] = []
    with logging_to(Warnings()):
        for item in items:
            try:
                path = data.fetch(item) if source is None else data.store(item, source)
                say(f"{item.name}: {bytes_text(path.stat().st_size)}, {path}")
            except DemurError as error:
                complain(str(error))
                failed.append(item.name)
    if failed and source is None:
        note(f"{len(failed)} of {len(items)} sets could not be fetched: {', '.join(failed)}")
    if failed:
        raise click.exceptions.Exit(FAILED)


def _chosen(names: tuple[str, ...], every: bool) -> list[NamedSet]:
    if every and names:
        raise InputError("--all is every set; leave the names out, or --all")
    if not every and not names:
        raise InputError("name at least one set (`demur data list` prints them), or give --all")
    chosen = prompt_sets().values() if every else map(named_set, names)
    return list({item.name: item for item in chosen}.values())


def _fields(item: NamedSet) -> dict[str, str]:
    """What is known of a set, by name; empty where it is not known."""
    return {
        "name": item.name,
        "what": item.title,
        "kind": item.kind,
        "label": item.label or "-",
        "rows": _count(item.rows),
        "column": f"{item.column or 'found by its name'} (of {', '.join(item.columns)})" if item.columns else "",
        "only rows": ", ".join(f"with {column} {value or 'empty'}" for column, value in item.keep.items()),
        "licence": item.licence,
        "page": item.page,
        "cite": item.cite,
        "gated": "yes: its page asks for an account that accepts the terms" if item.gated else "no",
        "file": item.url or item.file,
        "revision": item.revision,
        "pinned by": "commit and SHA-256" if item.sha256 and item.revision else item.pin,
        "SHA-256": item.sha256 or "",
    }


def _say_counts(item: NamedSet) -> None:
    """Prompts that the cached file gives, and how many of each category."""
    # What the reader would warn of is among the counts.
    with logging_to(logging.NullHandler()):
        reading = data.read_counted(item.name, label=item.label or "harmless")
    say(f"prompts: {len(reading.prompts)}; repeated: {reading.duplicates}; blank: {reading.empty}")
    categories = Counter(prompt.category for prompt in reading.prompts)
    if set(categories) != {None}:
        for category, number in categories.items():
            say(f"  {category or '(none)'}: {number}")


def _count(rows: int | None) -> str:
    return "not counted" if rows is None else f"{rows:,}"
