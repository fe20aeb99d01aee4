"""Values that carry prompts and answers."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from demur.errors import InputError
from demur.types import Answer, Answers, Prompt, PromptSet, as_prompts

HARMFUL = Prompt(id="h", text="Pick a <lock>?", label="harmful")
HARMLESS = Prompt(id="b", text="Bake bread?", label="harmless")
ANSWERS = Answers(
    [
        Answer(prompt=HARMFUL, text="I will <not>.", intervention="none"),
        Answer(prompt=HARMLESS, text="Mix flour.", intervention="scale(0)@1", finished=False),
    ]
)


def test_a_sets_digest_says_ids_and_texts() -> None:
    def digest(*prompts: tuple[str, str]) -> str:
        return PromptSet(name="x", prompts=tuple(Prompt(id=i, text=t) for i, t in prompts)).digest

    sets = [
        (("a", "x"),),
        (("a", "y"),),
        (("b", "x"),),
        (("a", "x"), ("b", "y")),
        (("b", "y"), ("a", "x")),
        (("ax", ""),),
    ]
    assert len({digest(*each) for each in sets}) == len(sets)
    assert digest(("a", "x")) == PromptSet(name="other", prompts=(Prompt(id="a", text="x"),)).digest


def test_texts_become_prompts_named_by_their_place() -> None:
    assert as_prompts(["x", HARMFUL]) == (Prompt(id="0", text="x"), HARMFUL)
    assert as_prompts("one text") == (Prompt(id="0", text="one text"),)
    with pytest.raises(InputError, match="two prompts have the id 'h'"):
        as_prompts([HARMFUL, HARMFUL])


def test_answers_are_a_sequence_with_their_prompts() -> None:
    assert ANSWERS.texts == ("I will <not>.", "Mix flour.")
    assert ANSWERS.prompts == (HARMFUL, HARMLESS)
    assert len(ANSWERS) == 2
    assert ANSWERS[0].prompt is HARMFUL
    assert Answers(list(ANSWERS)) == ANSWERS


def test_a_notebook_hides_what_may_be_harmful() -> None:
    html = ANSWERS._repr_html_()
    harmful, harmless = html.split("<tr>")[2:]
    assert "<details>" in harmful
    assert harmful.index("<summary>") < harmful.index("I will &lt;not&gt;.")
    assert "<details>" not in harmless
    assert "Pick a &lt;lock&gt;?" in html
    assert "<details>" in Answers([Answer(prompt=Prompt(id="0", text="?"), text="!")])._repr_html_()


def test_a_frame_has_one_row_per_answer() -> None:
    pandas = pytest.importorskip("pandas")
    frame = ANSWERS.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["id", "prompt", "label", "intervention", "answer", "finished", "stopped"]
    assert frame.iloc[1].tolist() == ["b", "Bake bread?", "harmless", "scale(0)@1", "Mix flour.", False, False]


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install pandas"):
        ANSWERS.to_frame()
