"""`demur circuit` where every activation and edge is a given number: falls, edges, checks and the graph's points."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from table_model import ABLATED, Done, TableModel, bare, features_of, splits_of, use

from demur.errors import ModelError
from demur.method.attribution import Pool
from demur.method.direction import Direction
from demur.method.edges import GraphNode, PromptGraph
from demur.stats import Estimate, bootstrap_of
from demur.studies.circuit import Config, run
from demur.studies.circuit.sections import Result
from demur.studies.methods import RandomMatched
from demur.studies.roles import FeatureRole, Role, Roles
from demur.types import FeatureId

H1, H2, R1, R2 = FeatureId(0, 1), FeatureId(1, 2), FeatureId(1, 5), FeatureId(2, 6)
TOO_LATE, TOO_EARLY, BOTH = FeatureId(2, 8), FeatureId(0, 9), FeatureId(1, 3)
NORMS = {R1: 1.0, R2: 3.0}
RANDOM = (FeatureId(0, 100), FeatureId(0, 101))
# What is left of R1 and R2 with features scaled by 0; by −3, half of that.
LEFT = {(H1, H2, BOTH): (0.5, 0.25), RANDOM[:1]: (1.0, 0.8), RANDOM[1:]: (0.6, 1.0)}


def rule(done: Done) -> float:
    """Test prompt 2 is answered, and harmless prompt 1 refused."""
    answered = done.prompt.label == "harmless"
    odd = done.prompt.id in ("test2", "+test1")
    return 1.0 if answered == odd else -1.0


def roles(*rows: tuple[FeatureId, Role]) -> Roles:
    share = Estimate(value=0.1, low=0.1, high=0.1, n=3)
    return Roles(
        features=tuple(FeatureRole(feature=f, role=r, instruction=1, post_instruction=0, share=share) for f, r in rows)
    )


class Given:
    """What the study reads in the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, harmless: Any = None, **options: Any) -> None:
        asked: dict[str, Any] = {"factors": (0.0, -3.0), "random_sets": 2, "seed": 4, "edge_prompts": 2}
        config = Config(**(asked | options))
        self.work = TableModel(rule, config, splits_of(selection=3, test=4))
        direction = bare(Direction, ablate=lambda: SimpleNamespace(bind=lambda: ABLATED))
        pool = Pool(features=(R1, R2), cosines=(0.5, 0.4))
        self.found = self.work.found(features_of(R1), ids=(1, 2), pool=pool, direction=direction)
        use(monkeypatch, self.work, self.found)
        self.drawn, self.pruned, self.edges_of = list[Any](), list[Any](), list[Any]()
        self.harmless = np.array([[0.5, 1.0]] * 3 if harmless is None else harmless)
        work = self.work
        work.suite = {layer: SimpleNamespace(rows=lambda n, layer=layer: self.rows(layer, n)) for layer in range(4)}
        work.inputs = SimpleNamespace(title="a model", saes_title="some SAEs")
        work.model.batch = lambda items: items
        work.model.last_logits = self.logits
        work.model.tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{n}>" for n in ids))
        edges = "demur.method.edges."
        monkeypatch.setattr(edges + "suppression_effect", self.suppressed)
        monkeypatch.setattr(edges + "post_means", self.means)
        monkeypatch.setattr(edges + "estimate_edges", lambda *a, **k: self.table(*a, **k, exact=False))
        monkeypatch.setattr(edges + "intervene_edges", lambda *a, **k: self.table(*a, **k, exact=True))
        monkeypatch.setattr(edges + "prompt_graph", self.graph)
        monkeypatch.setattr(edges + "pruned", lambda graph, *shares: (self.pruned.append(shares), graph)[1])
        monkeypatch.setattr("demur.studies.roles.harm_features", self.harm)
        monkeypatch.setattr("demur.studies.roles.find_roles", self.refusal)
        monkeypatch.setattr(RandomMatched, "draw", self.draw)
        self.roles: list[tuple[FeatureId, Any]] = [
            (R1, "refusal"),
            (R2, "refusal"),
            (TOO_EARLY, "refusal"),
            (BOTH, "refusal"),
            (H1, "mixed"),
        ]
        self.harms = [H1, H2, BOTH, TOO_LATE]

    def harm(self, work: Any, found: Any, k: int) -> Roles:
        assert (work, found) == (self.work, self.found)
        assert k == self.work.config.harm_features
        rows: list[tuple[FeatureId, Role]] = [(f, "harm") for f in self.harms]
        return roles(*rows, (FeatureId(0, 77), "mixed"))

    def refusal(self, work: Any, found: Any) -> Roles:
        assert (work, found) == (self.work, self.found)
        return roles(*self.roles)

    def rows(self, layer: int, indices: Any) -> Any:
        (index,) = indices
        return SimpleNamespace(w_dec=torch.tensor([[NORMS[FeatureId(layer, index)]]]))

    def draw(self, given: Any, seeds: Any) -> Any:
        self.drawn.append((given.found.chosen, given.k, tuple(seeds)))
        return tuple(features_of(feature) for feature, _ in zip(RANDOM, seeds, strict=True))

    def suppressed(self, model: Any, suite: Any, items: Any, features: Any, downstream: Any, *, factor: float) -> Any:
        assert (model, suite) == (self.work.model, self.work.suite)
        assert [item.prompt_id for item in items] == ["test0", "test1", "test3"]
        assert downstream == (R1, R2)
        before = np.array([[2.0 * n, 1.0 * n] for n in (1, 2, 3)])
        return before, before * LEFT[tuple(features)] * (1.0 if factor == 0 else 0.5)

    def means(self, model: Any, suite: Any, items: Any, features: Any) -> np.ndarray:
        assert (model, suite) == (self.work.model, self.work.suite)
        assert [item.prompt_id for item in items] == ["+test0", "+test2", "+test3"][: len(items)]
        assert features == (R1, R2)
        return self.harmless

    def table(
        self, model: Any, suite: Any, items: Any, features: Any, *, paths: str, progress: Any, exact: bool
    ) -> np.ndarray:
        """Of two prompts; source and target by place: H1, H2, BOTH, R1, R2. What leads to no refusal feature is large,
        and not to be looked at."""
        assert (model, suite) == (self.work.model, self.work.suite)
        self.edges_of.append((paths, exact, [item.prompt_id for item in items]))
        assert features == (H1, H2, BOTH, R1, R2)
        progress(1, 2)
        one = np.full((5, 5), 50.0)
        one[0, 3:], one[1:4, 4] = (4.0, -2.0), (1.0, 0.0, 3.0)
        if paths == "stopped":
            one[0, 4] = 0.0
        if not exact:
            one = one + 0.5
            one[2, 4] = 0.001
        else:
            # A ten-thousandth of the largest: rounding below it.
            one[2, 4] = 0.0049
        return np.stack([one, one * 3])

    def logits(self, _batch: Any) -> torch.Tensor:
        ablated = self.work.open == ABLATED
        return torch.tensor([[0.0, 5.0, 6.0, 7.0, 1.0] if not ablated else [3.0, 9.0, 9.0, 1.0, 4.0]])

    def graph(self, model: Any, suite: Any, item: Any, features: Any, logits: Any) -> PromptGraph:
        assert (model, suite) == (self.work.model, self.work.suite)
        assert (item.prompt_id, features, logits) == ("test0", (H1, H2, BOTH, R1, R2), (2, 4))
        nodes = (
            GraphNode("token", -1, 0, None, 7, 1.0),
            GraphNode("feature", 0, 1, H1, -1, 2.0),
            GraphNode("feature", 2, 1, R2, -1, 3.0),
            GraphNode("logit", 4, 1, None, 2, 0.75),
        )
        weights = np.zeros((4, 4))
        weights[1, 0], weights[2, 1], weights[3, 2] = 0.5, -1.5, 2.5
        return PromptGraph(nodes, weights, np.array([0.1, 0.2, 0.3, 0.4]))

    def run(self) -> Result:
        return run(self.work)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    return Given(monkeypatch)


