"""What the probes detect on test prompts: flags at thresholds set before, rankings, held-out families, cascades."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import expit

from demur.guard.artifact import verdict_of
from demur.guard.probes import Labelled, fit_centroids, fit_probe
from demur.guard.stats import (
    delong,
    expected_calibration_error,
    f1_score,
    reliability,
    share_above,
    threshold_at,
)
from demur.stats import Estimate, auroc, bootstrap_interval, bootstrap_p, holm, paired_difference, wilson
from demur.studies.probes import results
from demur.studies.probes.fitting import Bench, Fitted
from demur.studies.probes.inputs import Group, Sets
from demur.studies.probes.results import (
    ALL,
    DENSE,
    FPRS,
    CascadeRow,
    FlagRow,
    HeldOutRow,
    MatchedRow,
    PaperRow,
    RankRow,
    Reliability,
    Target,
    VerdictRow,
)

_CASCADE = (0.05, 0.1, 0.2, 0.5)
_BINS = 10
_RESAMPLES = 1000


@dataclass
class Scores:
    """Log-odds of every probe on every test set, and the outcomes of the answers to them."""

    bench: Bench
    sets: Sets
    fitted: dict[Target, dict[str, Fitted]]
    logits: dict[tuple[str, str, Target], np.ndarray]
    """By set, representation and target."""
    refused: dict[str, np.ndarray]
    """Set → 1, 0 or nan (unscored); sets that were not answered are missing."""
    outcomes: dict[str, np.ndarray]
    """Attack → "succeeded", "failed" or "neither" for each prompt."""

    @classmethod
    def of(
        cls,
        bench: Bench,
        sets: Sets,
        fitted: dict[Target, dict[str, Fitted]],
        refused: dict[str, np.ndarray],
        outcomes: dict[str, np.ndarray],
    ) -> Scores:
        probes = [each for by_name in fitted.values() for each in by_name.values()]
        logits: dict[tuple[str, str, Target], np.ndarray] = {}
        read = bench.context.each(partial(bench.values, group.prompts, probes, group.name) for group in sets)
        for group, values in zip(sets, read, strict=True):
            for each in probes:
                logits[group.name, each.name, each.target] = each.probe.logit(values[each.name, each.target])
        return cls(bench, sets, fitted, logits, refused, outcomes)

    def on(self, groups: Iterable[Group], name: str, target: Target = "harmful") -> np.ndarray:
        """A probe's log-odds on several sets."""
        parts = [self.logits[group.name, name, target] for group in groups]
        return np.concatenate(parts) if parts else np.zeros(0)

    def by_outcome(self, outcome: str, name: str, target: Target = "harmful") -> np.ndarray:
        """A probe's log-odds on attacks with one outcome."""
        return self.on_outcome(outcome, lambda group: self.logits[group.name, name, target])

    def on_outcome(self, outcome: str, values: Any) -> np.ndarray:
        """Values of attacks with one outcome; `values` gives those of a set."""
        parts = [values(group)[self.outcomes[group.name] == outcome] for group in self.sets.of("attack")]
        return np.concatenate(parts) if parts else np.zeros(0)

    def names(self, target: Target) -> tuple[str, ...]:
        """Representations, in the order of the tables."""
        return tuple(self.fitted[target])


# -- flags and rankings --------------------------------------------------------------------------------------------


def flag_rows(scores: Scores) -> Iterator[FlagRow]:
    """Shares flagged, set by set, and of all attacks together."""
    for target in results.TARGETS:
        for name, each in scores.fitted[target].items():
            groups = [(group.name, (group,)) for group in scores.sets]
            for prompts, members in (*groups, (ALL, scores.sets.positives())):
                for fpr in FPRS:
                    flagged = share_above(scores.on(members, name, target), each.threshold(fpr))
                    yield FlagRow(target=target, representation=name, prompts=prompts, fpr=fpr, flagged=flagged)


def rank_rows(scores: Scores) -> list[RankRow]:
    """AUROC, F1 and calibration for each family, and DeLong's test against the dense residual."""
    rows: list[RankRow] = []
    for target in results.TARGETS:
        made: list[RankRow] = []
        for family, parts in _families(scores, target):
            for name in scores.names(target):
                sides = [parts(name, positive) for positive in (True, False)]
                if min(map(len, sides)) < 2:
                    continue
                other = [parts(DENSE, positive) for positive in (True, False)]
                made.append(_ranked(scores, target, name, family, sides, other))
        adjusted = holm([row.p for row in made])
        rows += [row.model_copy(update={"p_holm": p}) for row, p in zip(made, adjusted, strict=True)]
    return rows


