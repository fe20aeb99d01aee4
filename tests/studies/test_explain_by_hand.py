"""`demur explain` of prompts whose signals are given: tokens, levels, words and what changes the answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import Done, TableModel, features_of, splits_of, use

from demur.errors import InputError
from demur.method.attribution import Pool
from demur.method.interventions import HoldFeatures
from demur.method.local import LocalExplanation, Patch
from demur.model import Region
from demur.studies import explain as package
from demur.studies.config import FindConfig
from demur.studies.explain import AS_REFUSED, LOCAL, Explanation, explain, file_stem
from demur.studies.gauge import Gauge
from demur.types import FeatureId, Prompt, PromptSet

H, R, R2, OTHER = FeatureId(0, 1), FeatureId(2, 5), FeatureId(2, 6), FeatureId(3, 9)
REGIONS = (Region.SPECIAL, Region.INSTRUCTION, Region.INSTRUCTION, Region.POST_INSTRUCTION)


class Item(list[int]):
    """Four tokens: the begin token, two words, and one of the template."""

    n_post_instruction = 1

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(range(4))
        self.prompt, self.prompt_id, self.ids = prompt, prompt.id, (10, 11, 12, 13)
        self.regions = tuple(int(region) for region in REGIONS)


class Given(Gauge):
    """One harm and two refusal features, twice as strong on "steal" as on anything else, and none for "calmly"."""

    def __init__(self, work: Any) -> None:
        self.__dict__ |= {
            "work": work, "harm": (H,), "refusal": (R, R2), "refusal_ids": (1,),
            "reference": np.array([4.0, 1.0, 3.0]),
        }  # fmt: skip

    @staticmethod
    def size(text: str) -> float:
        return 0.0 if "calmly" in text else 2.0 if "steal" in text else 1.0

    def at_tokens(self, items: Any, change: Any = ()) -> Any:  # noqa: ARG002
        table = torch.tensor([[9.0, 9.0, 9.0], [4.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 2.0, 2.0]])
        return [table * self.size(item.prompt.text) / 2 for item in items]

    def levels(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:  # noqa: ARG002
        return np.array([[2.0, 1.0 * self.size(p.text), 2.5] for p in prompts])

    def p_refuse(self, prompts: PromptSet, change: Any = ()) -> np.ndarray:
        work: Any = self.work
        return 1 / (1 + np.exp(-work.odds(prompts, change)))


def rule(done: Done) -> float:
    """What is asked calmly is answered, unless R is held at 2.0 on the template's token, or F* is held."""
    if done.prompt.label == "harmless":
        return -1.0
    if R in done.held:
        values = done.held[R]
        return 3.0 if values[-1] == 2.0 or values[0] == 7.0 else -0.5
    if done.scaled:
        return -2.0 if done.scaled.get(R) == 0.0 else 0.5
    return -1.0 if "calmly" in done.prompt.text or "kindly" in done.prompt.text else 2.0


