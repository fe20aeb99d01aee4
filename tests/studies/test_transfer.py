"""F* of the planted model in SAEs whose relation to its own is known: the same features in another order and unit, and
none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from demur.errors import InputError
from demur.method.matching import mutual_nearest
from demur.saes import DenseSae
from demur.studies.transfer import Result, SuiteRows
from demur.testing import Planted
from demur.types import FeatureId

_SHIFT = 5
"""Places by which the features of the permuted SAEs are moved."""


def save(folder: Path, truth: Planted, *, known: bool) -> Path:
    """The planted SAEs with features moved by some places and twice as large, or with mixtures of fillers only."""
    generator = torch.Generator().manual_seed(1)
    for layer in truth.suite.layers:
        sae = truth.suite[layer].dense()
        w_dec = sae.w_dec.roll(_SHIFT, 0)
        if not known:
            fillers = [feature.index for feature in sorted(truth.truth.filler) if feature.layer == layer]
            mixed = torch.randn(len(w_dec), len(fillers), generator=generator) @ sae.w_dec[fillers]
            w_dec = torch.nn.functional.normalize(mixed, dim=-1)
        assert sae.threshold is not None
        threshold = 2 * sae.threshold.roll(_SHIFT)
        made = DenseSae(layer, 2 * w_dec.T.contiguous(), torch.zeros_like(threshold), threshold, w_dec / 2, None,
                        sae.b_dec)  # fmt: skip
        made.save_gemma_scope(folder, average_l0=5.0)
    return folder


@pytest.fixture(scope="module", name="result")
def transferred(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("transfer")
    to_saes = tuple(str(save(folder / name, files.truth, known=name == "moved")) for name in ("moved", "fillers"))
    small = files.small(n="8,6,6,8", direction_layer=2, to_saes=to_saes, n_answers=6, factor=-1)
    return cast("Result", files.study(folder / "run", "transfer", **small))


def suite(result: Result, ending: str) -> SuiteRows:
    return next(each for each in result.suites if each.name.endswith(ending))


def test_every_feature_is_found_where_it_was_moved(result: Result) -> None:
    found = suite(result, "moved")
    decoder, activation = ([row for row in found.matches if row.way == way] for way in ("decoder", "activation"))
    for row in decoder:
        assert row.other == FeatureId(row.feature.layer, (row.feature.index + _SHIFT) % 48)
        assert row.mutual
    assert [row.score for row in decoder] == pytest.approx([1.0] * result.k, abs=1e-4)
    # Some planted features rise and fall together, so activations alone cannot tell them apart.
    assert all(row.score == pytest.approx(1, abs=1e-3) for row in activation if row.score > 0.5)
    assert found.agree >= result.k // 2


def test_the_effect_carries_to_the_same_features_in_another_unit(result: Result) -> None:
    own, *others = suite(result, "moved").effects
    assert own.name == "F*"
    assert own.carried.value == pytest.approx(1)
    assert own.drive.low > 0
    decoder = others[0]
    assert decoder.features == own.features
    assert decoder.carried.value == pytest.approx(1, rel=0.05)
    # The unit of an activation is the SAE's, and it is set in that unit.
    assert (decoder.suppressed.value, decoder.induced.value) == (own.suppressed.value, own.induced.value) == (0, 1)


def test_fillers_hold_no_counterpart_that_drives_refusal(result: Result) -> None:
    found = suite(result, "fillers")
    ways = {row.way: row for row in found.ways}
    assert ways["decoder"].score.value < 0.6
    assert ways["decoder"].mutual < 0.6
    assert abs(found.effects[1].carried.value) < 0.01
    assert found.effects[1].suppressed.value > found.effects[0].suppressed.value
    moved = {row.way: row for row in suite(result, "moved").ways}
    assert moved["decoder"].score.low > ways["decoder"].score.high


def test_the_page_and_what_is_missing(result: Result, files: Any, tmp_path: Path) -> None:
    page = result.page()
    assert all(f"{result.k} features of F*" in text for text in page.verdicts)
    drawn = [block for section in page.sections for block in section.blocks if hasattr(block, "draw")]
    assert all(block.draw() is not None for block in drawn)  # pyright: ignore
    with pytest.raises(InputError, match="--to-saes"):
        files.study(tmp_path / "run", "transfer", **files.small())


def test_mutual_nearest_by_hand() -> None:
    # 0 and 1 are each other's best; 1's best is 1, too, which prefers 0; 2 and 0 are each other's best.
    scores = torch.tensor([[0.2, 0.9], [0.1, 0.8], [0.7, 0.3]])
    assert [(a, b, pytest.approx(s)) for a, b, s in mutual_nearest(scores)] == [(0, 1, 0.9), (2, 0, 0.7)]
    assert not mutual_nearest(torch.zeros(0, 3))