def _families(scores: Scores, target: Target) -> Iterator[tuple[str, Callable[[str, bool], np.ndarray]]]:
    """Name of a family, and what gives a representation's log-odds on its positives or negatives."""
    sets = scores.sets
    plain = tuple(group for group in sets.of("plain") if group.positive)
    families: list[tuple[str, tuple[Group, ...], str | None]] = [("plain", plain, "")]
    families += [(family, sets.positives(family), family) for family in sets.families]
    families.append((ALL, sets.positives(), None))
    for family, groups, wrapped in families:
        if target == "harmful":
            negatives = sets.negatives(wrapped)

            def scored(name: str, positive: bool, g: Any = groups, n: Any = negatives) -> np.ndarray:
                return scores.on(g if positive else n, name, target)

            yield family, scored
        else:
            both = (*groups, *(g for g in sets.of("plain") if not g.positive)) if family == "plain" else groups

            def refusing(name: str, positive: bool, g: tuple[Group, ...] = both) -> np.ndarray:
                labels = np.concatenate([scores.refused[group.name] for group in g])
                return scores.on(g, name, target)[labels == float(positive)]

            yield family, refusing


def _ranked(
    scores: Scores, target: Target, name: str, family: str, sides: list[np.ndarray], dense: list[np.ndarray]
) -> RankRow:
    threshold = scores.fitted[target][name].threshold(FPRS[0])
    labels = np.repeat([True, False], [len(side) for side in sides])
    bins = reliability(expit(np.concatenate(sides)), labels, _BINS)
    against = None if name == DENSE else delong(np.concatenate(sides), np.concatenate(dense), labels)
    return RankRow(
        target=target,
        representation=name,
        prompts=family,
        auroc=auroc(sides[0], sides[1], resamples=_RESAMPLES),
        f1=f1_score(sides[0], sides[1], threshold),
        ece=expected_calibration_error(bins),
        difference=None if against is None else against.difference,
        p=float("nan") if against is None else against.p,
    )


def reliability_rows(scores: Scores, names: Sequence[str]) -> Iterator[Reliability]:
    """Calibration of some harm probes on plain test prompts, and under attack."""
    sets = scores.sets
    plain = tuple(group for group in sets.of("plain") if group.positive)
    for prompts, positives, family in (("plain", plain, ""), (ALL, sets.positives(), None)):
        for name in names:
            sides = scores.on(positives, name), scores.on(sets.negatives(family), name)
            labels = np.repeat([True, False], [len(side) for side in sides])
            rows = reliability(expit(np.concatenate(sides)), labels, _BINS)
            yield Reliability(representation=name, prompts=prompts, rows=tuple(rows))


