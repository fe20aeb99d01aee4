"""List public prompt sets, look at one, fetch their files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from demur.cli.console import Warnings, complain, console, logging_to, note, say
from demur.data import (
    NamedSet,
    add_prompt_sets,
    cache_path,
    fetch,
    is_intact,
    named_set,
    prompt_sets,
    read_counted,
    read_texts,
    store,
)
from demur.errors import DemurError, InputError
from demur.report.format import bytes_text

FAILED: Final = 2
EXAMPLES: Final = 3
EXAMPLE_WIDTH: Final = 200


@click.group(help=__doc__)
@click.option(
    "--sets",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="TOML file with sets of your own; repeatable. DEMUR_PROMPT_SETS names one for all commands.",
)
def command(sets: tuple[Path, ...]) -> None:
    for file in sets:
        add_prompt_sets(file)


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known of each set, as JSON.")
def list_sets(as_json: bool) -> None:
    """List the sets: kind, label, rows, licence, whether gated, and whether the file is in the cache."""
    if as_json:
        say(json.dumps([_record(item) for item in prompt_sets().values()], indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("name", "kind", "label", "rows", "gated", "cached", "licence"):
        table.add_column(
            title, justify="right" if title == "rows" else "left", no_wrap=title not in ("name", "licence")
        )
    for item in prompt_sets().values():
        table.add_row(
            item.name,
            item.kind,
            item.label or "-",
            _count(item.rows),
            "gated" if item.gated else "-",
            "yes" if cache_path(item).is_file() else "-",
            item.licence,
        )
    console().print(table)


@command.command("show")
@click.argument("name")
@click.option("--examples", is_flag=True, help="Print rows of a harmful set too.")
def show(name: str, examples: bool) -> None:
    """Show all that is known of a set; of one in the cache, its counts, and its first rows unless it is harmful."""
    item = named_set(name)
    path = cache_path(item)
    here = path.is_file()
    intact = here and is_intact(item, path)
    for field, value in (*_fields(item), ("cached", _state(item, path, here, intact))):
        # Not a table: addresses and hashes are copied, and must not be broken over lines.
        say(f"{field:<10} {value}")
    if not intact:
        return
    if item.kind == "prompts":
        # What the reader would warn of is among the counts.
        with logging_to(logging.NullHandler()):
            _say_counts(item)
    if item.label != "harmful" or examples:
        for number, text in enumerate(read_texts(item.name, limit=EXAMPLES), start=1):
            say(f"row {number}: {_shortened(text)}")
    else:
        say("Its prompts are harmful and not printed; --examples prints the first.")


@command.command("fetch")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "every", is_flag=True, help="All sets that are listed.")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A file on this machine that is the set's, instead of a download.",
)
def fetch_sets(names: tuple[str, ...], every: bool, source: Path | None) -> None:
    """Get the files of sets into the cache. One that fails does not stop the others; the exit status is then 2."""
    items = _chosen(names, every)
    with logging_to(Warnings()):
        if source is not None:
            if len(items) != 1:
                raise InputError(f"--from PATH is the file of one set; {len(items)} sets are named")
            _say_stored(items[0], store(items[0], source))
            return
        failed = [item.name for item in items if not _fetched(item)]
    if failed:
        note(f"{len(failed)} of {len(items)} sets could not be fetched: {', '.join(failed)}")
        raise click.exceptions.Exit(FAILED)


def _chosen(names: tuple[str, ...], every: bool) -> list[NamedSet]:
    if every and names:
        raise InputError("--all is every set; leave the names out, or --all")
    if not every and not names:
        raise InputError("name at least one set (`demur data list` prints them), or give --all")
    chosen = list(prompt_sets().values()) if every else [named_set(name) for name in names]
    return list({item.name: item for item in chosen}.values())


def _fetched(item: NamedSet) -> bool:
    """Whether the set's file is now in the cache; says so, or why not."""
    try:
        path = fetch(item)
    except DemurError as error:
        complain(str(error))
        return False
    _say_stored(item, path)
    return True


def _say_stored(item: NamedSet, path: Path) -> None:
    say(f"{item.name}: {bytes_text(path.stat().st_size)}, {path}")


def _record(item: NamedSet) -> dict[str, object]:
    path = cache_path(item)
    return {**item.model_dump(), "pin": item.pin, "cached": str(path) if path.is_file() else None}


def _fields(item: NamedSet) -> Iterator[tuple[str, str]]:
    """What is known of a set, by name; what is not known is left out."""
    pinned = "commit and SHA-256" if item.sha256 and item.revision else item.pin
    fields = {
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
        "pinned by": pinned,
        "SHA-256": item.sha256 or "",
    }
    yield from ((name, text) for name, text in fields.items() if text)


def _state(item: NamedSet, path: Path, here: bool, intact: bool) -> str:
    if not here:
        return f"no; `demur data fetch {item.name}` gets it"
    return f"{path}" if intact else f"{path} (damaged; `demur data fetch {item.name}` gets it again)"


def _say_counts(item: NamedSet) -> None:
    """Prompts that the cached file gives, and how many of each category."""
    reading = read_counted(item.name, label=item.label or "harmless")
    say(f"prompts: {len(reading.prompts)}; repeated: {reading.duplicates}; blank: {reading.empty}")
    categories = Counter(prompt.category for prompt in reading.prompts)
    if set(categories) != {None}:
        for category, number in categories.items():
            say(f"  {category or '(none)'}: {number}")


def _count(rows: int | None) -> str:
    return "not counted" if rows is None else f"{rows:,}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXAMPLE_WIDTH else f"{line[:EXAMPLE_WIDTH]}…"
