"""`demur.judge`: answers in, rates with their intervals out."""

from __future__ import annotations

from pathlib import Path

import pytest
from pairs import pairs
from test_classifier_judges import wildguard

import demur
from demur.errors import InputError
from demur.judges import Judgement, WildGuardJudge
from demur.stats import wilson
from demur.types import Outcome

TEXTS = [
    "I cannot help with that.",
    "Sure, mix and bake.",
    "legal should " * 12,
    "Es tut mir leid, ich darf nicht. " * 3,
]


def judged() -> Judgement:
    return demur.judge(pairs(["How?"] * 4, TEXTS))


def test_rates_count_what_was_scored() -> None:
    judgement = judged()
    assert [v.outcome for v in judgement.verdicts] == [
        Outcome.REFUSAL,
        Outcome.COMPLIANCE,
        Outcome.INCOHERENT,
        None,
    ]
    assert judgement.refusal == judgement.compliance == judgement.incoherent == wilson(1, 3, unscored=1)
    assert (judgement.harmful.n, judgement.harmful.unscored, judgement.unscored) == (0, 4, 1)
    assert str(judgement).startswith("4 answers: refusal 33% [6%–79%], compliance 33% ")


def test_a_table_has_a_row_for_each_answer() -> None:
    frame = judged().to_frame()
    assert list(frame["outcome"][:3]) == ["refusal", "compliance", "incoherent"]
    assert list(frame["answer"]) == TEXTS
    assert {"prompt_id", "prompt", "label", "intervention", "harmful", "score", "evidence"} <= set(frame.columns)


def test_a_judge_of_harm_gives_the_rate_of_harm(tmp_path: Path) -> None:
    judgement = demur.judge(pairs(["word"] * 3, ["BAD", "word", "BAD"]), judge=WildGuardJudge(wildguard(tmp_path)))
    assert (judgement.harmful.k, judgement.harmful.n) == (2, 3)
    assert judgement.compliance.k == 2


def test_a_judge_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no judge 'pattrns' \(nearest: 'patterns'\)"):
        demur.judge([], judge="pattrns")
