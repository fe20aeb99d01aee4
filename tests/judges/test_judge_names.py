"""Judges by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from demur.errors import InputError
from demur.judges import (
    JUDGES,
    ClassifierJudge,
    Endpoint,
    HarmBenchJudge,
    Judge,
    LlamaGuard4Judge,
    LlamaGuardJudge,
    LLMJudge,
    PatternJudge,
    Placement,
    RefusalJudge,
    StrongRejectJudge,
    WildGuardJudge,
    get_judge,
)
from demur.types import Verdict


@pytest.mark.parametrize(
    ("name", "cls", "source"),
    [
        ("harmbench", HarmBenchJudge, "cais/HarmBench-Llama-2-13b-cls"),
        ("harmbench=cais/HarmBench-Mistral-7b-val-cls", HarmBenchJudge, "cais/HarmBench-Mistral-7b-val-cls"),
        ("harmbench=/models/a=b", HarmBenchJudge, "/models/a=b"),
        ("wildguard", WildGuardJudge, "allenai/wildguard"),
        ("llama-guard-3", LlamaGuardJudge, "meta-llama/Llama-Guard-3-8B"),
        ("llama-guard-3=meta-llama/Llama-Guard-3-1B", LlamaGuardJudge, "meta-llama/Llama-Guard-3-1B"),
        ("llama-guard-4", LlamaGuard4Judge, "meta-llama/Llama-Guard-4-12B"),
    ],
)
def test_judges_that_run_here(name: str, cls: type[ClassifierJudge], source: str) -> None:
    judge = get_judge(name, placement=Placement(dtype="bfloat16"))
    assert type(judge) is cls
    assert isinstance(judge, ClassifierJudge)
    assert (judge.source, judge.placement.dtype) == (source, "bfloat16")
    assert judge.name == (name if "=" not in name else f"{cls.kind}={source.rsplit('/', 1)[-1]}")


@pytest.mark.parametrize(("kind", "cls"), [("strongreject", StrongRejectJudge), ("refusal", RefusalJudge)])
def test_judges_behind_an_endpoint(kind: str, cls: type[LLMJudge]) -> None:
    judge = get_judge(f"{kind}=org/model:tag", endpoint=Endpoint(url="http://localhost:1/v1"))
    assert type(judge) is cls
    assert isinstance(judge, LLMJudge)
    assert (judge.name, judge.model) == (f"{kind}=org/model:tag", "org/model:tag")
    assert judge.endpoint.base == "http://localhost:1/v1"


def test_every_kind_in_the_table_says_what_its_judge_gives() -> None:
    for name, kind in JUDGES.items():
        judge = get_judge(name if kind.needs != "endpoint" else f"{name}=m")
        assert isinstance(judge, kind.make if isinstance(kind.make, type) else object)
        assert kind.gives == getattr(judge, "gives", None)
        assert judge.name.startswith(name)
    assert isinstance(get_judge("patterns"), PatternJudge)


def test_what_is_a_judge_is_told_without_running_its_identity() -> None:
    class Costly:
        def __init__(self) -> None:
            self.name = "costly"

        @property
        def identity(self) -> dict[str, str]:
            raise AssertionError("read")

        def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
            return [Verdict(outcome=None, judge=p + r) for p, r in zip(prompts, responses, strict=True)]

    assert isinstance(Costly(), Judge)
    assert not isinstance(object(), Judge)
    assert not isinstance(JUDGES, Judge)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("harmbnch=/models/x", {}, r"unknown judge 'harmbnch' \(nearest: 'harmbench'\); the judges are 'patterns', "),
        ("llama-guard", {}, r"unknown judge 'llama-guard' \(nearest: 'llama-guard-3'\)|nearest: 'llama-guard-4'"),
        ("", {}, r"unknown judge ''"),
        ("harmbench=", {}, r"'harmbench=' names no model after '='"),
        ("patterns=x", {}, r"'patterns' takes no model; leave out '=x'"),
        ("strongreject", {}, r"'strongreject' needs a model: strongreject=MODEL, for example strongreject=gpt-4o-mini"),
        ("patterns", {"endpoint": Endpoint()}, r"'patterns' asks no endpoint"),
        ("harmbench", {"endpoint": Endpoint()}, r"'harmbench' asks no endpoint"),
        ("refusal=m", {"placement": Placement()}, r"'refusal' has no model that runs here"),
    ],
)
def test_what_cannot_be_meant_is_named(name: str, options: dict[str, Endpoint | Placement], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_judge(name, **options)  # pyright: ignore[reportArgumentType]
