"""Judges by name: `patterns`, `harmbench`, `harmbench=FOLDER`, `strongreject=MODEL`."""

from __future__ import annotations

from typing import Any

from demur.errors import InputError
from demur.judges._base import Judge
from demur.judges._classifier import Placement
from demur.judges._endpoint import Endpoint
from demur.registry import Registry

JUDGES: Registry[type[Judge]] = Registry(
    "demur.judges",
    "judge",
    {
        "patterns": "demur.judges._patterns:PatternJudge",
        "harmbench": "demur.judges._guards:HarmBenchJudge",
        "wildguard": "demur.judges._guards:WildGuardJudge",
        "llama-guard-3": "demur.judges._guards:LlamaGuardJudge",
        "llama-guard-4": "demur.judges._guards:LlamaGuard4Judge",
        "strongreject": "demur.judges._llm:StrongRejectJudge",
        "refusal": "demur.judges._llm:RefusalJudge",
    },
)
"""Kind → class. `needs` says what a class is made with, `gives` what its verdicts state."""


def get_judge(name: str, *, placement: Placement | None = None, endpoint: Endpoint | None = None) -> Judge:
    """The judge called `name`: a kind, or KIND=MODEL (a hub id or folder, or a model's name at an endpoint).

    Nothing is loaded or asked yet; `Judge.check` tries it. `placement` is for judges whose model runs here, `endpoint`
    for those that ask an endpoint (default: from the environment). Raises InputError: there is no such kind (names
    those there are, and the nearest), a model is missing or named where none is taken, or `placement` or `endpoint` is
    of no use to it.
    """
    kind, equals, model = name.partition("=")
    make: Any = JUDGES[kind]
    if equals and not model:
        raise InputError(f"judge {name!r} names no model after '='")
    if placement is not None and make.needs != "model":
        raise InputError(f"the judge {kind!r} has no model that runs here: device, dtype and revision are not for it")
    if endpoint is not None and make.needs != "endpoint":
        raise InputError(f"the judge {kind!r} asks no endpoint: its address, pace and prices are not for it")
    if model and make.needs == "nothing":
        raise InputError(f"the judge {kind!r} takes no model; leave out {equals + model!r}")
    if not model and make.needs == "endpoint":
        raise InputError(f"the judge {kind!r} needs a model: {kind}=MODEL, for example {kind}=gpt-4o-mini")
    made: Judge = make(*{"nothing": (), "model": (model or None, placement), "endpoint": (model, endpoint)}[make.needs])
    return made
