"""Categories of harm on the planted model, where every category's features and every feature's role are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from page_parts import about, unshown

from demur.errors import InputError
from demur.method.interventions import PerPrompt, ScaleFeatures, bind
from demur.model import ChatModel
from demur.studies import STUDIES
from demur.studies.categories import CategoriesResult
from demur.studies.categories.causes import find_causes
from demur.studies.categories.parts import split_sets
from demur.studies.config import load_config
from demur.studies.context import open_context
from demur.studies.pipeline import find
from demur.studies.results import Knowledge
from demur.studies.side_effects import SideEffectMeter
from demur.types import FeatureId, FeatureSet, PromptSet

OPTIONS: dict[str, Any] = {"n": "16,16,8,20", "k": 5, "suppress": "-3", "min_prompts": 2, "n_exact": 0}


def with_categories(files: Any, folder: Path) -> dict[str, Any]:
    """The planted prompts with their categories."""
    path = folder / "kinds.jsonl"
    path.write_text("".join(prompt.model_dump_json() + "\n" for prompt in files.truth.harmful), encoding="utf-8")
    return {**OPTIONS, "harmful": str(path)}


@pytest.fixture(scope="module")
def studied(files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[CategoriesResult, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("categories")
    options = with_categories(files, folder)
    return files.study(folder / "run", "categories", **options), folder / "run", options


def test_each_category_has_its_own_harm_features_and_the_refusal_features(studied: Any, files: Any) -> None:
    result, truth = studied[0], files.truth
    assert [each.category for each in result.categories] == sorted(truth.harm_of)
    for each in result.categories:
        assert set(each.features.features) == truth.harm_of[each.category] | truth.truth.refusal
        assert set(each.specific) == truth.harm_of[each.category]
    assert set(result.common) == truth.truth.refusal
    shares = {use.feature: use.share for use in result.uses}
    assert shares == dict.fromkeys(truth.truth.refusal, 1.0) | dict.fromkeys(truth.truth.harm, 0.25)
    for use in result.uses:  # Truth table, for prompts of three content words; some have two or four.
        for kind, score in use.scores.items():
            expected = 6.0 if use.feature in truth.truth.harm else 9.0 if use.feature.layer == 3 else 1.5
            assert score == pytest.approx(expected, rel=0.15), (use.feature, kind)


def test_common_features_act_alone_and_specific_ones_through_them(studied: Any) -> None:
    result = studied[0]
    expected = {
        ("whole", "free"): 1.0,
        ("common", "free"): 1.0,
        ("common", "held"): 1.0,
        ("common", "held on"): 1.0,
        ("specific", "free"): 1.0,
        ("specific", "held"): 0.0,
        ("specific", "held on"): 0.0,
    }
    for measure in ("not refused", "compliance"):
        for (part, other), rate in expected.items():
            row = result.part(part, other, measure=measure)
            assert (row.success.value, row.normalised.value) == (rate, rate), (part, other)
            assert row.success.n == sum(each.n_test for each in result.categories)
        for part in ("common", "specific"):
            control = result.part(part, "held", measure=measure, control=True)
            assert (control.sets, control.success.value) == (2, 0.0)


def test_specific_features_work_on_their_own_category_alone(studied: Any) -> None:
    result = studied[0]
    assert len(result.transfers) == 2 * 2 * 16
    for row in result.transfers:
        own = row.source == row.target
        assert row.success.value == (1.0 if own and row.other == "free" else 0.0)
        assert row.shared == (2 if own else 0)
    free = next(test for test in result.tests if test.other == "free")
    assert (free.own.value, free.others.value, free.difference.value) == (1.0, 0.0, 1.0)
    assert free.p < 0.01


def test_every_feature_is_found_to_be_what_it_is(studied: Any, files: Any) -> None:
    causes, truth = studied[0].causes, files.truth.truth
    # Measured on test prompts, not on those that chose the features.
    assert causes.n == sum(each.n_test for each in studied[0].categories)
    assert set(causes.of("harm")) == truth.harm
    assert set(causes.of("refusal")) == set(causes.refusal) == truth.refusal
    assert set(causes.of("redundant")) == truth.redundant
    assert truth.aligned_inert <= set(causes.of("inert"))
    # The harm axes of layers 1 and 2 wake the backup; they are read by nothing else.
    assert set(causes.of("conditional")) <= {feature for feature in truth.echo if feature.layer < 3}
    (backup,) = [row for row in causes.features if row.role == "redundant"]
    assert (backup.alone.value, backup.wakes.value) == (0.0, 1.0)
    assert backup.after.value == pytest.approx(7.5, rel=0.15)  # 6 · clip(h/2 − ¾, 0, 1½) with h = 4
    # On its own category, a harm feature does all that it does.
    alone = {row.feature: row.alone.value for row in causes.features}
    assert all(alone[feature] == pytest.approx(6.0, rel=0.15) for feature in truth.harm)
    assert all(row.upstream == (row.feature in truth.harm) for row in causes.features if row.feature in truth.causal)


def test_judged_harmfulness_is_measured_of_features_that_act(
    studied: Any, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that could say what is harmful, and less so without a feature: by its layer and its index."""
    known = Knowledge(says_harmful=about(0.9), says_harmful_of_harmless=about(0.1), auroc=about(0.9))

    def says(_meter: Any, prompts: PromptSet, change: Any) -> list[float]:
        taken = sum(f.layer + f.index / 100 for each in change for f in each.features)
        return [n - taken for n in range(len(prompts))]

    def measured(auroc: float) -> tuple[CategoriesResult, dict[FeatureId, float]]:
        given = known.model_copy(update={"auroc": about(auroc)})
        monkeypatch.setattr(SideEffectMeter, "knowledge", lambda *_: given)
        monkeypatch.setattr(SideEffectMeter, "says_harmful", says)
        result: CategoriesResult = files.study(studied[1], "categories", **studied[2])
        rows = result.causes.features
        assert all(row.harmfulness is None or row.harmfulness.n == result.causes.n for row in rows)
        return result, {row.feature: row.harmfulness.value for row in rows if row.harmfulness is not None}

    truth = files.truth.truth
    result, falls = measured(0.9)
    assert falls == pytest.approx({f: f.layer + f.index / 100 for f in truth.harm | truth.refusal})
    assert not any("which requests are harmful" in warning for warning in result.warnings)
    # No better than chance, by the lower end of its interval.
    result, falls = measured(0.54)
    assert not falls
    assert any("0.54" in warning for warning in result.warnings)


