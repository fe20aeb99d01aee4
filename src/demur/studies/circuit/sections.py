"""What the study `circuit` finds, and how it is shown."""

from __future__ import annotations

from typing import Any, Final, Literal

from demur.report import charts
from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.report.format import estimate_text, measure, p_text, rate_text, short_number, span, token_text
from demur.stats import Estimate, OneMoreDraw
from demur.studies.base import StudyResult
from demur.types import FeatureField, Value

Paths = Literal["kept", "stopped"]
PATHS: Final[tuple[Paths, ...]] = ("kept", "stopped")


class DropRow(Value):
    """Relative fall of a refusal feature's mean activation over the post-instruction tokens (None: of all together,
    each weighted by the norm of its decoder row): with the harm features scaled by `factor`, and with random sets.

    `before` and `harmless` are the means on harmful and on harmless prompts, `of_excess` the fall as a share of the
    difference of the two, nan where that is not positive.
    """

    factor: float
    feature: FeatureField | None
    before: float
    harmless: float
    drop: Estimate
    of_excess: Estimate
    random: Estimate
    difference: Estimate


class DrawRow(Value):
    """The fall of all refusal features together under each random set, and whether the harm features' could be one more
    of these."""

    factor: float
    draws: tuple[float, ...]
    one_more: OneMoreDraw


class EdgeRow(Value):
    """What the source contributes to the target, in the target's units: mean over prompts."""

    paths: Paths
    source: FeatureField
    target: FeatureField
    from_harm: bool
    estimated: float
    measured: Estimate


class EdgeCheck(Value):
    """Estimated against measured weights, over all edges."""

    paths: Paths
    edges: int
    nonzero: int
    spearman: Estimate
    same_sign: Estimate


class GraphPoint(Value):
    """A node of the drawn graph; `layer` −1 holds tokens, the last one logits."""

    node: str
    kind: Literal["token", "harm", "refusal", "feature", "logit"]
    label: str
    layer: int
    position: int
    token: str
    value: float
    influence: float


class GraphLink(Value):
    """An edge of the drawn graph."""

    source: str
    target: str
    weight: float


class Result(StudyResult):
    harm: tuple[FeatureField, ...]
    refusal: tuple[FeatureField, ...]
    drops: tuple[DropRow, ...]
    draws: tuple[DrawRow, ...]
    checks: tuple[EdgeCheck, ...]
    edges: tuple[EdgeRow, ...]
    prompt: str
    """Whose graph is drawn."""
    points: tuple[GraphPoint, ...]
    links: tuple[GraphLink, ...]


def sections(result: Result) -> list[Section]:
    """What is shown, the verdict first."""
    return [_upstream_section(result), _edge_section(result), _graph_section(result)]


def _upstream_section(result: Result) -> Section:
    blocks: list[Block] = [Text(_upstream_verdict(result), "verdict")]
    for drawn in result.draws:
        rows = [
            [
                "all" if row.feature is None else str(row.feature),
                measure(row.before),
                measure(row.harmless),
                estimate_text(row.of_excess),
                estimate_text(row.drop),
                estimate_text(row.random),
                estimate_text(row.difference),
            ]
            for row in result.drops
            if row.factor == drawn.factor
        ]
        one, sets = drawn.one_more, len(drawn.draws)
        caption = (
            "Relative fall of the mean activation over the post-instruction tokens; all: weighted by the norms of the "
            f"decoder rows. Of all, one more random set would lie in {span(one.low, one.high)} (p = {p_text(one.p)}; "
            f"at least {p_text(1 / (1 + sets))} with {sets} sets). 95 % intervals over test prompts."
        )
        columns = (
            "refusal feature | > activation, harmful | > harmless | > fall, of what harm adds: harmful less harmless "
            f"| > fall, harm features | > fall, random features: mean over {sets} sets | > difference"
        )
        title = f"Refusal features with harm features scaled by {short_number(drawn.factor)}"
        blocks.append(Table.of(title, columns, rows, caption=caption, strong=[0]))
    intro = (
        "If harm features drive refusal, suppressing them (from their first peaks on) must lower the refusal features "
        "more than suppressing random features of the same layers, firing rates and sizes does. An interval of the "
        "difference that holds zero, or a fall within the range of one more random set, would refute it."
    )
    return Section("From harm to refusal", tuple(blocks), brief=True, intro=intro)


