"""The study of dictionaries on the planted model, beside SAEs whose fidelity is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from page_parts import unshown

from demur.saes import DenseSae
from demur.studies.dictionaries import Result, SuiteRows
from demur.testing import Planted


def saes(folder: Path, truth: Planted, *, perfect: bool) -> Path:
    """SAEs of every layer in SAELens' layout that give back any residual, or that give 0 for any."""
    d_model = truth.model.config.hidden_size
    eye = torch.eye(d_model)
    both = torch.cat([eye, -eye])
    nothing = torch.zeros(d_model)
    for layer in range(truth.model.config.num_hidden_layers):
        made = both if perfect else torch.zeros_like(both)
        sae = DenseSae(layer, both.T.contiguous(), torch.zeros(2 * d_model), None, made, None, nothing)
        sae.save_saelens(folder / f"blocks.{layer}.hook_resid_post")
    return folder


@pytest.fixture(scope="module")
def result(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("dictionaries")
    against = tuple(str(saes(folder / str(kind), files.truth, perfect=kind)) for kind in (True, False))
    small = files.small(n="12,6,4,12", against=against, conversations=12)
    return cast("Result", files.study(folder / "run", "dictionaries", **small))


def suite(result: Result, ending: str) -> SuiteRows:
    return next(each for each in result.suites if each.name.endswith(ending))


def test_a_perfect_suite_loses_nothing(result: Result) -> None:
    found = suite(result, "True")
    assert all(row.fvu.value < 1e-6 for row in found.regions)
    known = [row.recovered.value for row in found.splices if not math.isnan(row.recovered.value)]
    assert known == pytest.approx([1] * len(known), abs=1e-3)
    assert len(known) >= len(found.layers)
    assert all(abs(row.rise.value) < 1e-3 and abs(row.kl.value) < 1e-3 for row in found.splices)
    # The planted layer 0 does not write at the direction's token.
    assert [row.cosine for row in found.layers[1:]] == pytest.approx([1] * (len(found.layers) - 1), abs=1e-4)
    assert all(row.survives.value == pytest.approx(1, abs=1e-3) for row in found.layers)


def test_a_suite_that_gives_nothing_recovers_nothing(result: Result) -> None:
    found = suite(result, "False")
    # Its reconstruction is 0, which is what zero ablation puts there.
    known = [row.recovered_zero.value for row in found.splices if not math.isnan(row.recovered_zero.value)]
    assert known == pytest.approx([0] * len(known), abs=1e-6)
    assert len(known) >= len(found.layers)
    assert all(row.fvu.value >= 1 for row in found.regions)


def test_every_layer_and_region_is_there_and_differences_are_paired(result: Result) -> None:
    own, perfect, nothing = result.suites
    layers = len(own.layers)
    for each in result.suites:
        assert len(each.regions) == 3 * layers
        assert len(each.splices) == 4 * layers
    for other in (perfect, nothing):
        rows = [row for row in result.pairs if row.other == other.name]
        assert [row.layer for row in rows] == [row.layer for row in own.layers]
        for row in rows:
            gap = own.splice(row.layer).recovered.value - other.splice(row.layer).recovered.value
            assert row.recovered.value == pytest.approx(gap, abs=1e-9, nan_ok=True)
    assert all(row.fvu.high < 0 for row in result.pairs if row.other == nothing.name)


def test_the_page_says_which_suite_keeps_more(result: Result) -> None:
    first, *_ = result.page().sections
    text = " ".join(str(block) for block in first.blocks)
    assert "median of" in text
    assert {section.title for section in result.page().sections} >= {"Suites side by side", "By region"}
    drawn = [block for section in result.page().sections for block in section.blocks if hasattr(block, "draw")]
    assert all(block.draw() is not None for block in drawn)  # pyright: ignore


def test_every_study_doubts_saes_that_reconstruct_poorly(files: Any, tmp_path: Path) -> None:
    """The short check is a warning of `features`, too: one that agrees with the whole study's figures in kind."""

    def doubts(name: str, **options: Any) -> list[str]:
        small = files.small(n="12,6,4,6", harm_features=0, **options)
        return [text for text in files.study(tmp_path / name, "features", **small).warnings if "poorly" in text]

    assert not doubts("perfect", saes=str(saes(tmp_path / "p", files.truth, perfect=True)), k=4)
    (own,) = doubts("own")
    # The planted SAEs hold the planted features only, not the words' own directions.
    assert "the user's words at layer" in own
    assert "`demur dictionaries`" in own


def test_regions_can_be_left_out(files: Any, tmp_path: Path) -> None:
    small = files.small(n="12,6,4,6", conversations=6, by_region=False)
    found = cast("Result", files.study(tmp_path / "run", "dictionaries", **small))
    assert {row.where for row in found.suites[0].splices} == {"all"}
    assert not found.pairs
    assert found.page().sections


def test_what_the_result_holds_is_on_its_page(result: Any) -> None:
    assert unshown(result) == set()
