"""What works without the extra: rows of capability, their paired change, and saying what to install."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from demur.capability import CapabilityRow, capability_change, check_tasks, measure_capability
from demur.errors import InputError
from demur.model import ChatModel
from demur.testing import tiny_model


def row(scores: tuple[float, ...], **changed: Any) -> CapabilityRow:
    values: dict[str, Any] = {
        "task": "pick",
        "metric": "acc",
        "value": sum(scores) / max(1, len(scores)),
        "stderr": None,
        "n": len(scores),
        "shots": 0,
        "higher_is_better": True,
        "version": "1",
        "harness": "0.4.13",
        "digest": "d",
        "intervention": "none",
        "scores": scores,
    }
    return CapabilityRow(**{**values, **changed})


def test_rows_come_back_equal() -> None:
    one = row((1.0, 0.0), stderr=0.5)
    assert CapabilityRow.model_validate_json(one.model_dump_json()) == one


def test_the_change_is_paired() -> None:
    """Differences −1, 0, 0, 0: mean −1/4, spread 1/2, standard error 1/4."""
    found = capability_change(row((1.0, 1.0, 0.0, 1.0)), row((0.0, 1.0, 0.0, 1.0), intervention="scale"))
    half = 1.959963984540054 / 4
    assert (found.value, found.n) == (-0.25, 4)
    assert (found.low, found.high) == pytest.approx((-0.25 - half, -0.25 + half))


def test_one_document_tells_no_interval() -> None:
    found = capability_change(row((1.0,)), row((0.0,)))
    assert (found.value, found.low, found.high) == (-1.0, -math.inf, math.inf)


def test_rows_that_cannot_be_paired_are_named() -> None:
    one = row((1.0, 0.0))
    with pytest.raises(InputError, match=r"pick acc \(none\) cannot be compared with pick acc_norm \(none\)"):
        capability_change(one, row((1.0, 0.0), metric="acc_norm"))
    with pytest.raises(InputError, match="different questions"):
        capability_change(one, row((1.0, 0.0), digest="e"))
    with pytest.raises(InputError, match="no score for each document"):
        capability_change(row((), n=2), row((), n=2))


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    hf, tokenizer = tiny_model("gemma2")
    with pytest.raises(InputError, match=r"pip install 'demur\[eval\]'"):
        measure_capability(ChatModel(hf, tokenizer, name="m"), ["gsm8k"])
    with pytest.raises(InputError, match=r"pip install 'demur\[eval\]'"):
        check_tasks(["gsm8k"])
    check_tasks([])
