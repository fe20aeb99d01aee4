"""A result of `demur probes` that is made by hand, in which every number is another one."""

from __future__ import annotations

from itertools import count
from typing import Any

from page_parts import about

from demur.guard.stats import ReliabilityRow
from demur.stats import Estimate
from demur.studies.probes.results import (
    ALL,
    DENSE,
    HARM,
    KEYWORDS,
    CascadeRow,
    EqualAlarms,
    FlagRow,
    HeldOutRow,
    MatchedRow,
    PaperRow,
    ProbeRow,
    ProbesResult,
    RankRow,
    Reliability,
    SetRow,
    StreamRow,
    VerdictRow,
)

SETS: dict[str, tuple[Any, bool]] = {
    "plain harmful": ("plain", True), "plain benign": ("plain", False), "A": ("attack", True), "B": ("attack", True),
    "benign in A": ("wrapped", False), "over": ("over-refusal", False), "polite": ("benign", False),
    "request in text": ("long", True), "text": ("long", False),
}  # fmt: skip
NAMES = (DENSE, HARM, KEYWORDS)


def flags(**shares: Estimate) -> tuple[FlagRow, ...]:
    """Of three representations at two rates, in tenths of percents that go up by one; `shares` of the winner's, by set
    (with `_` for a space), are as they are given."""
    number = count(500)
    rows: list[FlagRow] = []
    for name in NAMES:
        for fpr in (0.01, 0.05):
            for prompts in (*SETS, ALL):
                share = about(next(number) / 1000, 0.0, 40)
                if SETS.get(prompts, ("", True))[1] is False and (name, fpr) == (HARM, 0.01):
                    share = about(0.01, 0.0)
                if (name, fpr) == (HARM, 0.01):
                    share = shares.get(prompts.replace(" ", "_"), share)
                rows.append(FlagRow(target="harmful", representation=name, prompts=prompts, fpr=fpr, flagged=share))
    rows.append(FlagRow(target="refuse", representation=HARM, prompts="A", fpr=0.01, flagged=about(0.99)))
    return tuple(rows)


def matched(name: str, n: int, **given: Any) -> MatchedRow:
    return MatchedRow(representation=name, tpr=about(n / 100), alarms=about((n + 1) / 100), **given)


def probed(**changes: Any) -> ProbesResult:
    """The winner is the probe of harm features; at equal false alarms the dense residual is best."""
    given: dict[str, Any] = {
        "sets": tuple(
            SetRow(name=name, kind=kind, positive=positive, n=30 + n, refused=about(0.3 + n / 100),
                   succeeded=about(0.6 + n / 100) if kind == "attack" else Estimate.unknown())
            for n, (name, (kind, positive)) in enumerate(SETS.items())
        ),
        "probes": (
            ProbeRow(target="harmful", representation=DENSE, pooling="mean", layer=1, dim=8, used=7, loss=0.1234,
                     auroc=0.9, tried=6),
            ProbeRow(target="harmful", representation=HARM, pooling="max", layer=None, dim=3, used=2, loss=0.2, auroc=1,
                     tried=4),
            ProbeRow(target="harmful", representation=KEYWORDS, pooling=None, layer=None, dim=1, used=1, loss=0.5,
                     auroc=0.8, tried=5),
            ProbeRow(target="refuse", representation=HARM, pooling="last", layer=0, dim=3, used=1, loss=0.3, auroc=0.7,
                     tried=1),
        ),
        "flags": flags(),
        "ranks": (
            RankRow(target="harmful", representation=HARM, prompts="A", auroc=about(0.8), f1=0.71, ece=0.12,
                    difference=about(0.05, 0.01), p=0.011, p_holm=0.022),
            RankRow(target="harmful", representation=DENSE, prompts="A", auroc=about(0.75), f1=0.61, ece=0.13),
            RankRow(target="harmful", representation=HARM, prompts=ALL, auroc=about(0.7), f1=0.51, ece=0.14),
            RankRow(target="refuse", representation=HARM, prompts="plain", auroc=about(0.6), f1=0.41, ece=0.15),
        ),
        "winner": HARM, "best": DENSE,
        "matched": (matched(DENSE, 80), matched(HARM, 70, difference=about(-0.1), p=0.01, p_holm=0.05),
                    matched(KEYWORDS, 20, difference=about(-0.6), p=0.001, p_holm=0.04)),
        "held_out": (
            HeldOutRow(family="A", representation=HARM, plain=about(0.41), others=about(0.52), difference=about(0.11),
                       plain_alarms=about(0.23), others_alarms=about(0.34)),
        ),
        "verdicts": (
            VerdictRow(group="attacks that succeeded", harmless=about(0.11), refused=about(0.22), jailbreak=about(0.63),
                       over_refusal=about(0.04)),
            VerdictRow(group="plain benign", harmless=about(0.9), refused=about(0.05), jailbreak=about(0.03),
                       over_refusal=about(0.02)),
        ),
        "jailbreak_auroc": about(0.87),
        "cascade": (CascadeRow(passed=0.05, second=about(0.06), second_attacks=about(0.77), cost=0.4, tpr=about(0.66),
                               fpr=about(0.02)),),
        "reliability": (
            Reliability(representation=HARM, prompts="plain", rows=(
                ReliabilityRow(predicted=0.1, observed=about(0.2)), ReliabilityRow(predicted=0.8, observed=about(0.7)),
            )),
            Reliability(representation=DENSE, prompts=ALL, rows=(ReliabilityRow(predicted=0.5, observed=about(0.6)),)),
        ),
        "paper": (PaperRow(representation=HARM, plain=about(0.91), succeeded=about(0.12), as_harm=about(0.88)),),
        "stream": StreamRow(
            layer=1, window=8, trained_on=33, stopped=about(0.81), benign=about(0.06), wrapped=about(0.17),
            over_refusal=about(0.28), tokens=3.5, tokens_90=12.0,
            equal=EqualAlarms(stopped=about(0.72), alarms=about(0.05), tokens=4.5),
        ),
        "negatives": 128,
    }  # fmt: skip
    return ProbesResult(study="probes", **(given | changes))
