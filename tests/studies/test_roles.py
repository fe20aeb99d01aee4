"""Roles of the planted model's features, which are known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demur.method.selection import actdiff_set
from demur.model import Region
from demur.studies import STUDIES
from demur.studies.config import load_config
from demur.studies.context import Context, open_context
from demur.studies.methods import FeatureMethod, Selection, get_method
from demur.studies.pipeline import Found, find
from demur.studies.roles import Roles, find_roles, harm_features


@pytest.fixture(scope="module")
def found(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Context[Any], Found]]:
    study = STUDIES["study"]
    config = load_config(None, files.options(), study.config)
    with open_context(study, config, tmp_path_factory.mktemp("roles") / "run") as context:
        yield context, find(context, context.splits.choosing)


def test_harm_features_are_the_planted_ones(files: Any, found: tuple[Context[Any], Found]) -> None:
    assert set(harm_features(*found).of("harm")) == files.truth.truth.harm
    best = harm_features(*found, k=3)
    assert [row.feature for row in best.features] == [row.feature for row in harm_features(*found).features[:3]]


def test_roles_are_read_off_the_place(files: Any, found: tuple[Context[Any], Found]) -> None:
    truth = files.truth.truth
    roles = find_roles(*found, sorted(truth.causal))
    assert set(roles.of("harm")) == truth.harm
    assert set(roles.of("refusal")) == truth.refusal
    assert roles.of("harm", "refusal") == tuple(sorted(truth.causal))


def test_a_share_is_that_of_the_definition(found: tuple[Context[Any], Found]) -> None:
    work, steps = found
    used = steps.clean.used("selection")
    features = tuple(dict.fromkeys((*steps.chosen.features, *harm_features(*found).of("harm"))))
    rows: Roles = find_roles(work, steps, features)
    layer = rows.features[0].feature.layer
    maxima: dict[str, np.ndarray] = {}
    for name, prompts in (("harmful", used.harmful), ("harmless", used.harmless)):
        each: list[list[float]] = []
        for item in work.model.tokenize(prompts):
            batch = work.model.batch([item])
            with work.model.capture() as residuals:
                work.model.last_logits(batch)
            values = work.suite[layer].dense().encode(residuals[layer])[0, :, rows.features[0].feature.index]
            places = np.array(item.regions)
            own = [places == region for region in (Region.INSTRUCTION, Region.POST_INSTRUCTION)]
            each.append([float(values.detach().numpy()[place].max()) for place in own])
        maxima[name] = np.array(each).mean(0)
    gaps = maxima["harmful"] - maxima["harmless"]
    assert rows.features[0].instruction == pytest.approx(gaps[0], abs=1e-5)
    assert rows.features[0].post_instruction == pytest.approx(gaps[1], abs=1e-5)
    assert rows.features[0].share.value == pytest.approx(max(gaps[1], 0) / np.clip(gaps, 0, None).sum(), abs=1e-5)


def test_a_feature_that_harm_does_not_raise_has_no_role(files: Any, found: tuple[Context[Any], Found]) -> None:
    work, steps = found
    row = find_roles(work, steps, files.truth.truth.redundant).features[0]
    assert row.role == "mixed"
    assert np.isnan(row.share.value)


def test_actdiff_reduces_over_tokens_as_configured(files: Any, tmp_path: Path) -> None:
    study = STUDIES["benchmark"]
    config = load_config(None, files.options(actdiff_tokens="last"), study.config)
    with open_context(study, config, tmp_path / "run") as context:
        given = Selection(context, find(context, context.splits.choosing), 5)
        method = get_method("actdiff")
        assert isinstance(method, FeatureMethod)
        chosen = method.select(given)
        own, other = (
            actdiff_set(context.model, context.suite, given.harmful, given.harmless, 5, reduce=reduce)
            for reduce in ("last", "max")
        )
    assert chosen == own
    assert chosen != other
