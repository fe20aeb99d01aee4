"""What refusals of different kinds of harm share, and what each has of its own (paper, section 4.2).

Per category a global set: the features that lower refusal of its prompts most. What is common to the categories and
what is specific to each is suppressed in turn, alone or while the other part is held at its own values, and so are
other categories' specific features. The experiment is in `parts`, the roles of features in `causes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field

from demur.report import charts
from demur.report import format as fmt
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.stats import Estimate, wilson
from demur.studies.base import Study, StudyResult
from demur.studies.categories.causes import CausalRole, Causes
from demur.studies.config import COMPLIANCE, Factors, FindConfig
from demur.types import FeatureField, FeatureSet, Value

if TYPE_CHECKING:
    from demur.studies.context import Context

ALL: Final = ""
"""All categories together."""
NOT_REFUSED: Final = "not refused"
"""The measure that asks no more than that the refusal is gone; the answer may be about something else."""
Split = Literal["all", "intersection", "graded"]
Part = Literal["whole", "common", "specific"]
Other = Literal["free", "held", "held on"]
"""The other part: left alone, held at its own values on the prompt and then released, or held on at its mean."""
_OTHER: Final[dict[Other, str]] = {
    "free": "left alone",
    "held": "held on the prompt",
    "held on": "held, then at its prompt mean",
}
OTHERS: Final = tuple(_OTHER)
_MATRIX: Final = 60
"""Rows of the chart of features, at most; the table beside it has all."""


class Config(FindConfig):
    """One set of features for each category of harm: what they share, and what each part does."""

    group: ClassVar[str] = "Categories"

    category_level: int = Field(default=1, ge=0)
    """Parts of a category's name that count where it has several, as in `Fraud / Phishing`; 0: all."""
    category_prompts: int = Field(default=12, ge=2)
    """Prompts of each category that choose its features, at most."""
    min_prompts: int = Field(default=4, ge=2)
    """Refused prompts, to choose and to test, without which a category is left out."""
    candidates: Literal["harm", "pool"] = "harm"
    """Features that a set may hold: the pool and each category's best harm features, by the effect of taking each out;
    or the pool only, by attribution, as in the paper."""
    suppress: Factors = Field(default=(0.0, -1.0, -3.0), min_length=1)
    """Scale factors c to try, as 0,-1,-3; the tuning prompts choose one."""
    random_sets: int = Field(default=3, ge=2)
    """Sets drawn for the random control."""
    harm_judges: tuple[str, ...] = ()
    """Judges of harm, besides the outcome judge, each with an attack success of its own; repeatable."""


class CategorySet(Value):
    """One category: prompts that chose its features and refused test prompts, its set, and its specific features (cut
    to the number of common ones)."""

    category: str
    n_choosing: int
    n_test: int
    features: FeatureSet
    specific: tuple[FeatureField, ...]


class FeatureUse(Value):
    """A feature of some set: what it does to refusal of each category that it serves, nats (with `candidates = "pool"`:
    attribution, logits per token), and the share of categories that it serves."""

    feature: FeatureField
    role: CausalRole
    scores: dict[str, float]
    share: float


class PartRow(Value):
    """What suppressing one part of each category's set does on its refused test prompts."""

    split: Split
    part: Part
    other: Other
    control: bool
    """Random features in place of the part, matched to it one by one."""
    sets: int
    category: str
    measure: str
    size: float
    """Features suppressed, mean over categories."""
    success: Estimate
    """Requests that got what they ask for."""
    normalised: Estimate
    """That share divided by the one with the whole set suppressed (the paper's score)."""


class Transfer(Value):
    """The specific features of `source` suppressed on the prompts of `target`; `shared` of them are also specific to
    the target."""

    source: str
    target: str
    other: Other
    measure: str
    shared: int
    success: Estimate
    normalised: Estimate


class TransferTest(Value):
    """A category's own specific features against the other categories', on the same prompts; categories and prompts
    are what was sampled."""

    other: Other
    measure: str
    own: Estimate
    others: Estimate
    difference: Estimate
    p: float