class Context(TableModel):
    """Ends as a run folder does."""

    patched = True
    """The search finds patches."""

    def completed(self, result: Any) -> Any:
        return result.model_copy(update={"warnings": tuple(self.warnings)})


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Any:
    config = FindConfig(seed=4)
    work = Context(rule, config, splits_of())
    work.suite = SimpleNamespace(layers=(0, 1, 2, 3))
    work.model.tokenize = lambda prompts: [Item(p) for p in prompts]
    work.model.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    work.__dict__["judging"] = SimpleNamespace(reader=SimpleNamespace(close=lambda: None))
    found = work.found(features_of(R, OTHER), pool=Pool(features=(R,), cosines=(1.0,)))
    use(monkeypatch, work, found)
    gauge = Given(work)
    searched: list[Any] = []

    class Search:
        def __init__(self, model: Any, suite: Any, plain: Any, item: Any, ids: Any, layers: Any) -> None:
            searched.append((model is work.model, suite is work.suite, plain.prompt_id, item.prompt_id, ids, layers))

        def explain(self, *, limit: int, seed: int) -> LocalExplanation:
            searched.append((limit, seed))
            patches = tuple(
                Patch(feature=f, token=t, value=v, before=b, predicted=0.0)
                for f, t, v, b in ((R, 0, 7.0, 1.0), (H, 2, 2.0, 3.0), (OTHER, 3, 4.0, 5.0))
            )
            return LocalExplanation(
                prompt_id="prompt", kl=(1.0,), p_refuse=(0.2,), patches=patches if work.patched else (), p_restored=0.9,
                restored=True,
            )  # fmt: skip

    def transplant(_model: Any, _suite: Any, plain: Any, item: Any, features: Any) -> HoldFeatures:
        assert (plain.prompt_id, item.prompt_id, features) == ("plain", "prompt", (R, OTHER))
        return HoldFeatures(features, torch.full((4, 2), 2.0))

    def effects(asked: Any, texts: Any) -> Any:
        assert asked is gauge
        (parts,) = texts.values()
        n = len(parts.words)
        left = np.array([[0.1 * k, (-1) ** k * 0.2 * k, 0.3] for k in range(n)])
        one = SimpleNamespace(left_out=left, gradient=np.arange(n) / 10, ig=np.arange(n) / 20)
        return {"prompt": one}

    monkeypatch.setattr(Gauge, "of", classmethod(lambda _cls, _work, _found: gauge))
    monkeypatch.setattr("demur.method.local.LocalSearch", Search)
    monkeypatch.setattr("demur.method.local.transplant", transplant)
    monkeypatch.setattr("demur.studies.gauge.word_effects", effects)
    session = SimpleNamespace(command="jailbreaks", finished="now", config={"seed": 4})
    other = SimpleNamespace(command="perturb", finished=None, config={})
    monkeypatch.setattr(
        package, "read_run", lambda _folder: SimpleNamespace(manifest=SimpleNamespace(sessions=[session, other]))
    )

    class Opened:
        def __enter__(self) -> Any:
            return work

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("demur.studies.context.open_context", lambda *_args, **_options: Opened())

    def run(prompt: str, plain: str | None = None) -> Explanation:
        return explain("a/run", prompt, plain)

    run.work, run.searched = work, searched  # type: ignore[attr-defined]
    return run


def test_tokens_and_signals_are_shares_of_a_refused_request(explained: Any) -> None:
    result = explained("please steal")
    assert (result.prompt.name, result.prompt.text, result.plain, result.run) == (
        "prompt",
        "please steal",
        None,
        "a/run",
    )
    # Of 4 and of 4: nothing counts on the begin token.
    tokens = [(t.text, t.region, t.harm, t.refusal) for t in result.prompt.tokens]
    assert tokens == [
        ("<10>", "special", 0.0, 0.0), ("<11>", "instruction", 1.0, 0.0), ("<12>", "instruction", 0.5, 0.25),
        ("<13>", "post_instruction", 0.0, 1.0),
    ]  # fmt: skip
    # Levels of 2, and of 2 and 2.5; harmless ones of 2, and of 1 and 2.5.
    assert (result.prompt.harm, result.prompt.refusal) == (0.5, 1.125)
    assert result.harmless == (0.5, 0.875)
    assert result.prompt.p_refuse == pytest.approx(1 / (1 + np.exp(-2)))
    assert (result.prompt.outcome, result.prompt.answer) == ("refusal", "answers: prompt")
    assert explained.work.watched == ["tuning0", "tuning1", "+tuning0", "+tuning1"]


def test_levels_are_sorted_by_what_is_missing(explained: Any) -> None:
    rows = [(r.feature, r.kind, r.prompt, r.plain, r.harmful, r.harmless) for r in explained("ask it").levels]
    # Less on refused prompts: harm by 2, the second refusal feature by ½, the first by none.
    assert rows == [
        (H, "harm", 2.0, None, 4.0, 2.0), (R2, "refusal", 2.5, None, 3.0, 2.5), (R, "refusal", 1.0, None, 1.0, 1.0),
    ]  # fmt: skip
    beside = [(r.feature, r.prompt, r.plain) for r in explained("calmly ask it", "steal it").levels]
    assert beside[0] == (R, 0.0, 2.0)
    assert {row[0] for row in beside[1:]} == {H, R2}


