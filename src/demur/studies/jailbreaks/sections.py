"""How attacks are shown: the finding with its controls first; then the attacks, explanations one by one, and words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import numpy as np

from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text, Token, Tokens, Transcript, Transcripts
from demur.stats import Estimate, bootstrap_mean
from demur.studies.jailbreaks.results import (
    GROUPS,
    LOCAL,
    MEASURES,
    Drop,
    GroupRow,
    JailbreaksResult,
    LocalRow,
    TestRow,
    WalkRow,
    WordMeasure,
)
from demur.types import FeatureId

ALPHA = 0.05
_UNIT = "share of a refused plain prompt's signal"
_SHOWN_WALKS = 6
_CURVE = 8
"""Points of the curve over words."""


def jailbreak_sections(result: JailbreaksResult) -> tuple[Section, ...]:
    """The sections of the study `jailbreaks`."""
    sections = (
        Section("Verdict", (Text(_headline(result), "verdict"), *_doubts(result)), brief=True),
        _drops(result),
        Section("Attacks", (_attacks(result),)),
        _local(result),
        _words(result),
        Section("Features", tuple(_features(result))),
        Section("Answers", tuple(_answers(result))),
    )
    return tuple(section for section in sections if section.blocks)


def median_patches(result: JailbreaksResult) -> float:
    """Median number of patches over the explained attacks whose refusal is back; nan where there are none."""
    sizes = _sizes(result)
    return float(median(sizes)) if sizes else math.nan


def _sizes(result: JailbreaksResult) -> list[int]:
    return [len(row.features) for row in result.local if row.restored]


# -- verdict -------------------------------------------------------------------------------------------------------


def _scope(result: JailbreaksResult) -> str:
    """The rows that the finding is about: of all attacks together, or of the only one."""
    return "all" if len(result.attacks) > 1 else next(row.attack for row in result.attacks)


def _group(result: JailbreaksResult, name: str) -> GroupRow | None:
    scope = _scope(result)
    return next((row for row in result.groups if (row.attack, row.group) == (scope, name)), None)


def _test(result: JailbreaksResult, against: str) -> TestRow | None:
    scope = _scope(result)
    asked = (scope, against, "refusal")
    return next((row for row in result.tests if (row.attack, row.against, row.measure) == asked), None)


def larger(test: TestRow | None) -> bool:
    """Whether succeeded attacks take away clearly more than this control does."""
    return test is not None and test.difference.value > 0 and test.p_holm < ALPHA


def _headline(result: JailbreaksResult) -> str:
    won = _group(result, GROUPS[0])
    if won is None:
        return "No attack succeeded, so there is nothing to explain."
    tests = {control: _test(result, control) for control in GROUPS[1:]}
    more = [control for control, test in tests.items() if larger(test)]
    rest = [control for control in tests if control not in more]
    said = [f"Succeeded attacks take away {fmt.estimate_text(won.refusal)} of the refusal signal of a plain request."]
    if more:
        said.append(f"That is significantly more than {fmt.listed([_control(result, name) for name in more])}.")
    if rest:
        said.append(f"It is not significantly more than {fmt.listed([_control(result, name) for name in rest])}.")
    if rate := result.restored.get(LOCAL):
        others = ", ".join(f"{name} {fmt.rate_text(each)}" for name, each in result.restored.items() if name != LOCAL)
        said.append(
            f"Of {rate.n} succeeded attacks explained one by one, {fmt.rate_text(rate)} are refused again once a few "
            f"features (median {fmt.short_number(median_patches(result))}) at single tokens are as on the plain prompt "
            f"({others})."
        )
    return " ".join(said)


def _control(result: JailbreaksResult, name: str) -> str:
    words = {
        "failed": "failed attacks do",
        "same text, harmless request": "the same text does around harmless requests",
        "harmless text, same request": "harmless text of that length does around the same requests",
    }
    test = _test(result, name)
    if test is None:
        return f"{words[name]} (too few to tell)"
    return f"{words[name]} (by {fmt.estimate_text(test.difference)}, adjusted p {fmt.p_text(test.p_holm)})"


def _doubts(result: JailbreaksResult) -> Iterator[Text]:
    won, failed = (_group(result, name) for name in GROUPS[:2])
    if won is not None and won.requests < 10:
        yield Text(
            f"attacks succeeded on {won.requests} requests only, so all that is said of them is uncertain", "warning"
        )
    if failed is None:
        yield Text("no attack failed, so nothing shows that success goes with suppression", "warning")
    if (padded := result.padded_refusal).n and padded.value < 0.8:
        yield Text(
            f"harmless text of the attacks' length alone leaves {fmt.rate_text(padded)} of the requests refused: part "
            "of what the attacks do is done by length",
            "warning",
        )


# -- drops ---------------------------------------------------------------------------------------------------------


def _drops(result: JailbreaksResult) -> Section:
    scope = _scope(result)
    groups = [row for row in result.groups if row.attack == scope]
    others = [row for row in result.groups if row.attack != scope]
    blocks: list[Block] = [_group_table(groups, "Drop of the signals")]
    blocks += [Chart(f"Drop of the {measure} signal", _strips(result, measure)) for measure in MEASURES]
    blocks.append(_test_table([row for row in result.tests if row.attack == scope], "Succeeded attacks less controls"))
    if others:
        blocks.append(_group_table(others, "Drop of the signals, attack by attack", folded=True))
        rest = [row for row in result.tests if row.attack != scope]
        blocks.append(_test_table(rest, "Succeeded attacks less controls, attack by attack", folded=True))
    blocks.append(
        Text(
            "What would refute that attacks work by suppressing refusal features: failed attacks, or shams, that take "
            "away as much; or succeeded attacks that leave the signal as it was. A drop of the harm signal beside it "
            "says that the model no longer sees harm; without one, that it sees it and answers nevertheless.",
            "note",
        )
    )
    return Section("What attacks take away", tuple(blocks), brief=True, intro=_INTRO)


_INTRO = (
    "A signal of 1 is that of a plain harmful request that the model refuses: the harm signal is read on the user's "
    "words, the refusal signal on the template's tokens after them. The drop is the plain prompt's signal less the "
    "attacked one's. Only attacks on requests that are refused when they are put plainly are counted; answers that are "
    "neither refusal nor compliance are left out."
)


def _strips(result: JailbreaksResult, measure: str) -> Callable[[], Any]:
    scope = _scope(result)
    rows = [row for row in result.pairs if row.outcome != "neither"]
    values: dict[str, list[Drop | None]] = {
        GROUPS[0]: [row.drop for row in rows if row.outcome == "succeeded"],
        GROUPS[1]: [row.drop for row in rows if row.outcome == "failed"],
        GROUPS[2]: [row.wrapped for row in rows],
        GROUPS[3]: [row.padded for row in rows],
    }
    means = {row.group: getattr(row, measure) for row in result.groups if row.attack == scope}
    spreads = [
        charts.Spread(name, tuple(getattr(drop, measure) for drop in found if drop is not None), means[name])
        for name, found in values.items()
        if name in means
    ]
    return lambda: charts.strip_chart(spreads, x_title=f"drop, {_UNIT}")


def _group_table(rows: Sequence[GroupRow], title: str, *, folded: bool = False) -> Table:
    several = len({row.attack for row in rows}) > 1
    return Table.of(
        title,
        [*(["attack"] if several else []), "group", "> prompts", "> requests", "> harm", "> refusal"],
        (
            [
                *([row.attack] if several else []),
                *(row.group, row.refusal.n, row.requests, fmt.estimate_text(row.harm), fmt.estimate_text(row.refusal)),
            ]
            for row in rows
        ),
        caption=f"Mean drop, {_UNIT}; intervals resample requests",
        strong=[] if folded else [0],
        folded=folded,
    )


_TESTED = ("control", "signal", "compared", "> n", "> difference", "> p", "> p adjusted")


def _test_table(rows: Sequence[TestRow], title: str, *, folded: bool = False) -> Table:
    several = len({row.attack for row in rows}) > 1
    return Table.of(
        title,
        [*(["attack"] if several else []), *_TESTED],
        (
            [
                *([row.attack] if several else []),
                *(row.against, row.measure, "same requests" if row.paired else "two groups", row.difference.n),
                *(fmt.estimate_text(row.difference), fmt.p_text(row.p), fmt.p_text(row.p_holm)),
            ]
            for row in rows
        ),
        caption="n: requests, whose means are compared; p: signs flipped request by request, or groups permuted; "
        "adjusted by Holm over the tests of the table",
        folded=folded,
    )


def _attacks(result: JailbreaksResult) -> Table:
    return Table.of(
        "Attacks",
        [
            *("attack", "> prompts", "succeeded", "> neither: incoherent, unscored, or begun as a refusal and read as"
              " compliance; not in the rate"),
            *("> too long: templates or prompts that do not fit the model's context", "> known: left out, as features"
              " were chosen on them", "> answered plainly: left out, as the plain request is not refused"),
        ],
        (
            [row.attack, row.n, row.success, row.neither, row.too_long, row.chosen_from, row.plain_answered]
            for row in result.attacks
        ),
    )  # fmt: skip


# -- local explanations --------------------------------------------------------------------------------------------


def _local(result: JailbreaksResult) -> Section:
    if not result.local:
        return Section("Explained one by one", ())
    sizes = _sizes(result)
    spread = quantiles(sizes, n=4) if len(sizes) > 1 else [math.nan] * 3
    rates = Table.of(
        "Refused again",
        "what is as on the plain prompt | refused",
        result.restored.items(),
        caption=f"{result.restored[LOCAL].n} succeeded attacks. Local patches: median "
        f"{fmt.short_number(median_patches(result))}, quartiles {fmt.short_number(spread[0])} and "
        f"{fmt.short_number(spread[2])}. Of them {fmt.percent(result.f_star_share)} are features of F*, of the random "
        f"ones {fmt.percent(result.f_star_chance)}",
        strong=[0],
    )
    note = Text(
        "What would refute an explanation: as many random features, in the same layers at the same tokens, that "
        "restore refusal as often. All of F* is a far larger change, of every token that both prompts share.",
        "note",
    )
    return Section(
        "Explained one by one",
        (rates, _recurring(result), _local_table(result.local), note),
        intro="Each attack is explained by the fewest features, each at one token, that bring refusal back when they "
        "take their values on the plain prompt; found greedily, by what each promises of the KL divergence.",
    )


def _recurring(result: JailbreaksResult) -> Table:
    found = Counter(feature for row in result.local for feature in dict.fromkeys(row.features))
    every = [each for row in result.local for each in zip(row.features, row.regions, row.raised, strict=True)]
    where = Counter((feature, region) for feature, region, _ in every)
    raised = Counter(feature for feature, _, up in every if up)
    return Table.of(
        "Features that are patched most often",
        "feature | > attacks | > on the user's words | > on the template | > raised | role",
        (
            [
                *(str(feature), n, where[feature, "instruction"], where[feature, "post_instruction"], raised[feature]),
                _role(result, feature),
            ]
            for feature, n in found.most_common(12)
        ),
        caption="Attacks in whose explanation it is; its patches in each part of the prompt; those that raise it",
    )


def _role(result: JailbreaksResult, feature: FeatureId) -> str:
    roles = (("refusal", result.refusal), ("harm", result.harm), ("F*", result.f_star))
    return next((role for role, features in roles if feature in features), "none of these")


def _local_table(rows: Sequence[LocalRow]) -> Table:
    outcome = {True: "yes", False: "no", None: fmt.MISSING}
    return Table.of(
        "Every explanation",
        "attack | patches | > KL before | > KL after | > P(refuse) before | > after | refused | F* | random",
        (
            [
                row.attack,
                ", ".join(f"{f} at '{fmt.token_text(t)}'" for f, t in zip(row.features, row.tokens, strict=True)),
                *(fmt.measure(row.kl[0]), fmt.measure(row.kl[-1])),
                *(fmt.measure(row.p_refuse[0]), fmt.measure(row.p_refuse[-1])),
                *(outcome[each] for each in (row.restored, row.f_star, row.random)),
            ]
            for row in rows
        ),
        caption="KL divergence of the first answer token from the plain prompt's, nats; before any and after all "
        "patches of the search",
        folded=True,
    )


# -- word by word --------------------------------------------------------------------------------------------------


def _words(result: JailbreaksResult) -> Section:
    if not result.walks:
        return Section("Word by word", ())
    rises = [(row, np.array(row.added)) for row in result.walks]
    tops = Counter(_plain(row.words[row.top]) for row, _ in rises)
    taken: dict[str, list[tuple[float, float, float]]] = {}
    for row in result.walks:
        for word, *each in zip(row.words, row.added, row.left_out, row.ig, strict=True):
            taken.setdefault(_plain(word), []).append((each[0], each[1], each[2]))
    known = [row for row, _ in rises if row.refusal[-1] > 0]
    alone = bootstrap_mean([row.alone / row.refusal[-1] for row in known])
    top = bootstrap_mean([float(rise.max()) / row.refusal[-1] for row, rise in rises if row.refusal[-1] > 0])
    table = Table.of(
        "Strongest words",
        "word | > attacks in which it adds most | > attacks with it | > takes away: when it is added to the words "
        "before it | > when left out: what is back without it | > estimated: by integrated gradients",
        (
            [
                *(word, n, len(taken[word])),
                *(fmt.estimate_text(bootstrap_mean(column)) for column in zip(*taken[word], strict=True)),
            ]
            for word, n in tops.most_common(12)
        ),
        caption=f"Mean shares of the plain request's refusal signal. The word that adds most makes "
        f"{fmt.estimate_text(top)} of the whole suppression when it is added in "
        f"its place, and {fmt.estimate_text(alone)} alone beside the plain request (mean over {len(known)} attacks)",
    )
    chart = Chart(
        "Suppression of the refusal signal over words",
        lambda: _curve(result.walks),
        "Mean over succeeded attacks with 95 % intervals. Dashed: the harm features taken out of the prompt as well.",
    )
    note = Text(
        "What would refute that single words carry an attack: suppression that grows evenly with every word. What "
        "would refute that refusal features are driven by harm features: a dashed line no higher than the other.",
        "note",
    )
    return Section(
        "Word by word",
        (chart, table, *_words_in_place(result), note),
        intro="The words of succeeded attacks are added to the plain request one at a time, in reading order. "
        "Suppression is the share of the plain request's refusal signal that is gone.",
    )


_WORD_MEASURES: dict[WordMeasure, str] = {
    "added": "added to the words before it",
    "left_out": "left out",
    "gradient": "gradient at the prompt",
    "ig": "integrated gradients",
}


def _words_in_place(result: JailbreaksResult) -> Iterator[Block]:
    """Which words of single attacks take the signal away, exactly and by gradients, and how far the two agree."""
    shown = result.walks[:_SHOWN_WALKS]
    most = max((value for row in shown for value in (*row.left_out, *row.ig)), default=0.0)
    if most > 0:
        lines = tuple(
            (
                row.attack,
                tuple(
                    Token(f"{word} ", max(0.0, out) / most, max(0.0, ig) / most)
                    for word, out, ig in zip(row.words, row.left_out, row.ig, strict=True)
                ),
            )
            for row in shown
        )
        yield Tokens(
            "Words that take the refusal signal away",
            ("left out", "integrated gradients"),
            lines,
            caption=f"The words around the request, in order. Full colour: {fmt.percent(most)} of the plain request's "
            "signal; words that give some back are not coloured",
        )
    yield Table.of(
        "How far the measures agree",
        "what a word takes away | beside | > rank correlation: over the words of an attack",
        (
            [_WORD_MEASURES[row.first], _WORD_MEASURES[row.second], fmt.estimate_text(row.spearman)]
            for row in result.agreement
        ),
        caption="Mean over attacks. Leaving words out is what is so; where an estimate does not agree with it, believe "
        "it no further. The last row is how far two exact measures agree",
    )


def _plain(word: str) -> str:
    return word.strip(".,:;!?\"'()[]*“”").casefold() or word


def _curve(walks: Sequence[WalkRow]) -> Any:
    places = np.linspace(0, 1, _CURVE)

    def series(name: str, curves: Sequence[Sequence[float]]) -> charts.Series:
        table = np.array([np.interp(places, np.linspace(0, 1, len(curve)), curve) for curve in curves])
        means = (bootstrap_mean(column) for column in table.T)
        points = (charts.Point.of(round(100 * float(x)), y) for x, y in zip(places, means, strict=True))
        return charts.Series(name, tuple(points))

    lines = [series("attack", [row.refusal for row in walks])]
    lines.append(series("attack, without harm features", [row.without_harm for row in walks]))
    return charts.line_chart(lines, x_title="words added, %", y_title="suppression", share=False)


def _features(result: JailbreaksResult) -> Iterator[Block]:
    yield Text(
        f"{len(result.refusal)} refusal features of F* ({fmt.listed([str(f) for f in result.refusal])}) and "
        f"{len(result.harm)} harm features ({fmt.listed([str(f) for f in result.harm]) or fmt.MISSING}).",
    )
    if result.walks:
        ends = np.array([[curve[-1] for curve in row.by_feature] for row in result.walks])
        yield Table.of(
            "Suppression of each refusal feature by the whole text of succeeded attacks",
            "feature | > suppression | > attacks",
            (
                [str(feature), fmt.estimate_text(found), found.n]
                for feature, column in zip(result.refusal, ends.T, strict=True)
                for found in (_known(column),)
            ),
            caption="Share of its activation on the plain request that is gone; attacks on requests on which it fires",
        )


def _known(values: np.ndarray) -> Estimate:
    return bootstrap_mean(values)


def _answers(result: JailbreaksResult) -> Iterator[Block]:
    if result.samples:
        transcripts = tuple(Transcript(sample.prompt, sample.answers) for sample in result.samples)
        yield Transcripts("Succeeded attacks, and the answers under their local patches", transcripts, harmful=True)
