"""Run folders: a manifest, and stages that resume and never overwrite one another."""

from demur.runs._run import Manifest, Run, RunView, Session, StageCount, StageRef, read_run
from demur.runs._stage import (
    JSON,
    Codec,
    KindOf,
    RowReader,
    Stage,
    StageFolder,
    as_toml,
    hash_of,
    key_versions,
    stage_key,
    to_json,
    write_text,
    write_whole,
)

__all__ = [
    "JSON", "Codec", "KindOf", "Manifest", "RowReader", "Run", "RunView", "Session", "Stage", "StageCount",
    "StageFolder", "StageRef", "as_toml", "hash_of", "key_versions", "read_run", "stage_key", "to_json", "write_text",
    "write_whole",
]  # fmt: skip