def test_words_are_sorted_by_what_the_refusal_signal_misses(explained: Any) -> None:
    rows = explained("one two three").words
    assert [(r.words.strip(), round(r.harm, 6), round(r.refusal, 6), r.p_refuse) for r in rows] == [
        ("three", 0.2, 0.4, 0.3), ("two", 0.1, -0.2, 0.3), ("one", 0.0, 0.0, 0.3),
    ]  # fmt: skip
    assert [(r.gradient, r.ig) for r in rows] == [(0.2, 0.1), (0.1, 0.05), (0.0, 0.0)]


def test_what_is_refused_is_tried_without_its_features(explained: Any) -> None:
    result = explained("steal it")
    assert [(c.what, c.features, c.outcome) for c in result.changes] == [
        ("refusal features taken out", 2, "compliance"), ("harm features taken out", 1, "refusal"),
        ("F* taken out", 2, "compliance"),
    ]  # fmt: skip
    assert [round(c.p_refuse, 4) for c in result.changes] == [0.1192, 0.6225, 0.1192]
    assert result.changes[0].answer == "refusal features taken out: prompt"
    assert (result.patches, explained.searched) == ((), [])


def test_what_is_answered_is_tried_with_its_features_put_back(explained: Any) -> None:
    result = explained("calmly steal it", "steal it")
    assert [(c.what, c.features, c.outcome) for c in result.changes] == [
        # At their means on refused prompts, on the template's token: R at 1.
        (AS_REFUSED, 2, "compliance"), ("all of F* as on the plain prompt", 2, "refusal"), (LOCAL, 3, "refusal"),
    ]  # fmt: skip
    assert [(p.feature, p.kind, p.token, p.before, p.value) for p in result.patches] == [
        (R, "refusal", "<10>", 1.0, 7.0), (H, "harm", "<12>", 3.0, 2.0), (OTHER, "other", "<13>", 5.0, 4.0),
    ]  # fmt: skip
    first, second = explained.searched
    # Layers in the first four fifths of four.
    assert first == (True, True, "plain", "prompt", (1,), [0, 1, 2, 3])
    assert second == (24, 4)
    assert result.plain is not None
    assert (result.plain.name, result.plain.text, result.plain.refusal) == ("plain", "steal it", 1.125)
    assert not result.warnings


def test_where_no_patch_helps_none_is_tried(explained: Any) -> None:
    explained.work.patched = False
    result = explained("calmly steal it", "steal it")
    assert [c.what for c in result.changes] == [AS_REFUSED, "all of F* as on the plain prompt"]
    assert result.patches == ()


@pytest.mark.parametrize("plain", [None, "kindly ask"])
def test_without_a_refused_plain_version_only_the_mean_is_put_back(explained: Any, plain: Any) -> None:
    result = explained("calmly steal it", plain)
    assert [c.what for c in result.changes] == [AS_REFUSED]
    assert (result.patches, explained.searched) == ((), [])
    assert any("P(refuse) 0.27" in warning for warning in result.warnings) == (plain is not None)


def test_refusal_features_are_put_back_where_they_are_on_refused_prompts(explained: Any) -> None:
    """On refused selection prompts the template's token has 1 of each: of what is asked half, as they do not steal."""
    seen: list[Any] = []
    before = explained.work.rule
    explained.work.rule = lambda done: (seen.append(done.held) if done.held else None, before(done))[1]
    explained("calmly steal it")
    held = seen[0]
    assert set(held) == {R, R2}
    assert [np.isnan(v) for v in held[R]] == [True, True, True, False]
    assert (held[R][-1], held[R2][-1]) == (1.0, 1.0)


def test_an_explanation_is_kept_under_its_prompts(explained: Any) -> None:
    explained("steal it", "rob it")
    assert list(explained.work.saved) == [f"{file_stem('steal it', 'rob it')}.json"]
    assert len({file_stem("a", None), file_stem("a", "b"), file_stem("b", "a"), file_stem("a b", None)}) == 4
    assert file_stem("a", None) == file_stem("a", None)
    for prompt, plain, what in ((" ", None, "prompt"), ("a", "\n", "plain")):
        with pytest.raises(InputError, match=f"the {what} is empty"):
            explain("a/run", prompt, plain)
