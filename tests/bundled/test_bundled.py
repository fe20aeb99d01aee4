"""The files that are installed with demur."""

from __future__ import annotations

import re

import pytest

from demur.bundled import BundledJudge, BundledMetrics, bundled_path, bundled_prompts, checks
from demur.bundled._build import hashes
from demur.stats import rate_of
from demur.types import Outcome, Prompt

PLACE = bundled_path()


def _refusal(prompts: list[Prompt]) -> float:
    from demur.model import generate, load_model

    answers = generate(load_model(PLACE.model, device="cpu"), prompts, max_new_tokens=40)
    verdicts = BundledJudge().judge([p.text for p in prompts], [a.text for a in answers])
    return rate_of(verdicts, (Outcome.REFUSAL, Outcome.PARTIAL_REFUSAL)).value


def test_files_are_those_of_the_model_card():
    listed = dict(
        line.split("  ")[::-1] for line in re.findall(r"^[0-9a-f]{64}  .+$", PLACE.card.read_text(), flags=re.MULTILINE)
    )
    assert listed == hashes(PLACE)


def test_package_data_stays_small():
    size = sum(path.stat().st_size for path in PLACE.root.rglob("*") if path.is_file())
    assert size <= 10_000_000


def test_card_shows_the_stored_measurements():
    card = PLACE.card.read_text()
    for check in checks(BundledMetrics.model_validate_json(PLACE.metrics.read_text())):
        assert f"| {check.name} | {check.wanted} | {check.measured} | {'met' if check.met else '**missed**'} |" in card


def test_every_layer_has_an_sae_in_both_suites():
    from demur.saes import load_suite

    assert load_suite(PLACE.saes).layers == load_suite(PLACE.base_saes).layers == tuple(range(8))


def test_its_refusals_are_those_of_the_stored_measurements():
    stored = BundledMetrics.model_validate_json(PLACE.metrics.read_text())
    sets = bundled_prompts(test_seed=stored.test_seed)
    for prompts, rate in (
        (sets.test_harmful, stored.refusal_harmful),
        (sets.test_harmless, stored.refusal_harmless),
        (sets.borderline, stored.refusal_borderline),
    ):
        # Kernels of another processor may turn an answer or two.
        assert _refusal(list(prompts)) == pytest.approx(rate.value, abs=0.02)
