"""Attack files as they are published: pairs of a plain and an adversarial prompt, templates, lists of rewrites.

- A column with a hole, `[INSERT PROMPT HERE]` or `{ask}`: templates, as in GPTFuzzer's csv or a txt file of wrappers.
- A column of plain prompts beside one of adversarial ones: pairs, as in JailbreakBench's artifacts (`goal`, `prompt`).
- One column of prompts: rewrites whose plain version is not known, such as lists of tense reformulations.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from demur.data.named_sets import split_source
from demur.data.tables import PROMPT_COLUMNS, Row, Table, kind_of, read_table
from demur.errors import InputError
from demur.types import Prompt, PromptSet, Value, text_key

HOLE = "{ask}"
HOLES = (HOLE, "[INSERT PROMPT HERE]")
"""What stands for the request in a template."""
PLAIN_COLUMNS = ("plain", "vanilla", "goal", "original")
ADVERSARIAL_COLUMNS = ("adversarial", "jailbreak", "prompt")


class AttackPair(Value):
    """An adversarial prompt and the plain one that it was made from (None where that is not known)."""

    id: str
    attack: str
    """Name of the attack: of its file, or of the built-in wrappers."""
    plain: str | None
    text: str

    @property
    def around(self) -> tuple[str, str] | None:
        """The texts before and after the plain prompt, where it stands in the adversarial one word for word (without
        case)."""
        if self.plain is None or text_key(self.text) == text_key(self.plain):
            return None
        found = self._places(self.plain).search(self.text)
        return None if found is None else (self.text[: found.start()], self.text[found.end() :])

    def with_request(self, plain: str) -> str:
        """The same adversarial text around another request. Raises ValueError: the plain prompt is not in it."""
        if self.around is None or self.plain is None:
            raise ValueError(f"{self.id}: the plain prompt does not stand in the adversarial one")
        return self._places(self.plain).sub(lambda _: plain, self.text)

    @staticmethod
    def _places(plain: str) -> re.Pattern[str]:
        return re.compile(re.escape(plain), re.IGNORECASE)


@dataclass(frozen=True)
class Attack:
    """What one source gives: templates with the hole `{ask}`, or pairs; and how many of its rows hold no attack."""

    name: str
    templates: tuple[str, ...] = ()
    pairs: tuple[AttackPair, ...] = ()
    empty: int = 0

    def on(self, prompts: PromptSet, count: int, *, per_prompt: int = 4, seed: int = 0) -> tuple[AttackPair, ...]:
        """At most `count` pairs: a draw of the source's own, or its templates around `prompts`, `per_prompt` different
        ones for each, which take turns so that all are used alike."""
        if self.pairs:
            places = random.Random(seed).sample(range(len(self.pairs)), min(count, len(self.pairs)))
            return tuple(self.pairs[place] for place in sorted(places))
        rounds = min(per_prompt, len(self.templates))
        made: list[AttackPair] = []
        for number, prompt in enumerate(prompts.prompts[: -(-count // rounds)]):
            for turn in range(rounds):
                place = (number * rounds + turn) % len(self.templates)
                text = self.templates[place].replace(HOLE, prompt.text)
                made.append(
                    AttackPair(id=f"{prompt.id}-{self.name}:{place}", attack=self.name, plain=prompt.text, text=text)
                )
        return tuple(made[:count])


def read_attacks(sources: Sequence[str]) -> tuple[Attack, ...]:
    """Attack files, each `FILE` or `FILE::COLUMN` (the column of the adversarial prompts or templates), in any format
    of prompt files. An attack is called after its file, with as many folders as it takes to tell all apart. Raises
    InputError: a file cannot be read, holds no attack, or a row that does not fit; names file and row."""
    split = [split_source(source) for source in sources]
    paths = [Path(file).expanduser() for file, _ in split]
    if len(set(paths)) < len(paths):
        raise InputError(f"the attacks {', '.join(map(str, paths))} name one file twice; name each once")
    names = _names(paths)
    return tuple(_read(name, path, column) for name, path, (_, column) in zip(names, paths, split, strict=True))


def _names(paths: Sequence[Path]) -> list[str]:
    """What JailbreakBench's artifacts call themselves (`GCG/vicuna-13b-v1.5`); of other files, their names."""
    deepest = max((len(path.parts) for path in paths), default=1)
    for depth in range(1, deepest + 1):
        names = [_told(path) or "/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _told(path: Path) -> str:
    if kind_of(path) != ".json" or not path.is_file():
        return ""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return ""  # The reader says where.
    parts = [content.get(key) for key in ("attack", "model")] if isinstance(content, dict) else []
    return "/".join(part for part in parts if isinstance(part, str))


def _read(name: str, path: Path, column: str | None) -> Attack:
    table = read_table(path)
    rows = tuple(table.rows())
    hinted = "--attacks FILE::COLUMN"
    named = table.find_column(column, (), what="an attack", option=hinted) if column else None
    holed = _holed_column(rows, (named,) if named else table.columns)
    if holed is not None:
        return Attack(name, templates=tuple(_templates(path, rows, holed)))
    plain = table.optional_column(PLAIN_COLUMNS)
    ranked = ADVERSARIAL_COLUMNS if plain else PROMPT_COLUMNS
    adversarial = named or table.find_column(None, ranked, what="adversarial prompts or templates", option=hinted)
    if plain == adversarial:
        plain = None
    return _pairs(name, table, rows, plain, adversarial)


def _holed_column(rows: Sequence[Row], columns: Sequence[str]) -> str | None:
    """The column in whose first filled row a hole stands."""
    for column in columns:
        cells = (cell for row in rows if isinstance(cell := row.get(column), str) and cell.strip())
        if any(hole in next(cells, "") for hole in HOLES):
            return column
    return None


def _templates(path: Path, rows: Sequence[Row], column: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        text = _text(path, number, row, column)
        if not text:
            continue
        found = [hole for hole in HOLES if hole in text]
        if not found:
            raise InputError(
                f"{path}, row {number}, column {column!r}: no hole for the request in {text[:60]!r}; expected "
                f"{' or '.join(HOLES)}, as in the rows before. Give rewrites and templates as two files"
            )
        for hole in found:
            text = text.replace(hole, HOLE)
        yield text


def _pairs(name: str, table: Table, rows: Sequence[Row], plain: str | None, adversarial: str) -> Attack:
    found: dict[str, AttackPair] = {}
    for number, row in enumerate(rows):
        text = _text(table.path, number, row, adversarial)
        before = _text(table.path, number, row, plain) if plain else None
        if not text or before == "" or text_key(text) == text_key(before or ""):
            continue  # Published lists hold rows for which no attack was found.
        pair = AttackPair(id=f"{name}:{number}", attack=name, plain=before, text=text)
        found.setdefault(text_key(text), pair)
    if not found:
        what = f"the column {adversarial!r}" + (f" beside {plain!r}" if plain else "")
        raise InputError(
            f"{table.path}: no attack in {what}: all {len(rows)} rows are empty or the same as the plain prompt; name "
            "the column with --attacks FILE::COLUMN"
        )
    return Attack(name, pairs=tuple(found.values()), empty=len(rows) - len(found))


def _text(path: Path, number: int, row: Row, column: str) -> str:
    cell = row.get(column)
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise InputError(
            f"{path}, row {number}, column {column!r}: expected text, found {cell!r:.60}; name the column of the "
            "adversarial prompts with --attacks FILE::COLUMN"
        )
    return cell.strip()


def adversarial_prompts(pairs: Sequence[AttackPair], name: str) -> PromptSet:
    """The adversarial prompts of pairs, under the pairs' ids."""
    prompts = (Prompt(id=pair.id, text=pair.text, label="harmful", source=pair.attack) for pair in pairs)
    return PromptSet(name=name, prompts=tuple(prompts))
