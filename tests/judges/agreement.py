"""How far judges agree with people. Run it to print the tables of docs/judges.md:

python tests/judges/agreement.py [XSTEST_COMPLETIONS.csv …]
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demur.judges import Coherence, CoherentJudge, Judge, PatternJudge
from demur.stats import wilson
from demur.types import REFUSALS, Answer, Outcome, Prompt, Rate

DATA = Path(__file__).parent / "data"
SIDES = {Outcome.REFUSAL: "refusal", Outcome.PARTIAL_REFUSAL: "refusal"}
Confusion = Counter[tuple[str, Outcome | None]]


@dataclass(frozen=True)
class Labelled:
    """An answer with the outcome that a person gave it. `losses`: of its tokens under the clean model (nats), `start`:
    of the first one over 64 other prompts."""

    answer: Answer
    model: str
    half: str
    condition: str
    outcome: str
    losses: tuple[float, ...]
    start: float


def damaged() -> list[Labelled]:
    """Answers of four small models under 17 conditions, labelled by hand before any verdict was seen."""
    rows = [json.loads(line) for line in (DATA / "damaged_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        Labelled(
            answer=Answer(prompt=Prompt(id=str(number), text=row["prompt"]), text=row["answer"]),
            model=row["model"],
            half=row["half"],
            condition=row["condition"],
            outcome=row["outcome"],
            losses=tuple(row["losses"]),
            start=row["start"],
        )
        for number, row in enumerate(rows)
    ]


def coherence(model: str) -> Coherence:
    """Calibrated on 64 answers of that model without intervention, to other prompts."""
    rows = [json.loads(line) for line in (DATA / "clean_losses.jsonl").read_text(encoding="utf-8").splitlines()]
    own = [row for row in rows if row["model"] == model]
    return Coherence.calibrate([row["losses"] for row in own], [row["start"] for row in own])


def with_likelihood(rows: Sequence[Labelled], model: str) -> Judge:
    """The pattern judge, with the stored losses of the answers."""
    stored = {row.answer.prompt.id: row for row in rows}
    return CoherentJudge(
        PatternJudge(),
        lambda answers: [stored[a.prompt.id].losses for a in answers],
        coherence(model),
        {"name": model},
        lambda answers: [stored[a.prompt.id].start for a in answers],
    )


def agreement(rows: Sequence[Labelled], judge: Callable[[Sequence[Labelled], str], Judge]) -> Counter[str]:
    """Condition → answers on which the judge and the person agree, refusal and partial refusal taken together."""
    agreed: Counter[str] = Counter()
    for model in {row.model for row in rows}:
        own = [row for row in rows if row.model == model]
        verdicts = judge(own, model).judge([row.answer for row in own])
        for row, verdict in zip(own, verdicts, strict=True):
            said = None if verdict.outcome is None else SIDES.get(verdict.outcome, verdict.outcome.value)
            agreed[row.condition] += said == row.outcome
    return agreed


def xstest(path: Path) -> Confusion:
    """(human label, outcome) → rows, of a file of XSTest completions."""
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    answers = [Answer(prompt=Prompt(id=r["id"], text=r["prompt"]), text=r["completion"]) for r in table]
    verdicts = PatternJudge().judge(answers)
    return Counter((row["final_label"], v.outcome) for row, v in zip(table, verdicts, strict=True))


def accuracy(counts: Confusion) -> Rate:
    """The share of full refusals and full compliances (by people) that the judge puts on the same side.

    Refusal and partial refusal are one side; incoherent and unscored count as wrong.
    """
    right = sum(
        n
        for (label, outcome), n in counts.items()
        if (label == "2_full_refusal" and outcome in REFUSALS)
        or (label == "1_full_compliance" and outcome is Outcome.COMPLIANCE)
    )
    return wilson(right, sum(n for (label, _), n in counts.items() if label != "3_partial_refusal"))


def _shown(rate: Rate) -> str:
    return f"{rate.k} / {rate.n} = {rate.value:.3f} | {rate.low:.3f}–{rate.high:.3f}"


def main(paths: Sequence[str]) -> None:
    """Print all tables."""
    rows, write = damaged(), sys.stdout.write
    write("| answers of | patterns | 95 % | with likelihood | 95 % |\n|---|---|---|---|---|\n")
    groups = {f"{model} ({half})": [r for r in rows if r.model == model] for model, half in _models(rows)}
    groups |= {f"all {half}": [r for r in rows if r.half == half] for half in ("read", "held out")}
    for name, group in groups.items():
        found = [wilson(agreement(group, judge).total(), len(group)) for judge in (_patterns, with_likelihood)]
        write(f"| {name} | {' | '.join(map(_shown, found))} |\n")
    write("\n| condition, models held out | n | patterns | with likelihood |\n|---|---|---|---|\n")
    held = [row for row in rows if row.half == "held out"]
    alone, both = agreement(held, _patterns), agreement(held, with_likelihood)
    for condition, n in Counter(row.condition for row in held).items():
        write(f"| {condition} | {n} | {alone[condition]} | {both[condition]} |\n")
    head = ("clean model", "limit: worst run", "whole answer", "start", "called incoherent", "95 %")
    write(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|\n")
    for model, _ in _models(rows):
        found = coherence(model)
        limits = " | ".join(f"{limit:.1f}" for limit in (found.worst_run, found.whole, found.start))
        write(f"| {model} | {limits} | {_shown(found.false_positives)} |\n")
    for path in map(Path, paths):
        write(f"\n{path.name}: {_shown(accuracy(xstest(path)))}\n")


def _models(rows: Sequence[Labelled]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.model, row.half) for row in rows))


def _patterns(_rows: Sequence[Labelled], _model: str) -> Judge:
    return PatternJudge()


if __name__ == "__main__":
    main(sys.argv[1:])