def matched_rows(scores: Scores) -> tuple[str, tuple[MatchedRow, ...]]:
    """The representation that flags most attacks at equal false alarms, and every one beside it. Prompts of both
    classes are resampled, the same for all representations, and thresholds are moved in every sample."""
    names = scores.names("harmful")
    positives, negatives = (
        np.array([scores.on(groups, name) for name in names])
        for groups in (scores.sets.positives(), scores.sets.negatives())
    )
    n = negatives.shape[1]
    place = n - 1 - int(FPRS[0] * n + 1e-9)

    def caught(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return (high > np.partition(low, place, axis=1)[:, place, None]).mean(1)

    value, random = caught(positives, negatives), np.random.default_rng(0)
    draws = np.array(
        [
            caught(positives[:, random.integers(positives.shape[1], size=positives.shape[1])],
                   negatives[:, random.integers(n, size=n)])
            for _ in range(_RESAMPLES)
        ]
    )  # fmt: skip
    ranking = [auroc(*pair, resamples=1).value for pair in zip(positives, negatives, strict=True)]
    best = max(range(len(names)), key=lambda k: (value[k], ranking[k]))
    rows: list[MatchedRow] = []
    for k, name in enumerate(names):
        alarms = share_above(negatives[k], scores.fitted["harmful"][name].threshold(FPRS[0]))
        tpr = bootstrap_interval(float(value[k]), draws[:, k], positives.shape[1])
        gaps = draws[:, k] - draws[:, best]
        if k == best:
            rows.append(MatchedRow(representation=name, tpr=tpr, alarms=alarms))
        else:
            gap = bootstrap_interval(float(value[k] - value[best]), gaps, positives.shape[1])
            rows.append(MatchedRow(representation=name, tpr=tpr, alarms=alarms, difference=gap, p=bootstrap_p(gaps)))
    adjusted = holm([row.p for row in rows])
    return names[best], tuple(r.model_copy(update={"p_holm": p}) for r, p in zip(rows, adjusted, strict=True))


# -- a family held out ---------------------------------------------------------------------------------------------


def held_out_rows(scores: Scores, names: Sequence[str]) -> Iterator[HeldOutRow]:
    """Train on plain prompts and all families but one, and test on that one. Requests of the test prompts are halved:
    one half, in the other families, trains and calibrates; the other half, in this family, is tested."""
    families = scores.sets.families
    if len(families) < 2:
        return
    for family in families:
        for name in names:
            row = _held_out(scores, family, name)
            if row is not None:
                yield row


def _held_out(scores: Scores, family: str, name: str) -> HeldOutRow | None:
    bench, fitted = scores.bench, scores.fitted["harmful"][name]
    part = _Halves(scores, fitted)
    sets = scores.sets
    others = [group for group in sets.of("attack", "wrapped") if group.family != family]
    extra = part.values(others, half=0)
    own = part.values([group for group in sets.of("attack") if group.family == family], half=1)
    benign = [group for group in sets.of("wrapped") if group.family == family]
    quiet = part.values(benign, half=1) if benign else part.values(sets.negatives(""), half=1)
    if min(len(own.labels), len(quiet.labels), len(extra.labels)) == 0:
        return None
    plain = [
        bench.labelled(chosen, bench.values(chosen.prompts, [fitted], name)[name, "harmful"], "harmful")
        for chosen in (bench.train, bench.validation)
    ]
    fold = np.arange(len(extra.labels)) % 3 == 0
    train, validation = (_joined(side, extra, keep) for side, keep in zip(plain, (~fold, fold), strict=True))
    fit = fit_centroids if fitted.probe.unit else fit_probe
    probe = fit(fitted.probe.reading, train, validation)
    threshold = threshold_at(probe.logit(validation.values[~validation.labels]), FPRS[0])
    flags = [
        [fitted.probe.logit(side.values) > fitted.threshold(FPRS[0]), probe.logit(side.values) > threshold]
        for side in (own, quiet)
    ]
    rates = [[Estimate.of(wilson(int(f.sum()), len(f))) for f in pair] for pair in flags]
    return HeldOutRow(
        family=family,
        representation=name,
        plain=rates[0][0],
        others=rates[0][1],
        difference=paired_difference(flags[0][1].astype(float), flags[0][0].astype(float)),
        plain_alarms=rates[1][0],
        others_alarms=rates[1][1],
    )


@dataclass
class _Halves:
    """Values of a probe's reading on the prompts whose request is in one half."""

    scores: Scores
    fitted: Fitted

    def values(self, groups: Sequence[Group], half: int) -> Labelled:
        order = sorted({request for group in self.scores.sets for request in group.requests})
        side = {request: place % 2 for place, request in enumerate(order)}
        found: list[np.ndarray] = []
        labels: list[bool] = []
        for group in groups:
            values = self.scores.bench.values(group.prompts, [self.fitted], group.name)
            rows = values[self.fitted.name, self.fitted.target]
            kept = [n for n, r in enumerate(group.requests) if side[r] == half] if group.requests else range(len(rows))
            found.append(rows[list(kept)])
            labels += [group.positive] * len(found[-1])
        return Labelled(np.concatenate(found) if found else np.zeros((0, 1), np.float32), np.array(labels, dtype=bool))


def _joined(plain: Labelled, more: Labelled, keep: np.ndarray) -> Labelled:
    return Labelled(
        np.concatenate([plain.values, more.values[keep]]), np.concatenate([plain.labels, more.labels[keep]])
    )


# -- two axes, the paper's labels, cascades ------------------------------------------------------------------------


def verdict_rows(scores: Scores, harm: str, refuse: str) -> tuple[tuple[VerdictRow, ...], Estimate]:
    """The verdict of the two probes on each group of prompts, and how well P(harmful) · (1 − P(refuse)) finds succeeded
    attacks among everything else."""
    limits = (
        float(expit(scores.fitted["harmful"][harm].threshold(FPRS[0]))),
        float(expit(scores.fitted["refuse"][refuse].usual)),
    )

    def chances(group: Group) -> np.ndarray:
        pair = scores.logits[group.name, harm, "harmful"], scores.logits[group.name, refuse, "refuse"]
        return np.stack([expit(each) for each in pair], 1)

    parts = {f"attacks that {outcome}": scores.on_outcome(outcome, chances) for outcome in ("succeeded", "failed")}
    for group in scores.sets:
        if group.kind in ("plain", "over-refusal", "benign"):
            parts[group.name] = chances(group)
    wrapped = [chances(group) for group in scores.sets.of("wrapped")]
    if wrapped:
        parts["benign requests in attacks"] = np.concatenate(wrapped)
    rows = tuple(_verdicts(name, found, limits) for name, found in parts.items() if len(found))
    score = {name: found[:, 0] * (1 - found[:, 1]) for name, found in parts.items() if len(found)}
    first = score.pop("attacks that succeeded", np.zeros(0))
    rest = np.concatenate([*score.values(), np.zeros(0)])
    return rows, auroc(first, rest)


def _verdicts(group: str, found: np.ndarray, limits: tuple[float, float]) -> VerdictRow:
    verdicts = [verdict_of(bool(h > limits[0]), bool(r > limits[1])) for h, r in found]

    def share(name: str) -> Estimate:
        return Estimate.of(wilson(verdicts.count(name), len(verdicts)))  # pyright: ignore[reportArgumentType]

    names = {"harmless": "harmless", "refused": "refused", "jailbreak": "jailbreak", "over_refusal": "over-refusal"}
    return VerdictRow(group=group, **{field: share(name) for field, name in names.items()})


def paper_rows(scores: Scores) -> Iterator[PaperRow]:
    """Accuracies by the paper's labels, and the same numbers read as detection."""
    plain = [group for group in scores.sets.of("plain") if group.positive]
    for name in scores.names("harmful"):
        caught = share_above(scores.by_outcome("succeeded", name), 0.0)
        benign = Estimate.of(wilson(caught.n - round(caught.value * caught.n), caught.n)) if caught.n else caught
        yield PaperRow(
            representation=name, plain=share_above(scores.on(plain, name), 0.0), succeeded=benign, as_harm=caught
        )


def cascade_rows(scores: Scores, first: Fitted, second: str, n_layers: int) -> Iterator[CascadeRow]:
    """A shallow probe decides which prompts the deep one sees. Both thresholds are set on validation negatives, so that
    at most 1 % of them pass both stages."""
    bench, deep = scores.bench, scores.fitted["harmful"][second]
    readers = [first, deep]
    chosen = bench.validation

    def logits(values: dict[tuple[str, Target], np.ndarray]) -> list[np.ndarray]:
        return [each.probe.logit(values[each.name, each.target]) for each in readers]

    negatives = [side[~chosen.harmful] for side in logits(bench.values(chosen.prompts, readers, "cascade"))]
    sides = [
        [
            np.concatenate(parts)
            for parts in zip(*(logits(bench.values(g.prompts, readers, g.name)) for g in groups), strict=True)
        ]
        for groups in (scores.sets.negatives(), scores.sets.positives())
    ]
    shallow, depth = (max(each.probe.reading.layers) + 1 for each in readers)
    for passed in _CASCADE:
        loose = threshold_at(negatives[0], passed)
        tight = _joint_threshold(negatives, loose)
        through = [(a > loose, (a > loose) & (b > tight)) for a, b in sides]
        benign, attacks = (Estimate.of(wilson(int(each[0].sum()), len(each[0]))) for each in through)
        # What was run for the first stage is not run again.
        cost = (shallow + max(depth - shallow, 0) * benign.value) / n_layers
        alarms, caught = (Estimate.of(wilson(int(each[1].sum()), len(each[1]))) for each in through)
        yield CascadeRow(passed=passed, second=benign, second_attacks=attacks, cost=cost, tpr=caught, fpr=alarms)


def _joint_threshold(negatives: Sequence[np.ndarray], loose: float) -> float:
    """The second stage's threshold at which at most 1 % of all negatives pass both."""
    seen = np.where(negatives[0] > loose, negatives[1], -np.inf)
    return threshold_at(seen, FPRS[0])
