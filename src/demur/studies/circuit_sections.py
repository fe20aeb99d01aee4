"""What the study `circuit` finds, and how it is shown."""

from __future__ import annotations

from typing import Any, Final, Literal

from demur.report.blocks import Block, Chart, Section, Table, Text
from demur.report.charts import Link, Node, Point, Series, graph_chart, scatter
from demur.report.format import estimate_text, measure, p_text, rate_text, short_number, span, token_text
from demur.stats import Estimate, OneMoreDraw
from demur.studies.base import StudyResult
from demur.types import FeatureField, Value

Paths = Literal["kept", "stopped"]
PATHS: Final[tuple[Paths, ...]] = ("kept", "stopped")


class DropRow(Value):
    """Relative fall of a refusal feature's mean activation over the post-instruction tokens (None: of all together,
    each weighted by the norm of its decoder row): under the harm features' suppression, and under random sets'."""

    feature: FeatureField | None
    before: float
    drop: Estimate
    random: Estimate
    difference: Estimate


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
    factor: float
    harm: tuple[FeatureField, ...]
    refusal: tuple[FeatureField, ...]
    drops: tuple[DropRow, ...]
    draws: tuple[float, ...]
    """Fall of all refusal features under each random set."""
    one_more: OneMoreDraw
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
    whole, draw = result.drops[0], result.one_more
    clear = whole.difference.low > 0 and not draw.low <= whole.drop.value <= draw.high
    finding = "drive the refusal features" if clear else "are not clearly apart from random features"
    verdict = (
        f"Harm features {finding}: {len(result.harm)} of them, scaled by {short_number(result.factor)} from their "
        f"first peaks on, lower {len(result.refusal)} refusal features by {estimate_text(whole.drop)} of their "
        f"activation; {len(result.draws)} matched random sets lower them by {estimate_text(whole.random)} "
        f"(from {span(min(result.draws), max(result.draws)).replace('–', ' to ')})."
    )
    rows = [
        [
            "all" if row.feature is None else str(row.feature),
            measure(row.before),
            estimate_text(row.drop),
            estimate_text(row.random),
            estimate_text(row.difference),
        ]
        for row in result.drops
    ]
    columns = (
        "refusal feature | > activation, clean | > fall, harm features | > fall, random features: mean over sets | "
        "> difference"
    )
    caption = (
        "Relative fall of the mean activation over the post-instruction tokens; all: each weighted by the norm of its "
        f"decoder row. One more random set would lie in {span(draw.low, draw.high)} (p = {p_text(draw.p)}, at least "
        f"{p_text(1 / (1 + len(result.draws)))} with {len(result.draws)} sets). 95 % intervals over test prompts."
    )
    table = Table.of("Refusal features under suppression upstream", columns, rows, caption=caption, strong=[0])
    intro = (
        "If harm features drive refusal, suppressing them must lower the refusal features more than suppressing random "
        "features of the same layers, firing rates and sizes does. An interval of the difference that holds zero "
        "would refute it."
    )
    return Section("From harm to refusal", (Text(verdict, "verdict"), table), brief=True, intro=intro)


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
            Series(
                _NAMES[paths],
                tuple(Point(r.estimated, r.measured.value) for r in result.edges if r.paths == paths),
                "none",
            )
            for paths in PATHS
        ]
        return scatter(series, x_title="estimated: activation × gradient", y_title="measured: feature taken out")

    chart = Chart("Edges, estimated and measured", draw, "The line is where both agree.")
    intro = (
        "An edge is what a feature contributes to a refusal feature in a later layer. With stopped paths the other "
        "features of the graph are held, so that only what goes past them counts. A gradient is a promise: where rank "
        "correlation with really taking features out is low, estimated edges say nothing."
    )
    return Section("Edges", (check, chart, table), intro=intro)


def _graph_section(result: Result) -> Section:
    def draw() -> Any:
        nodes = [Node(p.node, p.label, p.kind, p.layer, p.position, p.token) for p in result.points]
        return graph_chart(nodes, [Link(*link.model_dump().values()) for link in result.links])

    kinds = {p.node: p for p in result.points}
    rows = [
        [_name(kinds[link.source]), _name(kinds[link.target]), measure(link.weight)]
        for link in sorted(result.links, key=lambda link: -abs(link.weight))
    ]
    blocks: tuple[Block, ...] = (
        Chart(
            "The graph of one prompt",
            draw,
            "From the prompt's tokens (below) to the logits (above). Solid: the source raises the target; dashed: it "
            "lowers it. Wider: stronger, among the edges into one target.",
        ),
        Table.of("Its edges", "source | target | > weight", rows, folded=True),
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
