"""Prompt files, attack files, text samples and public sets by name: prompts are read into `PromptSet`s and split
without overlap."""

from demur.data.attacks import Attack, AttackPair, adversarial_prompts, read_attacks
from demur.data.named_sets import (
    PROMPT_SETS,
    NamedSet,
    add_prompt_sets,
    cache_path,
    fetch,
    find_set,
    is_intact,
    named_set,
    prompt_sets,
    store,
)
from demur.data.prompts import Reading, read_counted, read_prompts, read_texts
from demur.data.splits import load_prompts, make_splits
from demur.data.tables import PROMPT_COLUMNS, Table, read_table

__all__ = [
    "PROMPT_COLUMNS", "PROMPT_SETS", "Attack", "AttackPair", "NamedSet", "Reading", "Table", "add_prompt_sets",
    "adversarial_prompts", "cache_path", "fetch", "find_set", "is_intact", "load_prompts", "make_splits", "named_set",
    "prompt_sets", "read_attacks", "read_counted", "read_prompts", "read_table", "read_texts", "store",
]  # fmt: skip
