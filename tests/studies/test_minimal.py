"""`demur minimal` on the planted model: the minimal set, its certificate and the dormant feature are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from page_parts import unshown

from demur.errors import InputError, ModelError
from demur.studies.minimal.sections import Certificate, Result
from demur.types import FeatureId


@pytest.fixture(scope="module")
def minimal(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    out = tmp_path_factory.mktemp("run") / "minimal"
    return files.study(out, "minimal"), out


@pytest.fixture(scope="module")
def shallow(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Without layer 3 nothing but the request's own words can stop refusal: the backup covers for `refuse`."""
    return files.study(tmp_path_factory.mktemp("run") / "shallow", "minimal", layers="0-2", target=0.99)


def refuse(files: Any, layer: int) -> FeatureId:
    (found,) = (feature for feature in files.truth.truth.refusal if feature.layer == layer)
    return found


def certificate(result: Result, test: str, name: str = "minimal set") -> Certificate:
    return next(row for row in result.certificate if (row.test, row.name) == (test, name))


def test_the_last_refusal_feature_alone_is_the_minimal_set(minimal: Any, files: Any) -> None:
    result: Result = minimal[0]
    assert set(result.chosen) == files.truth.truth.causal
    assert [(row.feature, row.role) for row in result.features] == [(refuse(files, 3), "refusal")]
    # Without it nothing is suppressed.
    assert (result.features[0].without.value, result.features[0].complied.value) == (0.0, 0.0)
    assert [row.size for row in result.sizes] == list(range(11, 0, -1))
    assert [row.size for row in result.sizes if row.chosen] == [1]


def test_where_the_backup_covers_the_minimal_set_is_the_harm_features(shallow: Result, files: Any) -> None:
    assert {row.feature for row in shallow.features} == files.truth.truth.harm
    assert {row.role for row in shallow.features} == {"harm"}
    for row in shallow.features:
        # One of two harm words is left on the prompts of its category: refusal is not needed for these any more, but
        # the log-odds are at −3 and not at −6.
        assert row.without.value == pytest.approx(1 - share_of_its_category(files, row.feature, shallow) / 3, abs=0.03)
        assert row.complied.value == 1.0


def share_of_its_category(files: Any, feature: FeatureId, result: Result) -> float:
    """Share of the test prompts that are of the feature's category, from the interval-free side: prompts on which
    suppressing it alone does something."""
    (pair,) = (each for each in files.truth.harm_of.values() if feature in each)
    other = next(each for each in pair if each != feature)
    (row,) = (p for p in result.pairs if {p.first, p.second} == {feature, other})
    # Each alone takes 6 of the 9 nats away, both together 9: 3 nats less than the sum, on prompts of the category.
    return -row.interaction.value / 3


def test_the_certificate(minimal: Any) -> None:
    result: Result = minimal[0]
    need, enough = certificate(result, "necessity"), certificate(result, "sufficiency")
    assert need.share.value == pytest.approx(1.0, abs=1e-3)
    assert (need.rate.value, enough.rate.value, need.size, need.rate.n) == (1.0, 1.0, 1, 20)
    # Restored where refusal is read, after the last ablation, it brings refusal back; nothing restored brings none.
    assert enough.share.value > 0.9
    nothing = certificate(result, "sufficiency", "nothing")
    assert (nothing.share.value, nothing.rate.value, nothing.size) == (0.0, 0.0, 0)
    assert nothing.difference is not None
    assert nothing.difference.value == 1.0
    for test in ("necessity", "sufficiency"):
        random = certificate(result, test, "random features")
        assert random.share.value == pytest.approx(0.0, abs=1e-3)
        assert (random.rate.value, random.sets, len(random.draws)) == (0.0, 2, 2)
        assert random.difference is not None
        assert random.difference.value == 1.0
    # 6 · refuse is the whole logit: log-odds fall by 9 nats where three words are content.
    assert 8 < result.effect.low <= result.effect.value <= result.effect.high < 10


def test_a_control_s_share_is_the_mean_of_its_draws_and_its_sets_have_the_size_of_the_minimal_one(
    minimal: Any, shallow: Result
) -> None:
    for result in (minimal[0], shallow):
        several = [row for row in result.certificate if row.draws]
        assert len(several) == 4
        for row in several:
            assert row.share.value == pytest.approx(sum(row.draws) / len(row.draws), abs=1e-6)
            assert (row.size, row.sets) == (len(result.features), len(row.draws))
        assert any(max(row.draws) - min(row.draws) > 0.05 for row in several)
        rest = certificate(result, "necessity", "the rest of F*")
        assert rest.size == len(result.chosen) - len(result.features)


def test_the_way_down_is_measured_against_all_of_f_star(minimal: Any, shallow: Result) -> None:
    first, *_, last = shallow.sizes
    assert (first.selection, first.test.value, first.tuning.value) == (1.0, 1.0, 1.0)
    # One harm feature alone does nothing but on its own category, which is one of four.
    assert last.size == 1
    assert 0 < last.selection < 0.5
    assert 0 < last.test.value < 0.5
    assert last.tuning.value < 0.8
    assert [row.selection for row in shallow.sizes] == sorted((r.selection for r in shallow.sizes), reverse=True)
    # F* takes all that the direction takes, and the last refusal feature lies along it.
    assert minimal[0].of_direction.value == pytest.approx(1.0, abs=0.15)
    assert 0.2 < minimal[0].features[0].cosine < 0.7


def test_harm_features_are_needed_but_do_not_restore_refusal(shallow: Result) -> None:
    assert certificate(shallow, "necessity").rate.value == 1.0
    assert certificate(shallow, "sufficiency").rate.value == 0.0
    assert certificate(shallow, "sufficiency", "the rest of F*").rate.value == 1.0


