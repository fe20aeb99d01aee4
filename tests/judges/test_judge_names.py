"""Judges by name."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pairs import pairs

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
    Placement,
    RefusalJudge,
    StrongRejectJudge,
    WildGuardJudge,
    get_judge,
)
from demur.judges import judge as demur_judge
from demur.types import Answer, Outcome, Verdict


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


def test_every_judge_in_the_registry_can_be_made_and_says_what_it_gives() -> None:
    for kind in JUDGES:
        judge = get_judge(kind if JUDGES[kind].needs != "endpoint" else f"{kind}=m")
        assert type(judge) is JUDGES[kind]
        assert judge.kind == kind
        assert set(judge.gives) <= {"outcome", "harmful", "score"}
        assert judge.costly is (judge.needs != "nothing")
        assert judge.name.startswith(kind)


def test_a_judge_of_ones_own_is_one_class() -> None:
    class Short(Judge):
        """Calls an answer of fewer than five words a refusal."""

        kind = "short"

        def judge(self, answers: Sequence[Answer]) -> list[Verdict]:
            outcome = {True: Outcome.REFUSAL, False: Outcome.COMPLIANCE}
            return [Verdict(outcome=outcome[len(a.text.split()) < 5], judge=self.name) for a in answers]

    JUDGES.register("short", Short)
    judgement = demur_judge(pairs(["a", "b"], ["No.", "Flour, water, salt, and then time."]), judge="short")
    assert (judgement.judge, judgement.refusal.k, judgement.compliance.k, judgement.refusal.n) == ("short", 1, 1, 2)
    assert set(Short().identity) == {"kind", "rules"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("harmbnch=/models/x", {}, r"no judge 'harmbnch' \(nearest: 'harmbench'\); there are patterns, "),
        ("llama-guard", {}, r"no judge 'llama-guard' \(nearest: 'llama-guard-3'\)|nearest: 'llama-guard-4'"),
        ("", {}, r"no judge ''"),
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