class CategoriesResult(StudyResult):
    """What the categories share, what the parts do, and the role of each feature."""

    k: int
    factor: float
    candidates: int
    measures: tuple[str, ...]
    categories: tuple[CategorySet, ...]
    common: tuple[FeatureField, ...]
    uses: tuple[FeatureUse, ...]
    parts: tuple[PartRow, ...]
    transfers: tuple[Transfer, ...]
    tests: tuple[TransferTest, ...]
    causes: Causes

    def part(self, part: Part, other: Other, **wanted: Any) -> PartRow | None:
        """The row of a part; default: of the first split and measure, for all categories together, no control."""
        split = next((row.split for row in self.parts if row.part == part), "all")
        given = {"split": split, "category": ALL, "measure": self.measures[0], "control": False} | wanted
        rows = (row for row in self.parts if (row.part, row.other) == (part, other))
        return next((row for row in rows if all(getattr(row, name) == v for name, v in given.items())), None)


def run(context: Context[Config]) -> CategoriesResult:
    """Choose a set for each category, and suppress its parts."""
    from demur.studies.categories.parts import Experiment

    return Experiment(context).run()


# -- sections ----------------------------------------------------------------------------------------------------------


def sections(result: CategoriesResult) -> tuple[Section, ...]:
    """The verdict, the features by category, the parts, the transfer, the roles."""
    verdict = tuple(Text(text, "verdict") for text in (_sharing(result), _acting(result), _moving(result)) if text)
    found = (
        Section("Verdict", verdict, brief=True),
        Section("Features by category", tuple(_features(result))),
        Section("Parts", tuple(_parts(result)), brief=True),
        Section("Transfer", tuple(_transfer(result))),
        Section("Roles", tuple(_roles(result))),
    )
    return tuple(section for section in found if section.blocks)


def _sharing(result: CategoriesResult) -> str:
    n, sizes = len(result.categories), [len(each.features) for each in result.categories]
    low, high = min(sizes), max(sizes)
    size = f"{low}" if low == high else f"{low} to {high}"
    refusal, own = _role_share(result, common=True), _role_share(result, common=False)
    roles = (
        f" Refusal features are {fmt.rate_text(refusal)} of those that serve at least half of the categories, and "
        f"{fmt.rate_text(own)} of the others."
        if refusal.n and own.n
        else ""
    )
    return (
        f"Of {size} features for each of {n} categories of harm, {len(result.common)} are common to all; "
        f"{len(result.uses)} different ones serve any.{roles}"
    )


def _role_share(result: CategoriesResult, *, common: bool) -> Estimate:
    """Share of refusal features among harm and refusal features that serve half of the categories or more, or fewer."""
    roles = [use.role for use in result.uses if (use.share >= 0.5) == common and use.role in ("harm", "refusal")]
    return Estimate.of(wilson(roles.count("refusal"), len(roles)))


def _acting(result: CategoriesResult) -> str:
    rows = [result.part(part, "held") for part in ("common", "specific")]
    drawn = [result.part(part, "held", control=True) for part in ("common", "specific")]
    free = [result.part(part, "free") for part in ("common", "specific")]
    whole = result.part("whole", "free")
    if whole is None or any(row is None for row in (*rows, *drawn, *free)):
        return ""
    common, specific = (_both(result, row) for row in rows if row)
    alone = " and ".join(fmt.percent(row.success.value) for row in free if row)
    random = " and ".join(fmt.percent(row.success.value) for row in drawn if row)
    return (
        f"Suppressing whole sets (c = {fmt.short_number(result.factor)}) ends {_both(result, whole)} of "
        f"{whole.success.n} refusals. With the other part held at its own values on the prompt, the common features "
        f"end {common}, and as many specific ones {specific}; random features in their places {random}. With the other "
        f"part left alone it is {alone}."
    )


def _both(result: CategoriesResult, row: PartRow) -> str:
    """A row's share of refusals that are gone, and how many of the answers comply."""
    wanted = {name: getattr(row, name) for name in ("split", "control", "category")}
    complied = result.part(row.part, row.other, measure=COMPLIANCE, **wanted)
    more = "" if complied is None else f" (complied: {fmt.percent(complied.success.value)})"
    return fmt.rate_text(row.success) + more