def test_the_dormant_feature_wakes_when_refusal_is_suppressed_before_it(minimal: Any, files: Any) -> None:
    result: Result = minimal[0]
    (backup,) = files.truth.truth.redundant
    assert [(row.feature, row.layer, row.wakers) for row in result.dormant] == [
        (backup, 1, (refuse(files, 1),)),
        (backup, 2, (refuse(files, 2),)),
    ]
    for row in result.dormant:
        assert (row.clean.value, row.awake.value, row.alone.value) == (0.0, 1.0, 0.0)
        # 6 · (h/2 − ¾), with h = 4 in a prompt of three content words.
        assert row.effect.value == pytest.approx(7.5, abs=0.5)


def test_interactions_are_those_of_the_circuit(shallow: Result, files: Any) -> None:
    known = {frozenset((row.first, row.second)): row.interaction for row in shallow.pairs}
    # Suppressing either of two `refuse` in a row does the same: both together no more than one, which is 1½ nats.
    both = known[frozenset((refuse(files, 1), refuse(files, 2)))]
    assert both.value == pytest.approx(-1.5, abs=0.05)
    assert both.high < 0
    assert shallow.pairs_tested == 55
    # Harm features of different categories never meet on one prompt.
    (one, _), (two, _), *_ = files.truth.harm_of.values()
    assert abs(getattr(known.get(frozenset((one, two))), "value", 0.0)) < 1e-3


def test_the_same_command_again_computes_nothing(minimal: Any, files: Any) -> None:
    result, out = minimal
    calls: list[tuple[str, int, int]] = []
    again = files.study(out, "minimal", lambda *call: calls.append(call))
    assert again.model_copy(update={"seconds": {}}) == result.model_copy(update={"seconds": {}})
    assert not [what for what, _, _ in calls if what.startswith(("test", "tuning", "necessity", "greedy"))]


def test_sections_say_what_was_found_and_what_would_refute_it(minimal: Any) -> None:
    page = minimal[0].page()
    assert page.verdicts[0].startswith("The minimal set holds 1 of the 11 features of F*")
    assert [section.title for section in page.sections] == [
        "Minimal set", "Certificate", "How the set was found", "Redundancy", "Interactions", "Doubts",
    ]  # fmt: skip
    assert all(section.intro for section in page.sections if section.title != "Doubts")
    assert minimal[0].chart("Effect on the way down") is not None


@pytest.mark.parametrize(("option", "value"), [("target", 0), ("target", 1.1), ("factor", 1)])
def test_a_target_or_factor_that_makes_no_sense_is_named(files: Any, tmp_path: Path, option: str, value: float) -> None:
    with pytest.raises(InputError, match=option):
        files.study(tmp_path / "run", "minimal", **{option: value})


def test_a_factor_that_changes_nothing_leaves_nothing_to_reduce(files: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not lower the refusal log-odds"):
        files.study(tmp_path / "run", "minimal", factor=1 - 1e-12)


@pytest.fixture(scope="module")
def screened(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Too few pairs are allowed to test each: a factorisation machine names those that are tested."""
    return files.study(tmp_path_factory.mktemp("run") / "screened", "minimal", max_pairs=30, fm_draws=250)


def test_a_machine_finds_the_pair_of_which_one_covers_for_the_other(screened: Result, files: Any) -> None:
    (backup,) = files.truth.truth.redundant
    found = screened.screening
    assert found is not None
    # F* and the dormant feature, each alone and the random parts.
    assert (found.features, found.draws) == (12, 262)
    # The backup does nothing alone, and wakes where `refuse` is suppressed in layer 1 or 2: its pairs are known.
    with_backup = {row.first: row for row in screened.pairs if row.second == backup}
    for layer in (1, 2):
        row = with_backup[refuse(files, layer)]
        assert row.interaction.value == pytest.approx(7.5, abs=0.5)
        assert row.estimate is not None
        assert row.estimate > 2
    strongest = sorted(screened.pairs, key=lambda row: -abs(row.estimate or 0))[:4]
    assert {backup} <= {feature for row in strongest for feature in (row.first, row.second)}
    assert found.gain.low > 0
    assert found.same_sign.value > 0.5


@pytest.mark.slow
def test_a_machine_agrees_with_exact_pairs_where_both_are_known(files: Any, tmp_path: Path) -> None:
    """Without layer 3 the minimal set is the eight harm features, whose 28 pairs are tested exactly as well."""
    found = files.study(tmp_path / "run", "minimal", layers="0-2", target=0.99, max_pairs=30, fm_draws=250)
    assert found.screening is not None
    assert found.screening.pairs == 28
    # All but the pairs of one category are 0, and so tied, whatever order the machine gives them.
    assert found.screening.spearman.value > 0.4
    assert found.pairs_tested >= 28
    estimates = {frozenset((row.first, row.second)): row.estimate for row in found.pairs}
    categories = set(files.truth.harm_of.values())
    within = [e for pair, e in estimates.items() if pair in categories]
    across = [e for pair, e in estimates.items() if pair <= files.truth.truth.harm and pair not in categories]
    assert sorted(within)[2] < -0.5
    assert min(across) > -0.2


def test_few_pairs_need_no_machine(minimal: Any) -> None:
    result: Result = minimal[0]
    assert result.screening is None
    assert {row.estimate for row in result.pairs} == {None}


def test_what_the_result_holds_is_on_its_page(minimal: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(minimal[0]) == {"DormantRow.wakers"}
