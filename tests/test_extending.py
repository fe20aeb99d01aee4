"""The package of docs/extending.md, installed and used from the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from demur.bundled import bundled_path
from demur.saes import load_suite

DOCS = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package `toy` is installed as pip would leave it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy").mkdir()
    (folder / "toy" / "__init__.py").write_text("")
    for name, body in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        (folder / "toy" / name).write_text(body, encoding="utf-8")
    (folder / "toy" / "pastries.txt").write_text("\n".join(f"How do I bake cake number {n}?" for n in range(40)))
    found = re.search(r"```toml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    project = tomllib.loads(found[1])["project"]
    info = folder / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


SMALL = (
    "-n", "24,12,8,8", "--k", "5", "--n-exact", "0", "--suppress", "0", "--induce-multiples", "1", "--random-sets", "2",
    "--direction-layer", "4", "--direction-position", "-1", "--max-new-tokens", "16",
)  # fmt: skip
COMMANDS = {
    "help": ("--help",),
    "help of lengths": ("lengths", "--help"),
    "lengths": ("lengths", "-n", "8,4,4,10", "--out", "lengths"),
    "show lengths": ("show", "lengths"),
    "study": ("study", *SMALL, "--methods", "loudest", "--judge", "polite", "--out", "methods"),
    "show study": ("show", "methods", "--full"),
    "sets": ("data", "list"),
}
CODE = {
    "set": "from demur.data import read_prompts; print(len(read_prompts('pastries', label='harmless')))",
    "layout": "from demur.saes import load_suite; s = load_suite('saes'); print(s.layers, s.specs[0].activation)",
    "intervention": re.findall(r"```python\n(import demur\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    + "\nclean = model.generate(['What should I do to bake bread?'])\nprint(answers.texts != clean.texts)",
}
RUNNER = """
import json, sys
from demur.cli import main

commands, code = json.loads(sys.argv[1])
for name, words in commands.items():
    print(f"--- {name}", flush=True)
    if status := main(words):
        sys.exit(status)
for name, body in code.items():
    print(f"--- {name}", flush=True)
    exec(body, {})
"""


@pytest.fixture(scope="module")
def printed(site: Path) -> dict[str, str]:
    """What each command and snippet prints, one after the other in a process that finds the package by itself."""
    folder = site / "saes"
    folder.mkdir()
    weights = load_suite(bundled_path().saes, average_l0=16)[3].dense()
    arrays = {"W_enc": weights.w_enc, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
    np.savez(folder / "layer_3.npz", allow_pickle=False, **{name: values.numpy() for name, values in arrays.items()})
    path = os.pathsep.join((str(site), *filter(None, sys.path)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", RUNNER, json.dumps((COMMANDS, CODE))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=site, check=False)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    parts = (part.partition("\n") for part in done.stdout.split("--- ")[1:])
    return {name: body for name, _, body in parts}


def test_every_example_has_at_most_20_lines_of_code(site: Path) -> None:
    for path in (site / "toy").glob("*.py"):
        code = [
            line for line in path.read_text().splitlines() if line.strip() and not line.startswith(("from ", "import "))
        ]
        assert len(code) <= 20, path.name


def test_a_study_in_one_file_is_a_command(printed: dict[str, str], site: Path) -> None:
    assert "Measure how long the model's answers are." in printed["help"]
    assert "Lengths:" in printed["help of lengths"]
    assert "Answers of at least so many words are long." in printed["help of lengths"]
    assert "10 of 10 answers are long." in printed["lengths"]
    assert "10 of 10 answers are long." in printed["show lengths"]
    assert (site / "lengths" / "report.html").is_file()


def test_a_method_and_a_judge_in_one_file_each_are_options(printed: dict[str, str]) -> None:
    assert "Loudest, c = 0" in printed["study"]
    assert "judge: polite" in printed["show study"]


def test_a_layout_in_one_file_is_read(printed: dict[str, str]) -> None:
    assert printed["layout"].strip() == "(3,) relu"


def test_a_prompt_set_in_one_file_has_a_name(printed: dict[str, str]) -> None:
    assert "pastries" in printed["sets"]
    assert printed["set"].strip() == "40"


def test_an_intervention_in_one_class_changes_answers(printed: dict[str, str]) -> None:
    assert printed["intervention"].strip() == "True"