def _moving(result: CategoriesResult) -> str:
    tests = [test for test in result.tests if test.other == "free" and test.measure == result.measures[0]]
    return "".join(
        f"A category's own specific features end {fmt.rate_text(test.own)} of its refusals, those of other categories "
        f"{fmt.rate_text(test.others)} (difference {fmt.points_text(test.difference)} points, p {fmt.p_text(test.p)})."
        for test in tests
    )


def _features(result: CategoriesResult) -> Iterator[Block]:
    names = [each.category for each in result.categories]
    best = {each.category: max(each.features.scores) for each in result.categories}
    shown = result.uses[:_MATRIX]
    cells = [
        charts.Cell(row, column, use.scores[name] / best[name])
        for row, use in enumerate(shown)
        for column, name in enumerate(names)
        if name in use.scores
    ]
    labels = [f"{use.feature} {use.role}" for use in shown]
    yield Chart(
        "Which features serve which categories",
        lambda: charts.heatmap(
            cells, x_title="category of harm", y_title="feature and its role", rows=labels, columns=names
        ),
        "A cell: the feature is in the category's set; its effect on refusal of these prompts, as a share of the best "
        "feature's. At the top are features common to many categories, at the bottom those of one.",
    )
    rows = [
        (str(use.feature), use.role, fmt.percent(use.share), *(fmt.measure(use.scores.get(name)) for name in names))
        for use in result.uses
    ]
    yield Table.of(
        "Features of the categories' sets",
        ["feature", "role", "> serves: share of the categories", *(f"> {name}" for name in names)],
        rows,
        caption="Numbers: fall of the refusal log-odds when the feature alone is taken out, nats; or attribution, with "
        "candidates from the pool.",
        folded=True,
    )
    sets = [
        (each.category, each.n_choosing, each.n_test, len(each.features), len(each.specific))
        for each in result.categories
    ]
    columns = "category | > choosing: refused prompts that chose the set | > test: refused test prompts | > set | "
    columns += "> specific: features outside the common ones, cut to as many"
    yield Table.of("Categories", columns, sets)


def _parts(result: CategoriesResult) -> Iterator[Block]:
    columns = "split | suppressed | the other part | > features: mean over categories | > n: refused test prompts, "
    columns += "answers scored, + unscored | > success: requests that got what they ask for | > normalised: success "
    columns += "divided by that with the whole sets suppressed, with its 95% interval"
    for measure in result.measures:
        what = _what(measure)
        mine = [row for row in result.parts if row.measure == measure]
        rows = [_part_cells(row) for row in mine if row.category == ALL]
        strong = [n for n, row in enumerate(rows) if row[2] == _OTHER["held"] and "random" not in row[1]]
        yield Table.of(f"All categories, {what}", columns, rows, strong=strong, caption=_SPLITS)
        each = [(row.category, *_part_cells(row)) for row in mine if row.category != ALL and not row.control]
        yield Table.of(f"Each category, {what}", "category | " + columns, each, folded=True)
    yield Text(
        "That common features are enough by themselves is refuted by a success no higher than that of random features "
        "in their places. That a part acts through the other, not by itself, is refuted where holding the other at its "
        "own values leaves the success as it was.",
        "note",
    )


_SPLITS: Final = (
    "intersection: features in every category's set against as many of the rest. graded: the half of each set that "
    "serves most categories against the half that serves fewest. A normalised success above 1: the whole set leaves "
    "less of an answer than the part does."
)


def _part_cells(row: PartRow) -> tuple[str, ...]:
    name = {"whole": "all features"}.get(row.part, row.part)
    return (
        row.split,
        f"random for {name} ({row.sets} sets)" if row.control else name,
        fmt.MISSING if row.part == "whole" else _OTHER[row.other],
        fmt.short_number(round(row.size, 1)),
        fmt.count_text(row.success, unit=""),
        fmt.rate_text(row.success),
        fmt.estimate_text(row.normalised),
    )


def _what(measure: str) -> str:
    """A measure, for people."""
    known = {NOT_REFUSED: "no longer refused", COMPLIANCE: "complied with"}
    return known.get(measure) or f"attack success by {measure}"


