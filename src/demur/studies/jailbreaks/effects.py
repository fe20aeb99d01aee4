"""How much more succeeded attacks take away than failed ones and shams: means, paired differences, tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from demur.stats import Estimate, bootstrap_mean, bootstrap_of, holm, sign_flip_p
from demur.studies.jailbreaks.results import GROUPS, MEASURES, Drop, GroupRow, Measure, PairRow, TestRow

_ENOUGH = 6
"""Requests on which an attack both succeeded and failed, from which on the two are compared within requests: with fewer
a test of signs cannot come below .05."""

Pick = Callable[[PairRow], Drop | None]
_PICKS: dict[str, Pick] = {
    GROUPS[0]: lambda row: row.drop if row.outcome == "succeeded" else None,
    GROUPS[1]: lambda row: row.drop if row.outcome == "failed" else None,
    GROUPS[2]: lambda row: row.wrapped,
    GROUPS[3]: lambda row: row.padded,
}


def group_rows(attack: str, rows: Sequence[PairRow]) -> Iterator[GroupRow]:
    """Mean drops of each group of an attack."""
    for group, pick in _PICKS.items():
        harm, refusal = (_mean(_by_request(rows, pick, measure)) for measure in MEASURES)
        if refusal.n:
            requests = len({row.request for row in rows if pick(row) is not None})
            yield GroupRow(attack=attack, group=group, requests=requests, harm=harm, refusal=refusal)


_ByRequest = dict[tuple[str, str], list[float]]
"""Request and attack → drops."""


def _by_request(rows: Sequence[PairRow], pick: Pick, measure: Measure) -> _ByRequest:
    found: _ByRequest = {}
    for row in rows:
        if (drop := pick(row)) is not None and not np.isnan(value := getattr(drop, measure)):
            found.setdefault((row.request, row.attack), []).append(value)
    return found


def _mean(found: _ByRequest) -> Estimate:
    """Mean over prompts; its interval resamples requests, as prompts of one request are alike."""
    requests: dict[str, list[float]] = {}
    for (request, _), values in found.items():
        requests.setdefault(request, []).extend(values)
    table = np.array([(sum(values), len(values)) for values in requests.values()]).reshape(-1, 2)
    mean = bootstrap_of(lambda means: means[:, 0] / means[:, 1], table)
    return mean.model_copy(update={"n": int(table[:, 1].sum())})


def test_rows(attack: str, rows: Sequence[PairRow]) -> Iterator[TestRow]:
    """Succeeded attacks against every control, p not adjusted yet."""
    succeeded, *controls = GROUPS
    for against in controls:
        for measure in MEASURES:
            ours, theirs = (_by_request(rows, _PICKS[name], measure) for name in (succeeded, against))
            if against != GROUPS[1]:
                # Pair by pair: each sham is made of the very text that succeeded.
                won = [row for row in rows if row.outcome == "succeeded" and _PICKS[against](row) is not None]
                ours, theirs = (_by_request(won, _PICKS[name], measure) for name in (succeeded, against))
            if (test := _compared(ours, theirs)) is not None:
                paired, difference, p = test
                yield TestRow(
                    attack=attack, against=against, measure=measure, paired=paired, difference=difference, p=p
                )


def adjusted(tests: Sequence[TestRow]) -> Iterator[TestRow]:
    """The tests of one family with p adjusted by Holm."""
    for test, p in zip(tests, holm([test.p for test in tests]), strict=True):
        yield test.model_copy(update={"p_holm": p})


def _compared(ours: _ByRequest, theirs: _ByRequest) -> tuple[bool, Estimate, float] | None:
    """Difference of two groups of drops and its p value: on requests that one attack has in both groups, or where these
    are few, and all are of one attack, of the groups as they are."""
    gaps: dict[str, list[float]] = {}
    for key in ours.keys() & theirs.keys():
        gaps.setdefault(key[0], []).append(float(np.mean(ours[key]) - np.mean(theirs[key])))
    if len(gaps) >= _ENOUGH:
        means = [float(np.mean(gaps[request])) for request in sorted(gaps)]
        return True, bootstrap_mean(means), sign_flip_p(means)
    if min(len(ours), len(theirs)) < 2 or len({attack for _, attack in (*ours, *theirs)}) > 1:
        return None
    sides = [np.array([float(np.mean(values)) for values in side.values()]) for side in (ours, theirs)]
    return False, bootstrap_of(lambda a, b: a - b, *sides), _permutation_p(sides[0], sides[1])


def _permutation_p(first: np.ndarray, second: np.ndarray, resamples: int = 5000) -> float:
    """Two-sided p value of a difference in means when it is by chance who is in which group; never 0."""
    pooled, n = np.concatenate([first, second]), len(first)
    seen = abs(first.mean() - second.mean()) - 1e-12
    random = np.random.default_rng(0)
    drawn = (random.permutation(pooled) for _ in range(resamples))
    far = sum(abs(each[:n].mean() - each[n:].mean()) >= seen for each in drawn)
    return (1 + far) / (1 + resamples)
