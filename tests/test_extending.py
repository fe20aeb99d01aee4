"""The package of docs/extending.md, installed and used from the command line."""

from __future__ import annotations

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


def demur(site: Path, *arguments: str, code: str | None = None) -> str:
    command = [sys.executable, "-m", "demur", *arguments] if code is None else [sys.executable, "-c", code]
    path = os.pathsep.join((str(site), *filter(None, sys.path)))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=site, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_at_most_20_lines_of_code(site: Path) -> None:
    for path in (site / "toy").glob("*.py"):
        code = [
            line for line in path.read_text().splitlines() if line.strip() and not line.startswith(("from ", "import "))
        ]
        assert len(code) <= 20, path.name


def test_a_study_in_one_file_is_a_command(site: Path) -> None:
    assert "Measure how long the model's answers are." in demur(site, "--help")
    text = demur(site, "lengths", "--help")
    assert "Lengths:" in text
    assert "Answers of at least so many words are long." in text
    run = site / "run"
    assert "10 of 10 answers are long." in demur(site, "lengths", "-n", "8,4,4,10", "--out", str(run))
    assert "10 of 10 answers are long." in demur(site, "show", str(run))
    assert (run / "report.html").is_file()


def test_a_method_and_a_judge_in_one_file_each_are_options(site: Path) -> None:
    options = ("-n", "24,12,8,8", "--k", "5", "--n-exact", "0", "--suppress", "0", "--random-sets", "2")
    options += ("--direction-layer", "4", "--direction-position", "-1", "--max-new-tokens", "16")
    arguments = ("--methods", "loudest", "--judge", "polite", "--out", str(site / "methods"))
    assert "Loudest, c = 0" in demur(site, "study", *options, *arguments)
    assert "judge: polite" in demur(site, "show", str(site / "methods"), "--full")


def test_a_layout_in_one_file_is_read(site: Path) -> None:
    folder = site / "saes"
    folder.mkdir()
    weights = load_suite(bundled_path().saes, average_l0=16)[3].dense()
    arrays = {"W_enc": weights.w_enc, "b_enc": weights.b_enc, "W_dec": weights.w_dec, "b_dec": weights.b_dec}
    np.savez(folder / "layer_3.npz", allow_pickle=False, **{name: values.numpy() for name, values in arrays.items()})
    code = f"from demur.saes import load_suite; s = load_suite({str(folder)!r}); print(s.layers, s.specs[0].activation)"
    assert demur(site, code=code).strip() == "(3,) relu"


def test_a_prompt_set_in_one_file_has_a_name(site: Path) -> None:
    assert "pastries" in demur(site, "data", "list")
    code = "from demur.data import read_prompts; print(len(read_prompts('pastries', label='harmless')))"
    assert demur(site, code=code).strip() == "40"


def test_an_intervention_in_one_class_changes_answers(site: Path) -> None:
    example = re.findall(r"```python\n(import demur\n.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    code = (
        f"{example}\nclean = model.generate(['What should I do to bake bread?'])\nprint(answers.texts != clean.texts)"
    )
    assert demur(site, code=code).strip() == "True"