def test_a_circuit_is_harm_features_before_refusal_features(given: Given) -> None:
    result = given.run()
    assert (result.harm, result.refusal) == ((H1, H2, BOTH), (R1, R2))
    assert given.work.watched == ["tuning0", "tuning1", "+tuning0", "+tuning1"]


@pytest.mark.parametrize(
    ("harms", "refusals", "said"),
    [
        ([], [R1], "0 harm features and 1 refusal features"),
        ([H1], [], "1 harm features and 0 refusal"),
        ([H2], [R1], "1 harm features and 1 refusal"),
        ([TOO_LATE], [R1, R2], "1 harm features and 2 refusal"),
    ],
)
def test_without_one_before_the_other_there_is_none(given: Given, harms: Any, refusals: Any, said: str) -> None:
    given.harms, given.roles = harms, [(f, "refusal") for f in refusals]
    with pytest.raises(ModelError, match=said):
        given.run()


def test_too_few_refused_test_prompts_are_named(given: Given) -> None:
    given.work.rule = lambda done: 1.0 if done.prompt.id == "test3" else -1.0
    with pytest.raises(ModelError, match="refuses 1 of the 4 harmful test prompts"):
        given.run()


def test_falls_are_shares_of_what_was_there_weighted_by_what_each_feature_writes(given: Given) -> None:
    result = given.run()
    rows = {(row.factor, row.feature): row for row in result.drops}
    assert list(rows) == [(c, f) for c in (0.0, -3.0) for f in (None, R1, R2)]
    # Means of n = 1, 2, 3: 4 and 2, with norms of 1 and 3 together 10; of which 2 and ½, together 3.5, are left.
    assert [rows[0.0, f].before for f in (None, R1, R2)] == [10.0, 4.0, 2.0]
    assert [rows[0.0, f].drop.value for f in (None, R1, R2)] == pytest.approx([0.65, 0.5, 0.75])
    assert [rows[-3.0, f].drop.value for f in (None, R1, R2)] == pytest.approx([0.825, 0.75, 0.875])
    # Harmless prompts have ½ and 1: together 3.5. So of 6.5, 3.5 and 1.
    assert [rows[0.0, f].harmless for f in (None, R1, R2)] == [3.5, 0.5, 1.0]
    assert [rows[0.0, f].of_excess.value for f in (None, R1, R2)] == pytest.approx([1.0, 2 / 3.5, 1.5])
    # Random sets leave 1 and .8, and .6 and 1: on average .8 and .9.
    assert [rows[0.0, f].random.value for f in (None, R1, R2)] == pytest.approx([0.14, 0.2, 0.1])
    assert [rows[0.0, f].difference.value for f in (None, R1, R2)] == pytest.approx([0.51, 0.3, 0.65])
    assert {row.drop.n for row in result.drops} == {3}
    for drawn, expected in zip(result.draws, ((0.12, 0.16), (0.56, 0.58)), strict=True):
        assert drawn.draws == pytest.approx(expected)
    assert [(drawn.factor, round(drawn.one_more.p, 6)) for drawn in result.draws] == [
        (0.0, round(1 / 3, 6)), (-3.0, round(1 / 3, 6)),
    ]  # fmt: skip
    ((like, k, seeds),) = given.drawn
    assert (like.features, like.scores, k, seeds) == ((H1, H2, BOTH), (0.0,) * 3, 3, (4, 5))
    told = [told for told in given.work.told if told[0].startswith("suppression upstream")]
    assert told == [(f"suppression upstream, c = {c}", n, 3) for c in ("0", "-3") for n in (1, 2, 3)]


