"""Judges by name: `patterns`, `harmbench`, `harmbench=FOLDER`, `strongreject=MODEL`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from demur.errors import InputError, listed, nearest
from demur.judges._endpoint import Endpoint
from demur.judges._harmbench import HarmBenchJudge
from demur.judges._llama_guard import LlamaGuard4Judge, LlamaGuardJudge
from demur.judges._local import Placement
from demur.judges._patterns import PatternJudge
from demur.judges._protocol import Judge
from demur.judges._rubric import RefusalJudge, StrongRejectJudge
from demur.judges._wildguard import WildGuardJudge


@dataclass(frozen=True)
class JudgeKind:
    """One kind of judge, for listings and help.

    Attributes:
        make: the class; takes nothing, (source, placement) or (model, endpoint), as `needs` says.
        needs: nothing, a model that runs here, or an OpenAI-compatible endpoint.
        gives: what its verdicts state: outcome, harmful, score.
        model: what is taken when no model is named; None where one must be.
        about: one line.
    """

    make: Callable[..., Judge]
    needs: Literal["nothing", "model", "endpoint"]
    gives: tuple[str, ...]
    model: str | None
    about: str


def _local(cls: Any, about: str) -> JudgeKind:
    return JudgeKind(cls, "model", cls.gives, cls.home, about)


JUDGES: dict[str, JudgeKind] = {
    "patterns": JudgeKind(PatternJudge, "nothing", PatternJudge.gives, None, "phrases at the start of the answer"),
    "harmbench": _local(HarmBenchJudge, "HarmBench's classifier: does the answer show the behaviour?"),
    "wildguard": _local(WildGuardJudge, "WildGuard: refusal or not, harmful or not"),
    "llama-guard-3": _local(LlamaGuardJudge, "Llama Guard 3: safe or unsafe, with hazard categories"),
    "llama-guard-4": _local(LlamaGuard4Judge, "Llama Guard 4: safe or unsafe, with hazard categories"),
    "strongreject": JudgeKind(
        StrongRejectJudge, "endpoint", StrongRejectJudge.gives, None, "the StrongREJECT rubric, graded from 0 to 1"
    ),
    "refusal": JudgeKind(RefusalJudge, "endpoint", RefusalJudge.gives, None, "refusal yes or no, asked of a model"),
}
"""Kind → what it is."""


def get_judge(name: str, *, placement: Placement | None = None, endpoint: Endpoint | None = None) -> Judge:
    """The judge called `name`: a kind, or KIND=MODEL (a hub id or folder, or a model's name at an endpoint).

    Nothing is loaded or asked yet.

    Args:
        name: "patterns", "harmbench", "harmbench=/models/cls", "strongreject=gpt-4o-mini", ….
        placement: for judges whose model runs here.
        endpoint: for judges that ask an endpoint (default: from the environment).

    Raises:
        InputError: there is no such kind (names those there are, and the nearest), a model is missing or named where
            none is taken, or `placement` or `endpoint` is of no use to it.
    """
    kind, equals, model = name.partition("=")
    if kind not in JUDGES:
        raise InputError(f"unknown judge {kind!r}{nearest(kind, JUDGES)}; the judges are {listed(tuple(JUDGES))}")
    found = JUDGES[kind]
    if equals and not model:
        raise InputError(f"judge {name!r} names no model after '='")
    if placement is not None and found.needs != "model":
        raise InputError(f"the judge {kind!r} has no model that runs here: device, dtype and revision are not for it")
    if endpoint is not None and found.needs != "endpoint":
        raise InputError(f"the judge {kind!r} asks no endpoint: its address, pace and prices are not for it")
    if found.needs == "nothing":
        if model:
            raise InputError(f"the judge {kind!r} takes no model; leave out {equals + model!r}")
        return found.make()
    if found.needs == "model":
        return found.make(model or None, placement)
    if not model:
        raise InputError(f"the judge {kind!r} needs a model: {kind}=MODEL, for example {kind}=gpt-4o-mini")
    return found.make(model, endpoint)


__all__ = ["JUDGES", "JudgeKind", "get_judge"]
