"""The study of checkpoints on the planted model and variants whose change was written into the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoint_variants import save_variant

from demur.errors import InputError, ModelError
from demur.model import ChatModel
from demur.studies.checkpoints import PairRows, Result

Compare = Callable[..., Result]


@pytest.fixture(scope="module", name="compare")
def compared(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """Compare two of the planted model ("planted") and its variants, by name; in one run folder, so that each is
    searched once."""
    folder, done = tmp_path_factory.mktemp("checkpoints"), dict[Any, Result]()

    def path(name: str) -> str:
        if name == "planted":
            return str(files.folder / "model")
        return str(folder / name if (folder / name).is_dir() else save_variant(name, folder))

    def run(after: str, *before: str, **options: Any) -> Result:
        options = {"n": "8,6,6,12"} | options
        key = (after, before, *sorted(options.items()))
        if key not in done:
            small = files.small(n="8,6,6,12", random_sets=2, n_answers=0, n_alone=2, direction_layer=2) | options
            small |= {"model": path(after), "before": tuple(map(path, before)), "k0": 6}
            done[key] = cast("Result", files.study(folder / "run", "checkpoints", **small))
        return done[key]

    return run


def only(result: Result) -> PairRows:
    (pair,) = result.pairs
    return pair


@pytest.mark.parametrize(
    ("after", "before", "kind", "new_too"),
    [
        ("same", "planted", "no change", False),
        ("amplified", "planted", "amplified", False),
        ("hidden", "planted", "hidden", False),
        pytest.param("hidden_and_new", "planted", "hidden", True, marks=pytest.mark.slow),
        ("new", "planted", "new mechanism", False),
        pytest.param("removed", "planted", "removed", False, marks=pytest.mark.slow),
    ],
)
def test_the_planted_change_is_called_what_it_is(
    compare: Compare, after: str, before: str, kind: str, new_too: bool
) -> None:
    # That behaviour is the same within the margin takes more prompts than that it is not.
    found = only(compare(after, before, n="8,6,6,40" if kind == "no change" else "8,6,6,12")).verdict
    assert (found.kind, found.new_too) == (kind, new_too)


def test_drives_and_firing_are_those_that_were_planted(compare: Compare, files: Any) -> None:
    truth = files.truth.truth
    louder = only(compare("amplified", "planted"))
    # The readout is half as strong again: refusal features are read through it alone.
    assert louder.mechanisms["before"].carried.value == pytest.approx(1.5, rel=0.02)
    assert set(louder.mechanisms["before"].features) == truth.refusal
    assert louder.mechanisms["before"].fires.value == pytest.approx(1, abs=0.01)
    hidden = only(compare("hidden", "planted"))
    assert "after" not in hidden.mechanisms
    assert hidden.mechanisms["before"].carried.value == pytest.approx(0, abs=0.01)
    assert hidden.mechanisms["before"].fires.value == pytest.approx(1, abs=0.01)
    assert only(compare("new", "planted")).mechanisms["before"].fires.value == pytest.approx(0, abs=0.01)


def test_features_are_gained_and_lost(compare: Compare, files: Any) -> None:
    truth, rows = files.truth.truth, only(compare("new", "planted")).features
    status = {row.feature: row for row in rows}
    assert all(status[f].status == "lost" for f in truth.refusal if f in status)
    assert any(row.status == "lost" for row in rows)
    gained = [row for row in rows if row.feature in truth.aligned_inert]
    assert gained
    for row in gained:
        assert row.status == "gained"
        # It fired before, and nothing read it.
        assert row.active_before == pytest.approx(row.active_after, rel=0.01)
        assert row.alone_before.value == pytest.approx(0, abs=0.01)
    assert max(row.alone_after.value for row in gained) > 1
    lost = next(row for row in rows if row.status == "lost" and row.feature in truth.refusal)
    assert lost.active_before > 1 > lost.active_after


def test_behaviour_directions_and_probes(compare: Compare) -> None:
    pair = only(compare("hidden", "planted"))
    rows = {row.prompts: row for row in pair.behaviour}
    assert (rows["harmful"].before.value, rows["harmful"].after.value) == (1, 0)
    assert rows["harmful"].difference.value == -1
    assert rows["harmful"].p < 0.001
    assert rows["harmless"].difference.value == 0
    knowing = {row.prompts: row for row in pair.knowing}
    # It still knows what is harmful; it does not refuse it any more.
    assert abs(knowing["harmful"].harmful_change.value) < 0.1
    assert knowing["harmful"].refuse_change.value < -0.8
    assert (knowing["harmful"].ignored_before.value, knowing["harmful"].ignored_after.value) == (0, 1)
    same = only(compare("same", "planted", n="8,6,6,40"))
    # The louder distractor is a part of the directions from layer 1 on; layer 0 writes nothing at the last token.
    assert len(same.cosines) == 4
    assert all(row.cosine.value > 0.8 for row in same.cosines[1:])
    assert only(compare("new", "planted")).cosines[3].cosine.value < same.cosines[3].cosine.value


def test_answers_under_the_features_of_each(compare: Compare) -> None:
    pair = only(compare("planted", "hidden", n_answers=6, factor=-1))
    rows = {(row.kind, row.checkpoint): row for row in pair.answers}
    assert (rows["suppress", "after"].clean.value, rows["suppress", "after"].changed.value) == (1, 0)
    assert (rows["induce", "after"].clean.value, rows["induce", "after"].changed.value) == (0, 1)
    assert rows["induce", "after"].random.value == 0
    # Nothing reads them there.
    assert rows["induce", "before"].changed.value == 0


def test_several_checkpoints_and_the_page(compare: Compare) -> None:
    result = compare("planted", "hidden", "amplified")
    assert [pair.verdict.kind for pair in result.pairs] == ["new mechanism", "weakened"]
    assert any("hidden has no F*" in warning for warning in result.warnings)
    page = result.page()
    assert [text.split(": ")[1] for text in page.verdicts] == ["new mechanism", "weakened"]
    drawn = [block for section in page.sections for block in section.blocks if hasattr(block, "draw")]
    assert drawn
    assert all(block.draw() is not None for block in drawn)  # pyright: ignore


def test_inputs_that_do_not_fit_are_named(files: Any, tmp_path: Path) -> None:
    def run(**options: Any) -> None:
        files.study(tmp_path / "run", "checkpoints", **files.small(**options))

    with pytest.raises(InputError, match="name one with --before"):
        run()
    other = tmp_path / "other"
    other.mkdir()
    config = (files.folder / "model" / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
    (other / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"no checkpoint of .* hidden_size 32, not 64"):
        run(before=str(other))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"LoRA adapter.*merge_and_unload"):
        run(before=str(adapter))


def test_a_checkpoint_without_a_template_reads_prompts_as_the_model_does(files: Any, tmp_path: Path) -> None:
    folder = save_variant("same", tmp_path)
    for path in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        path.unlink()
    model = ChatModel.load(files.folder / "model", device="cpu")
    before = ChatModel.load(folder, device="cpu", tokenizer=model.tokenizer)
    assert before.tokenize(["hello"])[0].ids == model.tokenize(["hello"])[0].ids