@pytest.mark.parametrize("harmless", [[[0.5, 2.0]] * 3, np.zeros((0, 2))])
def test_no_excess_over_harmless_prompts_has_no_fall(monkeypatch: pytest.MonkeyPatch, harmless: Any) -> None:
    made = Given(monkeypatch, harmless)
    if not len(made.harmless):
        made.work.rule = lambda done: 1.0 if done.prompt.id.startswith("+test") else rule(done)
    rows = {row.feature: row for row in made.run().drops if row.factor == 0}
    # R2 is 2 on harmful prompts.
    assert np.isnan(rows[R2].of_excess.value)
    assert np.isnan(rows[R1].of_excess.value) == np.isnan(rows[R1].harmless) == (not len(made.harmless))
    assert rows[R2].drop.value == pytest.approx(0.75)


def test_edges_lead_to_refusal_features_in_later_layers_strongest_first(given: Given) -> None:
    result = given.run()
    kept = [(r.source, r.target, r.from_harm, r.estimated, r.measured.value) for r in result.edges if r.paths == "kept"]
    # Means of a prompt's weight and of three times it.
    assert kept == [
        (H1, R1, True, 9.0, 8.0), (R1, R2, False, 7.0, 6.0), (H1, R2, True, -3.0, -4.0), (H2, R2, True, 3.0, 2.0),
        # Below a ten-thousandth of 150.5, on one prompt or on both.
        (BOTH, R2, True, 0.0, 0.0),
    ]  # fmt: skip
    sizes = [abs(row.measured.value) for row in result.edges]
    assert sizes == sorted(sizes, reverse=True)
    assert {row.measured.n for row in result.edges} == {2}
    stopped = {(r.source, r.target): r.measured.value for r in result.edges if r.paths == "stopped"}
    assert stopped[H1, R2] == 0.0
    assert given.edges_of == [(paths, exact, ["test0", "test1"]) for paths in ("kept", "stopped") for exact in (0, 1)]
    assert [told[0] for told in given.work.told if told[0].startswith("edges")] == [
        f"edges, {paths} paths: {how}" for paths in ("kept", "stopped") for how in ("estimated", "measured")
    ]


