"""The files that are installed with demur."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys

import pytest

from demur.bundled import FRAMINGS, BundledJudge, bundled_path, bundled_prompts, bundled_texts, framed
from demur.errors import InputError
from demur.stats import rate_of
from demur.types import REFUSALS, Prompt
from recipes.bundled.build import hashes
from recipes.bundled.metrics import BundledMetrics, checks
from recipes.bundled.prompts import draw_prompts, draw_texts

PLACE = bundled_path()


@pytest.fixture(scope="module")
def stored() -> BundledMetrics:
    return BundledMetrics.model_validate_json(PLACE.metrics.read_text())


def refusal(prompts: list[Prompt]) -> float:
    from demur.model import load_model

    answers = load_model(PLACE.model, device="cpu").generate(prompts, max_new_tokens=40)
    return rate_of(BundledJudge().judge(answers), REFUSALS).value


def test_files_are_those_of_the_model_card():
    listed = dict(
        line.split("  ")[::-1] for line in re.findall(r"^[0-9a-f]{64}  .+$", PLACE.card.read_text(), flags=re.MULTILINE)
    )
    assert listed == hashes(PLACE)


def test_package_data_stays_small():
    size = sum(path.stat().st_size for path in PLACE.root.rglob("*") if path.is_file())
    assert size <= 10_000_000


def test_card_shows_the_stored_measurements(stored: BundledMetrics):
    card = PLACE.card.read_text()
    for check in checks(stored):
        assert f"| {check.name} | {check.wanted} | {check.measured} | {'met' if check.met else '**missed**'} |" in card


def test_every_layer_has_an_sae_in_both_suites():
    from demur.saes import load_suite

    assert load_suite(PLACE.saes).layers == load_suite(PLACE.base_saes).layers == tuple(range(8))


def test_its_refusals_are_those_of_the_stored_measurements(stored: BundledMetrics):
    sets = draw_prompts(test_seed=stored.test_seed)
    for prompts, rate in (
        (sets.test_harmful, stored.refusal_harmful),
        (sets.test_harmless, stored.refusal_harmless),
        (sets.over_refusal, stored.over_refusal),
    ):
        # Another processor's kernels may change an answer or two.
        assert refusal(list(prompts)) == pytest.approx(rate.value, abs=0.02)


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        ("harmful", 320, "5c2de7f4"),
        ("harmless", 320, "a995e17e"),
        ("test_harmful", 240, "b95cf679"),
        ("test_harmless", 240, "c95de000"),
        ("over_refusal", 216, "8c2b9c7b"),
    ],
)
def test_prompt_sets_never_change(name: str, count: int, digest: str):
    found = getattr(bundled_prompts(), name)
    assert len(found) == count
    assert found.ids == tuple(f"{name.replace('_', '-')}-{row:03d}" for row in range(count))
    rows = [[prompt.text, prompt.label, prompt.category, prompt.source] for prompt in found]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8] == digest


def test_installed_prompts_and_texts_are_those_that_the_recipe_draws():
    assert bundled_prompts() == draw_prompts()
    assert bundled_texts(1000) == draw_texts()


def test_texts_never_change():
    texts = json.dumps(bundled_texts())
    assert hashlib.sha256(texts.encode()).hexdigest().startswith("cabf46c33f517f48")
    assert bundled_texts(7) == bundled_texts()[:7]
    with pytest.raises(InputError, match="1001 plain texts were asked for, and the bundled model has 1000"):
        bundled_texts(1001)


def test_prompts_are_disjoint_and_labelled():
    sets = bundled_prompts()
    everything = [*sets.harmful, *sets.harmless, *sets.test_harmful, *sets.test_harmless, *sets.over_refusal]
    assert len({p.text for p in everything}) == len(everything)
    assert {p.label for p in (*sets.harmful, *sets.test_harmful)} == {"harmful"}
    assert {p.label for p in (*sets.harmless, *sets.test_harmless, *sets.over_refusal)} == {"harmless"}
    assert {p.category for p in sets.over_refusal} == {"leisure"}


def test_framed_prompts_keep_their_label_and_get_ids_of_their_own():
    prompts = bundled_prompts().test_harmful.head(2)
    inside = framed(prompts, "As a song: {ask}", "song")
    assert inside.texts == tuple(f"As a song: {text}" for text in prompts.texts)
    assert inside.ids == tuple(f"{name}-song" for name in prompts.ids)
    assert {p.label for p in inside} == {"harmful"}
    assert all(framing.count("{ask}") == 1 for framing in FRAMINGS)


def test_importing_the_package_imports_neither_torch_nor_the_recipe():
    code = (
        "import sys, demur.bundled as b; b.bundled_prompts(); b.bundled_texts()\n"
        "sys.exit(bool({'torch', 'recipes'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