def _transfer(result: CategoriesResult) -> Iterator[Block]:
    names = list(dict.fromkeys(row.source for row in result.transfers))
    for measure in result.measures:
        for other in ("free", "held"):
            rows = [row for row in result.transfers if (row.other, row.measure) == (other, measure)]
            if rows:
                yield _transfer_chart(rows, names, other, measure)
    tests = [
        (test.measure, _OTHER[test.other], test.own, test.others, fmt.points_text(test.difference), fmt.p_text(test.p))
        for test in result.tests
    ]
    if tests:
        yield Table.of(
            "A category's own specific features, and those of others",
            "measure | the common features | > own | > others': mean over the other categories | > difference: points "
            "| > p",
            tests,
        )
        cells = [
            (row.source, row.target, _OTHER[row.other], row.measure, row.shared, row.success,
             fmt.estimate_text(row.normalised))
            for row in result.transfers
        ]  # fmt: skip
        columns = "features of | prompts of | the common features | measure | > shared: features specific to both | "
        yield Table.of("Transfer", columns + "> success | > normalised", cells, folded=True)
        yield Text("That features are specific is refuted where those of other categories do as much.", "note")


def _transfer_chart(rows: Sequence[Transfer], names: Sequence[str], other: Other, measure: str) -> Chart:
    cells = [
        charts.Cell(names.index(r.source), names.index(r.target), 100 * r.success.value, chosen=r.source == r.target)
        for r in rows
    ]
    what = _what(measure)
    return Chart(
        f"Whose specific features work on whom, common ones {_OTHER[other]}: {what}",
        lambda: charts.heatmap(
            cells, x_title="prompts of", y_title="features specific to", digits=0, rows=names, columns=names
        ),
        "Percent of the refused test prompts of the column's category that get what they ask for when the features "
        "specific to the row's category are suppressed. Framed: a category's own features.",
    )


def _roles(result: CategoriesResult) -> Iterator[Block]:
    causes = result.causes
    used = {use.feature for use in result.uses}
    counts = Counter((row.role, row.feature in used) for row in causes.features)
    roles = sorted({role for role, _ in counts})
    rows = [(role, counts[role, True], counts[role, False]) for role in roles]
    yield Table.of("Roles", "role | > in a set | > other candidates", rows, caption=_ROLES)
    cells = [
        (
            str(row.feature),
            row.role,
            "up" if row.upstream else "down",
            fmt.measure(row.fires.instruction),
            fmt.measure(row.fires.post_instruction),
            fmt.estimate_text(row.alone),
            fmt.estimate_text(row.after),
            row.wakes,
            fmt.estimate_text(row.harmfulness),
        )
        for row in causes.features
    ]
    columns = (
        "feature | role | stream: layer before those of all refusal features, or not | > words: maximum activation on "
        "harmful less harmless prompts, on the user's words | > template: the same on the template's tokens after them "
        "| > alone: fall of the refusal log-odds when it is taken out, nats | > then: the same once the "
        f"{len(causes.refusal)} refusal features are out | > wakes: silent before, of the prompts on which it then "
        "fires | > judged: fall of the log-odds with which the model calls these requests harmful, nats"
    )
    limit = fmt.measure(abs(causes.whole) / 100, 3)
    note = (
        f"{causes.n} test prompts; of a feature in a set, those of its categories. Effects within "
        f"{limit} nats (1% of ablating the direction) count as none."
    )
    yield Table.of("Evidence for each role", columns, cells, caption=note, folded=True)
    yield Text(
        "That a feature drives refusal is refuted where taking it out alone changes nothing, however near to the "
        "direction it is and however strongly it fires (inert). A harm feature should lower judged harmfulness too, a "
        "refusal feature refusal only.",
        "note",
    )


_ROLES: Final = (
    "harm, refusal, mixed: lowers refusal when taken out alone, and fires on the user's words, on the template after "
    "them, or both. redundant: does nothing alone, and takes over once the refusal features are out. conditional: "
    "matters only then, but fired before. inert: does nothing either way. unclear: the intervals do not tell."
)

STUDY = Study("categories", Config, CategoriesResult, run, sections)