def _upstream_verdict(result: Result) -> str:
    said: list[str] = []
    for drawn in result.draws:
        row = next(row for row in result.drops if row.factor == drawn.factor)
        one = drawn.one_more
        outside = row.difference.low > 0 and not one.low <= row.drop.value <= one.high
        said.append(
            f"scaled by {short_number(drawn.factor)}, by {estimate_text(row.drop)} of their activation, which is "
            f"{estimate_text(row.of_excess)} of what harmful prompts add to it (random features: "
            f"{estimate_text(row.random)}; {'beyond' if outside else 'within'} the range of one more random set, "
            f"{span(one.low, one.high)})"
        )
    return (
        f"{len(result.harm)} harm features lower {len(result.refusal)} refusal features downstream: {'; '.join(said)}."
    )


_NAMES: Final[dict[Paths, str]] = {"kept": "all paths kept", "stopped": "paths through other features stopped"}


def _edge_section(result: Result) -> Section:
    checks = [
        [_NAMES[c.paths], c.edges, c.nonzero, estimate_text(c.spearman), rate_text(c.same_sign)] for c in result.checks
    ]
    columns = "edges | > n | > n not 0 | > rank correlation | > same sign"
    check = Table.of("Estimated against measured edges", columns, checks, caption="95 % intervals over test prompts.")
    strongest = [row for paths in PATHS for row in [r for r in result.edges if r.paths == paths][:15]]
    rows = [
        [
            row.paths,
            f"{row.source}{' (harm)' * row.from_harm}",
            str(row.target),
            measure(row.estimated),
            estimate_text(row.measured),
        ]
        for row in strongest
        if row.measured.value
    ]
    table = Table.of("The strongest edges", "paths | source | target | > estimated | > measured", rows, folded=True)

    def draw() -> Any:
        series = [
            charts.Series(
                _NAMES[paths],
                tuple(charts.Point(r.estimated, r.measured.value) for r in result.edges if r.paths == paths),
                "none",
            )
            for paths in PATHS
        ]
        return charts.scatter(series, x_title="estimated: activation × gradient", y_title="measured: feature taken out")

    chart = Chart("Edges, estimated and measured", draw, "The line is where both agree.")
    intro = (
        "An edge is what a feature contributes to a refusal feature in a later layer. With stopped paths the other "
        "features of the graph are held, so that only what goes past them counts. A gradient is a promise: where rank "
        "correlation with really taking features out is low, estimated edges say nothing."
    )
    return Section("Edges", (check, chart, table), intro=intro)


_SHOWN: Final = 40
"""Edges of the graph in its table; graph.json has all."""


def _graph_section(result: Result) -> Section:
    def draw() -> Any:
        nodes = [charts.Node(p.node, p.label, p.kind, p.layer, p.position, p.token) for p in result.points]
        return charts.graph_chart(nodes, [charts.Link(*link.model_dump().values()) for link in result.links])

    kinds = {p.node: p for p in result.points}
    rows = [
        [_name(kinds[link.source]), _name(kinds[link.target]), measure(link.weight)]
        for link in sorted(result.links, key=lambda link: -abs(link.weight))[:_SHOWN]
    ]
    blocks: tuple[Block, ...] = (
        Chart(
            "The graph of one prompt",
            draw,
            "From the prompt's tokens (below) to the logits (above); of the edges into a node, the four strongest. "
            "Solid: the source raises the target; dashed: it lowers it. Wider: stronger, among those into one node.",
        ),
        Table.of(
            f"Its {len(rows)} strongest of {len(result.links)} edges", "source | target | > weight", rows, folded=True
        ),
        Text(
            "graph.json in the run folder holds it as an attribution graph, for Neuronpedia and circuit-tracer.", "note"
        ),
    )
    intro = (
        f"Harm and refusal features at the tokens where they fire, on the first refused test prompt: "
        f"“{result.prompt}”. Estimated with stopped paths and pruned by influence on the logits. One prompt is an "
        "illustration, not evidence."
    )
    return Section("Graph", blocks, intro=intro)


def _name(point: GraphPoint) -> str:
    if point.kind == "logit":
        return f"logit {token_text(point.label)}"
    place = f"{token_text(point.token)} ({point.position})"
    return f"token {place}" if point.kind == "token" else f"{point.kind} {point.label} at {place}"