def test_a_feature_of_some_prompts_only_is_unclear_where_the_interval_holds_nothing(studied: Any, files: Any) -> None:
    """One prompt of eight is of the feature's category: the mean of its effect is 6/8 nats, and may be none."""
    _, out, options = studied
    study, truth = STUDIES["categories"], files.truth
    asked = {k: v for k, v in files.options(**options).items() if k in study.config.model_fields}
    with open_context(study, load_config(None, asked, study.config), out) as context:
        found = find(context, context.splits.choosing)
        choosing = found.clean.used("selection").harmful
        by_kind = {kind: [p for p in truth.harmful if p.category == kind] for kind in truth.harm_of}
        (one, other, *_) = truth.harm_of
        some = PromptSet(name="some", prompts=(by_kind[one][0], *by_kind[other][:7]))
        (feature, *_), (often, *_) = (sorted(truth.harm_of[kind]) for kind in (one, other))
        (inert, *_) = sorted(truth.truth.aligned_inert)
        (refusal, *_) = sorted(f for f in truth.truth.refusal if f.layer == 3)
        rows = find_causes(context, found, choosing, some, (feature, often, inert, refusal), wakers=0).features
    roles = {row.feature: row.role for row in rows}
    assert roles == {feature: "unclear", often: "harm", inert: "inert", refusal: "refusal"}
    (row,) = (row for row in rows if row.feature == feature)
    assert row.alone.value == pytest.approx(6 / 8, rel=0.15)
    assert row.alone.low == 0.0


def test_uses_are_in_the_order_of_how_many_categories_they_serve(studied: Any) -> None:
    places = [(-use.share, -max(use.scores.values())) for use in studied[0].uses]
    assert places == sorted(places)
    assert list(studied[0].common) == [use.feature for use in studied[0].uses if use.share == 1.0]


def test_the_same_command_again_computes_nothing(studied: Any, files: Any) -> None:
    result, out, options = studied
    stages = sorted((out / "stages").iterdir())
    again = files.study(out, "categories", **options)
    quiet = {"seconds": {}}
    assert again.model_copy(update=quiet).model_dump_json() == result.model_copy(update=quiet).model_dump_json()
    assert sorted((out / "stages").iterdir()) == stages