def test_checks_leave_out_edges_that_are_nothing(given: Given) -> None:
    kept, stopped = given.run().checks
    assert (kept.paths, kept.edges, kept.nonzero) == ("kept", 5, 4)
    assert (stopped.paths, stopped.edges, stopped.nonzero) == ("stopped", 5, 3)
    assert (kept.same_sign.value, stopped.same_sign.value) == (1.0, 1.0)
    assert kept.spearman.value == pytest.approx(1.0)
    # Estimated 9, .5, 3, 0 and 7, measured 8, 0, 2, 0 and 6: two share the last place.
    assert stopped.spearman.value == pytest.approx(np.corrcoef([5, 2, 3, 1, 4], [5, 1.5, 3, 1.5, 4])[0, 1])


def test_an_estimate_of_the_other_sign_is_counted(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.method.edges.estimate_edges", lambda *a, **k: -given.table(*a, **k, exact=False))
    kept, _ = given.run().checks
    assert kept.same_sign.value == 0.0
    monkeypatch.setattr("demur.method.edges.intervene_edges", lambda *a, **k: 0 * given.table(*a, **k, exact=True))
    given.work.stages.clear()
    kept, _ = given.run().checks
    assert (kept.nonzero, np.isnan(kept.same_sign.value)) == (0, True)


def test_the_graph_is_of_the_first_refused_prompt_and_its_likeliest_tokens(given: Given) -> None:
    result = given.run()
    assert (result.prompt, given.pruned) == ("test 0", [(0.9, 0.98)])
    points = [(p.node, p.kind, p.label, p.layer, p.position, p.token, p.value, p.influence) for p in result.points]
    assert points == [
        ("E_7_0", "token", "<7>", -1, 0, "<7>", 1.0, 0.1), ("0_1_1", "harm", "0:1", 0, 1, "<8>", 2.0, 0.2),
        ("2_6_1", "refusal", "2:6", 2, 1, "<8>", 3.0, 0.3), ("5_2_1", "logit", "<2>", 4, 1, "<8>", 0.75, 0.4),
    ]  # fmt: skip
    assert [(link.source, link.target, link.weight) for link in result.links] == [
        ("E_7_0", "0_1_1", 0.5), ("0_1_1", "2_6_1", -1.5), ("2_6_1", "5_2_1", 2.5),
    ]  # fmt: skip
    made = json.loads(given.work.saved["graph.json"])
    about = made["metadata"]
    assert (about["prompt"], about["prompt_tokens"]) == ("<7><8>", ["<7>", "<8>"])
    assert (about["scan"], about["transcoder_list"]) == ("a-model", ["some-SAEs"])
    assert about["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 0.98}
    assert made["qParams"]["supernodes"] == [["harm feature", "0_1_1"], ["refusal feature", "2_6_1"]]


def test_the_interval_of_a_fall_resamples_prompts(given: Given) -> None:
    """Where every prompt falls by the same share there is no width; of the excess there is none either."""
    row = given.run().drops[0]
    assert (row.drop.low, row.drop.high) == pytest.approx((0.65, 0.65))
    table = np.array([[5.0 * n, 1.75 * n] for n in (1, 2, 3)])
    expected = bootstrap_of(
        lambda m, rest: (m[..., 0] - m[..., 1]) / (m[..., 0] - rest[..., 0]), table, np.full((3, 1), 3.5)
    )
    assert (row.of_excess.low, row.of_excess.high) == pytest.approx((expected.low, expected.high))