def test_the_paper_s_sets_come_from_the_pool(files: Any, tmp_path: Path) -> None:
    options = with_categories(files, tmp_path) | {"candidates": "pool", "n": "8,8,4,8"}
    result = files.study(tmp_path / "run", "categories", **options)
    assert all(set(each.features.features) >= files.truth.truth.refusal for each in result.categories)
    assert result.candidates == 40


def test_the_report_shows_matrices_and_says_what_would_refute_it(studied: Any, tmp_path: Path) -> None:
    result = studied[0]
    page = result.page()
    assert [section.title for section in page.sections] == [
        "Verdict", "Features by category", "Parts", "Transfer", "Roles", "Doubts"
    ]  # fmt: skip
    text = result.save_report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("<svg") >= 3
    assert text.count("refuted") >= 3
    for each in result.categories:
        assert each.category in text
    frame = result.to_frame("parts")
    assert {"normalised", "normalised_low", "success_n"} <= set(frame.columns)


def test_prompts_without_categories_are_refused_with_what_to_do(files: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name no category.*--harmful.*column `category`"):
        files.study(tmp_path / "run", "categories", **OPTIONS)


def test_too_few_prompts_of_a_category_are_counted(files: Any, tmp_path: Path) -> None:
    options = with_categories(files, tmp_path) | {"min_prompts": 30}
    with pytest.raises(
        InputError, match=r"of 4 categories, 0 have 30 harmful prompts.*arson \d+ \+ \d+.*--min-prompts"
    ):
        files.study(tmp_path / "run", "categories", **options)


def ids(*numbers: int) -> tuple[FeatureId, ...]:
    return tuple(FeatureId(0, n) for n in numbers)


def as_set(*numbers: int) -> FeatureSet:
    scores = tuple(float(-n) for n in range(len(numbers)))
    return FeatureSet(features=ids(*numbers), scores=scores, scope="global", method="test")


def test_sets_are_parted_as_by_hand() -> None:
    found = split_sets({"a": as_set(1, 9, 2, 3), "b": as_set(9, 4, 1, 5), "c": as_set(1, 4, 9, 6)})
    assert found["intersection"].common == {"a": ids(1, 9), "b": ids(9, 1), "c": ids(1, 9)}
    assert found["intersection"].specific == {"a": ids(2, 3), "b": ids(4, 5), "c": ids(4, 6)}
    assert found["graded"].specific["b"] == ids(4, 5)
    # Nothing is common to all, but 1 serves two of three.
    graded = split_sets({"a": as_set(2, 1), "b": as_set(1, 3), "c": as_set(4, 5)})
    assert set(graded) == {"graded"}
    assert graded["graded"].common == {"a": ids(1), "b": ids(1), "c": ids(4)}
    assert graded["graded"].specific == {"a": ids(2), "b": ids(3), "c": ids(5)}


@pytest.mark.parametrize("tokens", [1, 40, 100, 4096])
def test_per_prompt_sets_stay_with_their_prompts_at_every_batch_size(files: Any, tokens: int) -> None:
    """Every other prompt gets its own category's harm features, the rest another category's: only the first comply."""
    truth = files.truth
    prompts = PromptSet(name="some", prompts=truth.harmful.prompts[:24])
    assert len({len(p.text.split()) for p in prompts}) > 1
    kinds = sorted(truth.harm_of)
    sets: dict[str, Any] = {}
    for n, prompt in enumerate(prompts):
        kind = str(prompt.category) if n % 2 == 0 else kinds[(kinds.index(str(prompt.category)) + 1) % len(kinds)]
        sets[prompt.id] = (ScaleFeatures(tuple(truth.harm_of[kind]), 0.0),)
    model = ChatModel(truth.model, truth.tokenizer, name="planted", max_batch_tokens=tokens)
    with model.intervene(bind(truth.suite, PerPrompt(sets))):
        answers = model.generate(prompts.prompts, max_new_tokens=8)
    found = [answer.text.strip() for answer in answers]
    assert found == [truth.compliance.strip(), truth.refusal.strip()] * 12


def test_the_study_is_registered() -> None:
    assert STUDIES["categories"].result is CategoriesResult


def test_what_the_result_holds_is_on_its_page(studied: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(studied[0]) == {
        "CategoriesResult.candidates",
        "CategoriesResult.common",
        "CategoriesResult.k",
        "CategorySet.specific",
        "Causes.refusal",
        "FeatureRole.feature",
        "FeatureRole.role",
        "FeatureRole.share",
        "FeatureSet.features",
        "FeatureSet.method",
        "FeatureSet.scope",
        "PartRow.sets",
    }
