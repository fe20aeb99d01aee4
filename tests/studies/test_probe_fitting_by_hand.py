"""What `demur probes` reads, fits and chooses, where every reading of a prompt is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from table_model import TableModel, bare, features_of, in_order

from demur.errors import InputError
from demur.guard import Probe, Reading
from demur.guard.probes import Labelled
from demur.method.direction import Direction
from demur.method.likelihood import TokenLoss
from demur.method.selection import Pool
from demur.model import Region, TokenizedPrompt
from demur.studies.gauge import Gauge
from demur.studies.methods import RandomMatched
from demur.studies.pipeline import Found
from demur.studies.probes import fitting
from demur.studies.probes.fitting import Arrays, Bench, Fitted, Representation, winner_of
from demur.studies.probes.inputs import Chosen
from demur.studies.probes.results import (
    ALL_FEATURES,
    BOTH,
    CENTROIDS,
    COSSIM,
    DENSE,
    DENSE_LAST,
    HARM,
    KEYWORDS,
    PERPLEXITY,
    RANDOM,
    REFUSAL,
    ProbeRow,
    Target,
)
from demur.types import FeatureId, FeatureSet, Prompt, PromptSet

H, R, S, OUT = FeatureId(0, 1), FeatureId(2, 2), FeatureId(2, 5), FeatureId(1, 7)
Table = Callable[[str, Reading], Any]
"""Text and reading → values."""


def named(name: str, *texts: str) -> PromptSet:
    return PromptSet(name=name, prompts=tuple(Prompt(id=f"{name}:{n}", text=t) for n, t in enumerate(texts)))


def chosen(name: str, bad: tuple[str, ...], good: tuple[str, ...], refuse: Any = None) -> Chosen:
    """Unless it is said what was refused, that is whatever is not harmful."""
    labels = np.repeat([True, False], [len(bad), len(good)])
    return Chosen(named(name, *bad, *good), labels, 1.0 - labels if refuse is None else np.array(refuse))


NOBODY = chosen("nobody", (), ())


def bench_of(*parts: Chosen, work: TableModel | None = None, **changes: Any) -> Bench:
    """A bench on a model of three layers. F* are two refusal features, and there is one harm feature."""
    if work is None:
        work = TableModel(lambda _: 0.0, SimpleNamespace(seed=3))
        work.model.n_layers, work.suite = 3, SimpleNamespace(layers=(0, 2))
    found = {
        "direction": bare(Direction, vector="the direction"),
        "pool": Pool(features=(R, S, OUT), cosines=(0.3, 0.2, 0.1)),
    }
    gauge = {"harm": (H,), "refusal": (R, S)}
    given = (
        bare(Found, **{name: changes.get(name, each) for name, each in found.items()}),
        bare(Gauge, **{name: changes.get(name, each) for name, each in gauge.items()}),
    )
    train, choice, validation = (*parts, NOBODY, NOBODY, NOBODY)[:3]
    return Bench(work, *given, train, choice, validation)


def reading_from(monkeypatch: pytest.MonkeyPatch, work: Any, table: Table) -> list[tuple[Any, ...]]:
    """Let readings be those of the table; gives what is read of how many prompts."""
    read: list[tuple[Any, ...]] = []

    def read_prompts(model: Any, prompts: Any, readings: Any, suite: Any, progress: Any) -> list[np.ndarray]:
        assert (model, suite) == (work.model, work.suite)
        read.append((tuple(each.text for each in prompts), readings))
        progress(1, 2)
        return [np.array([table(p.text, each) for p in prompts], np.float32) for each in readings]

    monkeypatch.setattr(fitting, "read_prompts", read_prompts)
    return read


def dense(layer: int, pooling: Any = "mean") -> Reading:
    return Reading(kind="dense", layer=layer, pooling=pooling)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_arrays_come_back_in_their_order() -> None:
    values = (*(np.full(2, float(n)) for n in range(11)), np.arange(3.0)[::-1])
    tensors, meta = Arrays(values).to_parts()
    back = Arrays.from_parts(dict(sorted(tensors.items())), meta).values
    assert [each.tolist() for each in back] == [*([n, n] for n in range(11)), [2, 1, 0]]


def test_readings_come_from_one_pass_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    work: Any = bench.context
    read = reading_from(monkeypatch, work, lambda text, reading: [len(text), reading.layer])
    one, two = named("one", "a", "bcd"), named("two", "ef")
    for _ in range(2):
        first, second = bench.read(one, [dense(0), dense(2)], "both")
        assert (first.tolist(), second.tolist()) == ([[1, 0], [3, 0]], [[1, 2], [3, 2]])
    # Other readings are read, and other prompts.
    assert [each.tolist() for each in bench.read(one, [dense(2)], "layer 2")] == [[[1, 2], [3, 2]]]
    assert [each.tolist() for each in bench.read(two, [dense(2)], "two")] == [[[2, 2]]]
    assert bench.read(two, [], "nothing") == ()
    assert all(key.startswith("readings ") for key in work.stages)
    assert read == [
        (("a", "bcd"), (dense(0), dense(2))), (("a", "bcd"), (dense(2),)), (("ef",), (dense(2),)),
    ]  # fmt: skip
    assert [told[1:] for told in work.told] == [(1, 2)] * 3
    assert [told[0].endswith(what) for told, what in zip(work.told, ("both", "layer 2", "two"), strict=True)] == [
        True, True, True,
    ]  # fmt: skip


def tokenized(text: str) -> TokenizedPrompt:
    """A token for each letter: `h` of the header, `i` of the user's words, `p` after them."""
    regions = {"h": Region.SPECIAL, "i": Region.INSTRUCTION, "p": Region.POST_INSTRUCTION}
    return TokenizedPrompt(text, tuple(range(len(text))), tuple(int(regions[letter]) for letter in text))


def test_what_follows_the_user_s_words_is_not_scored() -> None:
    S, R, P = int(Region.SPECIAL), int(Region.RESPONSE), int(Region.POST_INSTRUCTION)
    for text, regions in (
        ("hhiiipp", (S, S, R, R, R)),
        ("iihi", (R, R, S, R)),
        ("ihp", (R,)),
        ("hpp", (S, P, P)),
    ):
        item = fitting._counted(tokenized(text))
        assert (item.prompt_id, item.ids, item.regions) == (text, tuple(range(len(regions))), regions)


def test_perplexity_is_the_mean_loss_of_the_user_s_words(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    work: Any = bench.context
    work.model.tokenize = lambda prompts: [tokenized(prompt.text) for prompt in prompts]
    asked: list[int] = []

    def losses(model: Any, items: Any) -> Iterator[TokenLoss]:
        assert model is work.model
        asked.append(len(items))
        for item in items:
            yield TokenLoss(prompt_id=item.prompt_id, nats=6.0, tokens=item.regions.count(Region.RESPONSE))

    monkeypatch.setattr(fitting, "token_losses", losses)
    for _ in range(2):
        found = bench.perplexity(named("one", "hiiipp", "hiip", "hp"))
        assert (found.tolist(), found.dtype) == ([[2.0], [3.0], [6.0]], np.float32)
    assert bench.perplexity(named("two", "hip")).tolist() == [[6.0]]
    assert asked == [3, 1]


# -- representations ---------------------------------------------------------------------------------------------------


def controls(monkeypatch: pytest.MonkeyPatch, work: Any, drawn: Any) -> list[tuple[Any, ...]]:
    """CosSim features are named by how many are asked for, random ones are `drawn`; gives what random ones are to be
    like."""
    asked: list[tuple[Any, ...]] = []

    def cossim(suite: Any, vector: Any, k: int) -> FeatureSet:
        assert (suite, vector) == (work.suite, "the direction")
        return features_of(FeatureId(8, k))

    def random(like: FeatureSet, measures: Any, *, exclude: Any, seed: int) -> FeatureSet:
        given, layers = measures
        assert given.work is work
        asked.append((like.features, exclude, seed, given.found.pool.features, given.k, layers))
        return drawn(len(asked))

    monkeypatch.setattr(fitting, "cossim_set", cossim)
    monkeypatch.setattr(fitting, "random_set", random)
    monkeypatch.setattr(RandomMatched, "measures", staticmethod(lambda given, layers: (given, layers)))
    return asked


def one_random(n: int) -> FeatureSet:
    return features_of(FeatureId(9, n))


def test_every_representation_reads_all_layers_or_all_poolings(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    asked = controls(monkeypatch, bench.context, one_random)
    found = {each.name: each for each in bench.representations}
    words = [("instruction", 0), ("instruction", 1), ("instruction", 2), ("mean", 0), ("mean", 1), ("mean", 2)]
    words += [("max", 0), ("max", 1), ("max", 2)]
    last = [("last", 0), ("last", 1), ("last", 2)]
    read = {name: [(each.pooling, each.layer) for each in one.readings] for name, one in found.items()}
    assert {name: read[name] for name in (DENSE, DENSE_LAST, CENTROIDS)} == {
        DENSE: words, DENSE_LAST: last, CENTROIDS: words + last,
    }  # fmt: skip
    features = {name: {each.features for each in found[name].readings} for name in list(found)[3:]}
    assert features == {
        HARM: {(H,)}, REFUSAL: {(R, S)}, BOTH: {(H, R, S)}, COSSIM: {(FeatureId(8, 3),)}, RANDOM: {(FeatureId(9, 1),)},
    }  # fmt: skip
    assert list(features) == [HARM, REFUSAL, BOTH, COSSIM, RANDOM]
    assert all(
        [each.pooling for each in found[name].readings] == ["last", "instruction", "mean", "max"] for name in features
    )
    assert [name for name, each in found.items() if each.centroids] == [CENTROIDS]
    assert not any(each.l1 for each in found.values())
    assert asked == [((H, R, S), (R, S, OUT), 3, (R, S, OUT), 3, (0, 2))]
    # Without harm features, refusal features stand alone.
    none = bench_of(harm=())
    controls(monkeypatch, none.context, one_random)
    assert [each.name for each in none.representations][3:] == [REFUSAL, COSSIM, RANDOM]


def test_random_features_are_drawn_anew_for_whatever_they_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    work: Any = bench.context
    controls(monkeypatch, work, one_random)

    def drawn(**changes: Any) -> int:
        ((_, index),) = bench_of(work=work, **changes)._random()
        return index

    assert (drawn(), drawn()) == (1, 1)
    assert (drawn(pool=Pool(features=(R,), cosines=(0.3,))), drawn(harm=())) == (2, 3)
    work.config = SimpleNamespace(seed=4)
    assert (drawn(), work.warnings) == (4, [])

    def none_left(_n: int) -> FeatureSet:
        raise InputError("none is left")

    other = bench_of()
    controls(monkeypatch, other.context, none_left)
    assert RANDOM not in [each.name for each in other.representations]
    (warning,) = other.context.warnings
    assert "none is left" in warning


class Sized:
    """A dictionary of three features, and one of five in layer 5."""

    def __init__(self, *layers: int) -> None:
        self.layers = layers

    def __getitem__(self, layer: int) -> Any:
        assert layer in self.layers
        return SimpleNamespace(spec=SimpleNamespace(d_sae=5 if layer == 5 else 3))


def test_the_whole_dictionary_is_that_of_the_nearest_layer() -> None:
    bench = bench_of()
    work: Any = bench.context
    work.suite = Sized(1, 5)
    small, large = (tuple(FeatureId(layer, n) for n in range(size)) for layer, size in ((1, 3), (5, 5)))
    near = {layer: bench.all_features(layer) for layer in (None, 0, 1, 2, 4, 5, 9)}
    assert {layer: {each.features for each in one.readings} for layer, one in near.items()} == {
        None: {small}, 0: {small}, 1: {small}, 2: {small}, 4: {large}, 5: {large}, 9: {large},
    }  # fmt: skip
    assert (near[0].name, near[0].l1, near[0].centroids) == (ALL_FEATURES, True, False)
    assert [each.pooling for each in near[0].readings] == ["last", "instruction", "mean", "max"]
    work.suite = Sized(1, 0)
    assert [bench.all_features(layer).readings[0].layers for layer in (None, 0, 1)] == [(0,), (0,), (1,)]


def test_refusal_is_read_at_the_last_token_but_by_the_dense_residual() -> None:
    both = (dense(0, "mean"), dense(0, "max"), dense(1, "last"))
    asked = Representation(CENTROIDS, both, centroids=True)
    assert fitting._read_at("harmful", asked) is asked
    own = fitting._read_at("refuse", asked)
    assert own == Representation(CENTROIDS, (dense(0, "last"), dense(1, "last")), centroids=True)
    whole = Representation(DENSE, both)
    assert fitting._read_at("refuse", whole) is whole


def fitted(
    name: str, target: Target, reading: Reading, losses: Any = (0.0,), pooling: Any = "of the reading"
) -> Fitted:
    pooling = reading.pooling if pooling == "of the reading" else pooling
    row = ProbeRow(
        target=target, representation=name, pooling=pooling, layer=reading.layer, dim=1, used=1,
        loss=float(np.mean(losses)), auroc=1.0, tried=1,
    )  # fmt: skip
    probe = Probe(reading, np.ones(1, np.float32), 0.0)
    return Fitted(name, target, probe, row, np.zeros(1), np.zeros(1), np.array(losses, dtype=float))


class Noted(Bench):
    """A bench of which every probe is at a layer that is known."""

    def best(self, asked: Representation, target: Target) -> Any:
        self.tried = [*getattr(self, "tried", []), (asked, target)]
        return fitted(asked.name, target, dense(4 if asked.name == DENSE else 0))

    def _keywords(self, target: Target) -> Fitted:
        return fitted("words", target, dense(0))

    def _perplexity(self, target: Target) -> Fitted:
        return fitted("losses", target, dense(0))


@pytest.mark.parametrize("target", ["harmful", "refuse"])
def test_every_representation_is_fitted_and_the_whole_dictionary_where_the_residual_is(target: Target) -> None:
    bench: Any = object.__new__(Noted)
    words = (dense(0, "mean"), dense(1, "max"))
    bench.representations = (Representation(DENSE, words), Representation(HARM, words))
    bench.context = SimpleNamespace(suite=Sized(1, 5), each=in_order)
    found = bench.fit(target)
    assert list(found) == [DENSE, HARM, ALL_FEATURES, KEYWORDS, PERPLEXITY]
    assert [(found[name].name, found[name].target) for name in (KEYWORDS, PERPLEXITY)] == [
        ("words", target), ("losses", target),
    ]  # fmt: skip
    assert [(each.name, on) for each, on in bench.tried] == [(DENSE, target), (HARM, target), (ALL_FEATURES, target)]
    readings = {each.name: each.readings for each, _ in bench.tried}
    assert readings[DENSE] == words
    assert {each.features for each in readings[ALL_FEATURES]} == {tuple(FeatureId(5, n) for n in range(5))}
    if target == "refuse":
        assert readings[HARM] == (dense(0, "last"), dense(1, "last"))
        assert [each.pooling for each in readings[ALL_FEATURES]] == ["last"]
    else:
        assert readings[HARM] == words
        assert len(readings[ALL_FEATURES]) == 4


# -- fitting -----------------------------------------------------------------------------------------------------------


def mean_target(held: Labelled) -> float:
    """What probabilities average to where they are calibrated: each positive's by Platt is (p + 1) / (p + 2) of p,
    each negative's 1 / (n + 2) of n."""
    p, n = int(held.labels.sum()), int((~held.labels).sum())
    return (p * (p + 1) / (p + 2) + n / (n + 2)) / (p + n)


def check_row(found: Fitted, positive: np.ndarray, negative: np.ndarray) -> None:
    """A probe's figures are those of its log-odds on the validation prompts, on which it is calibrated."""
    both = [found.probe.logit(np.array(side, np.float32)) for side in (positive, negative)]
    np.testing.assert_allclose(found.positives, both[0])
    np.testing.assert_allclose(found.negatives, both[1])
    labels = np.repeat([True, False], [len(positive), len(negative)])
    chances = expit(np.concatenate(both))
    assert chances.mean() == pytest.approx(mean_target(Labelled(np.zeros((len(labels), 1)), labels)), abs=1e-3)
    losses = -np.log(np.where(labels, chances, 1 - chances))
    np.testing.assert_allclose(found.losses, losses)
    assert found.row.loss == pytest.approx(losses.mean())
    wins = both[0][:, None] - both[1][None]
    assert found.row.auroc == pytest.approx(((wins > 0) + (wins == 0) / 2).mean())
    assert found.threshold(0.01) == both[1].max()
    assert found.threshold(0.25) == np.sort(both[1])[-1 - len(negative) // 4]
    assert found.usual == pytest.approx(np.quantile(both[0], 0.05))


TRAIN = chosen("train", tuple(f"t+{n}" for n in range(4)), tuple(f"t-{n}" for n in range(4)))
CHOICE = chosen("choice", tuple(f"c+{n}" for n in range(4)), tuple(f"c-{n}" for n in range(4)))
HELD = chosen("validation", tuple(f"v+{n}" for n in range(5)), tuple(f"v-{n}" for n in range(4)))


def values_of(part: Chosen, table: Table, reading: Reading, label: bool) -> np.ndarray:
    texts = [text for text, positive in zip(part.texts, part.harmful, strict=True) if positive == label]
    return np.array([table(text, reading) for text in texts])


def by_layer(text: str, reading: Reading) -> list[float]:
    """Layer 0 tells the prompts that fit and calibrate apart, layer 1 those that fit and choose. What fits differs in
    the first value, the others in the second as well."""
    part, sign, n = text[0], 1.0 if text[1] == "+" else -1.0, int(text[2])
    wobble = (-1.0) ** n
    if part == "t":
        return [2 * sign + 0.5 * wobble, (-1.0) ** (n // 2)]
    apart = (reading.layer == 0) == (part == "v")
    return [(2 if apart else 0.3) * sign + wobble + 0.1 * n, 4 * sign + wobble]


def test_the_reading_is_chosen_on_the_choosing_prompts_and_calibrated_on_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of(TRAIN, CHOICE, HELD)
    read = reading_from(monkeypatch, bench.context, by_layer)
    found = bench.best(Representation("mine", (dense(0), dense(1))), "harmful")
    assert found.probe.reading == dense(1)
    row = found.row
    assert (found.name, found.target, row.representation, row.target) == ("mine", "harmful", "mine", "harmful")
    assert (row.pooling, row.layer, row.dim, row.tried) == ("mean", 1, 2, 2)
    check_row(found, values_of(HELD, by_layer, dense(1), True), values_of(HELD, by_layer, dense(1), False))
    assert row.auroc < 1
    # Of the prompts that fit, the second value is that of both classes.
    assert not found.probe.unit
    assert abs(found.probe.weights[1]) < 1e-3 * found.probe.weights[0]
    # The validation prompts are read by the probe that was chosen, and by no other.
    assert read == [
        (TRAIN.texts, (dense(0), dense(1))), (CHOICE.texts, (dense(0), dense(1))), (HELD.texts, (dense(1),)),
    ]  # fmt: skip


def test_a_fit_is_kept_by_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench_of(TRAIN, CHOICE, HELD)
    read = reading_from(monkeypatch, first.context, by_layer)
    work: Any = first.context

    def kept() -> int:
        return sum(name.startswith("probe ") for name in work.stages)

    asked = Representation("mine", (dense(0), dense(1)))
    once, n = first.best(asked, "harmful"), len(read)
    again = bench_of(TRAIN, CHOICE, HELD, work=work).best(asked, "harmful")
    assert (kept(), len(read), again.probe.weights.tolist()) == (1, n, once.probe.weights.tolist())
    others: list[tuple[Representation, Target, Chosen]] = [
        (replace(asked, centroids=True), "harmful", TRAIN), (replace(asked, l1=True), "harmful", TRAIN),
        (replace(asked, readings=(dense(1),)), "harmful", TRAIN), (asked, "refuse", TRAIN),
        (asked, "harmful", replace(TRAIN, harmful=~TRAIN.harmful)), (asked, "harmful", replace(CHOICE)),
    ]  # fmt: skip
    for number, (what, target, train) in enumerate(others, start=2):
        bench_of(train, CHOICE, HELD, work=work).best(what, target)
        assert kept() == number


def test_a_probe_of_centroids_points_from_one_to_the_other_whatever_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positives that fit have the mean (3, 4), negatives (5, 0), in the layer that tells the classes apart; the
    choosing prompts would give another direction."""

    def table(text: str, reading: Reading) -> list[float]:
        part, positive, n = text[0], text[1] == "+", int(text[2])
        turn = 0.2 * (n - 1.5)
        if reading.layer == 0:
            return [1.0, turn]
        if part == "t":
            return [3 + turn, 4 - turn] if positive else [5 + turn, turn]
        size = 10.0 ** (n - 2)
        return [size * (1 + turn), 3 * size] if positive else [size * 3, size * (1 + turn)]

    bench = bench_of(TRAIN, CHOICE, HELD)
    reading_from(monkeypatch, bench.context, table)
    found = bench.best(Representation(CENTROIDS, (dense(0), dense(1)), centroids=True), "harmful")
    assert (found.probe.unit, found.probe.reading, found.row.tried) == (True, dense(1), 2)
    # (0.6, 0.8) less (1, 0).
    way = found.probe.weights / np.linalg.norm(found.probe.weights)
    np.testing.assert_allclose(way, np.array([-0.4, 0.8]) / np.sqrt(0.8), atol=1e-6)
    long, short = found.probe.logit(np.array([[30.0, 40.0], [0.3, 0.4]], np.float32))
    assert long == pytest.approx(short)
    check_row(found, values_of(HELD, table, dense(1), True), values_of(HELD, table, dense(1), False))


def test_a_whole_dictionary_keeps_few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of four tells the classes apart; the others hold noise."""
    random = np.random.default_rng(0)
    noise = {text: random.normal(size=3) for part in (TRAIN, CHOICE, HELD) for text in part.texts}

    def table(text: str, _reading: Reading) -> list[float]:
        return [3.0 * (text[1] == "+") + 0.1 * int(text[2]), *noise[text]]

    bench = bench_of(TRAIN, CHOICE, HELD)
    reading_from(monkeypatch, bench.context, table)
    used = {
        l1: bench.best(Representation("all", (dense(0),), l1=l1), "harmful").row.used for l1 in (True, False)
    }  # fmt: skip
    assert used == {True: 1, False: 4}


def test_refusal_is_learned_from_answers_that_were_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of harmful prompts half were refused, and of harmless ones; an unscored one would be an outlier."""
    refuse = [1, 1, 0, 0, 1, 1, 0, 0]
    parts = [
        chosen(name, tuple(f"{name}{n}" for n in range(4)), tuple(f"{name}{n}" for n in range(4, 9)), (*refuse, np.nan))
        for name in "tcv"
    ]

    def table(text: str, _reading: Reading) -> list[float]:
        n = int(text[1])
        return [1e3 if n == 8 else 2 * refuse[n] + 0.1 * n]

    bench = bench_of(*parts)
    reading_from(monkeypatch, bench.context, table)
    found = bench.best(Representation("mine", (dense(0, "last"),)), "refuse")
    assert (found.row.auroc, len(found.positives), len(found.negatives)) == (1.0, 4, 4)
    assert found.probe.weights[0] > 0.5


def test_words_and_pairs_of_words_tell_prompts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only words that both classes share differ in their order."""
    bad = ("steal steal steal car", "red car steal", "car steal now", "fire steal")
    good = ("car red", "now car bread", "bread bread car", "fire bread")
    parts = (
        chosen("train", bad, good),
        chosen(
            "choice", ("now steal bread", "red steal red", "steal red", "now"),
            ("bread", "red bread", "red", "steal bread"),
        ),
        chosen(
            "validation", ("steal", "steal red", "bread steal", "now fire steal"),
            ("bread now", "red", "car", "fire now", "now now"),
        ),
    )  # fmt: skip
    bench = bench_of(*parts)
    tried: list[float] = []

    def made(C: float, **options: Any) -> LogisticRegression:
        tried.append(C)
        return LogisticRegression(C=C, **options)

    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", made)
    found = bench._keywords("harmful")
    # Calibration is without a penalty.
    assert [each for each in tried if each < np.inf] == [0.1, 1.0, 10.0, 100.0]
    model = bench.keywords["harmful"]
    vectors, classifier = (step for _, step in model.steps)
    assert {"steal", "steal car", "car steal", "steal steal", "bread bread"} <= set(vectors.vocabulary_)
    assert max(len(each.split()) for each in vectors.vocabulary_) == 2
    # A word that comes three times counts as 1 + ln 3 of one that comes once, beside how rare it is.
    (row,) = vectors.transform(["steal steal steal red"]).toarray()
    weights = [row[vectors.vocabulary_[word]] / vectors.idf_[vectors.vocabulary_[word]] for word in ("steal", "red")]
    assert weights[0] / weights[1] == pytest.approx(1 + np.log(3))
    # The strength is that at which the choosing prompts lose least; without calibration it would be another one.
    losses: dict[float, float] = {}
    for strength in (0.1, 1.0, 10.0, 100.0):
        one = LogisticRegression(C=strength, max_iter=5000).fit(vectors.transform(parts[0].texts), parts[0].harmful)
        scores = one.decision_function(vectors.transform(parts[1].texts))[:, None]
        side = Labelled(scores.astype(np.float32), parts[1].harmful)
        losses[strength] = Probe(dense(0), np.ones(1, np.float32), 0.0).calibrated(side).log_losses(side).mean()
    assert classifier.C == min(losses, key=losses.__getitem__) == 10.0
    words = [
        np.array(model.decision_function(list(part)))[:, None] for part in (parts[2].texts[:4], parts[2].texts[4:])
    ]
    check_row(found, *words)
    assert (found.name, found.row.pooling, found.row.layer, found.row.tried) == (KEYWORDS, None, None, 4)
    assert (found.row.dim, found.row.used) == (1, 1)
    given = bench.values(named("new", "steal"), [found], "")[KEYWORDS, "harmful"]
    assert given.tolist() == [[pytest.approx(model.decision_function(["steal"])[0])]]
    assert given.dtype == np.float32


def test_perplexity_is_a_probe_without_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model loses more on harmful prompts, but for those that choose."""
    parts = (
        chosen("train", ("5", "6", "7", "4"), ("1", "2", "3", "4.5")),
        chosen("choice", ("1", "2", "3", "2.5"), ("5", "6", "7", "5")),
        chosen("validation", ("5", "6", "7", "3", "4"), ("1", "2", "3.5", "0")),
    )
    bench = bench_of(*parts)
    work: Any = bench.context
    work.model.tokenize = lambda prompts: [TokenizedPrompt(each.text, (), ()) for each in prompts]
    monkeypatch.setattr(
        fitting,
        "token_losses",
        lambda _model, items: [TokenLoss(prompt_id="", nats=float(each.prompt_id), tokens=1) for each in items],
    )
    found = bench._perplexity("harmful")
    check_row(found, np.array([[5.0], [6], [7], [3], [4]]), np.array([[1.0], [2], [3.5], [0]]))
    row = found.row
    assert (row.representation, row.target, row.pooling, row.layer, row.tried) == (PERPLEXITY, "harmful", None, None, 1)
    assert found.probe.weights[0] > 0
    # The same for refusal, where the model refused the others.
    other = bench._perplexity("refuse")
    assert (other.target, other.row.target) == ("refuse", "refuse")
    assert other.probe.weights[0] < 0
    assert (other.row.auroc, len(other.positives)) == (found.row.auroc, 4)


# -- scoring -----------------------------------------------------------------------------------------------------------


class Words:
    """Scores a text by its length."""

    def __init__(self, times: int) -> None:
        self.times = times

    def decision_function(self, texts: list[str]) -> list[int]:
        assert isinstance(texts, list)
        return [self.times * len(text) for text in texts]


def test_what_several_probes_look_at_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of()
    read = reading_from(monkeypatch, bench.context, lambda text, reading: [len(text), reading.layer])
    monkeypatch.setattr(Bench, "perplexity", lambda _self, prompts: np.full((len(prompts), 1), 7.0, np.float32))
    bench.keywords = {"harmful": Words(2), "refuse": Words(3)}
    outside = [
        fitted(name, target, dense(0), pooling=None)
        for name in (KEYWORDS, PERPLEXITY)
        for target in ("harmful", "refuse")
    ]  # fmt: skip
    probes = [
        fitted(DENSE, "harmful", dense(2)), fitted(HARM, "harmful", dense(1)), *outside,
        fitted(DENSE, "refuse", dense(1)), fitted(CENTROIDS, "refuse", dense(0, "last")),
    ]  # fmt: skip
    prompts = named("one", "a", "bcd")
    found = bench.values(prompts, probes, "set")
    assert {key: each.tolist() for key, each in found.items()} == {
        (DENSE, "harmful"): [[1, 2], [3, 2]], (HARM, "harmful"): [[1, 1], [3, 1]], (DENSE, "refuse"): [[1, 1], [3, 1]],
        (CENTROIDS, "refuse"): [[1, 0], [3, 0]], (KEYWORDS, "harmful"): [[2], [6]], (KEYWORDS, "refuse"): [[3], [9]],
        (PERPLEXITY, "harmful"): [[7], [7]], (PERPLEXITY, "refuse"): [[7], [7]],
    }  # fmt: skip
    assert read == [(prompts.texts, (dense(2), dense(1), dense(0, "last")))]
    assert bench.context.told[0][0].endswith("set")  # pyright: ignore[reportAttributeAccessIssue]
    # Where nothing is read of the model, no pass is made.
    assert list(bench.values(named("two", "x"), outside, "")) == [(each.name, each.target) for each in outside]
    assert len(read) == 1


def won(target: Target, *rows: tuple[str, Any, Any]) -> str:
    """Of name, pooling and losses."""
    return winner_of({n: fitted(n, target, dense(0, p or "last"), losses, p) for n, p, losses in rows})


def test_the_first_within_one_standard_error_of_the_least_loss_wins() -> None:
    low = ("low", "mean", (0, 0, 0, 0))
    # One prompt of four loses 1 more: by a quarter on average, and the standard error is 0.5 / 2.
    near, over = ("near", "max", (1, 0, 0, 0)), ("over", "max", (1, 0.1, 0, 0))
    far = ("far", "instruction", (1, 1, 1, 0))
    assert won("harmful", far, near, low) == "near"
    assert won("harmful", far, over, low) == "low"
    assert won("harmful", low, near) == "low"
    # The standard error is of the differences, prompt by prompt: alike throughout is worse for certain.
    assert won("harmful", ("apart", "mean", (9.1, 0.1, 5.1)), ("low", "mean", (9, 0, 5))) == "low"
    assert won("harmful", ("close", "mean", (9.3, 0.8, 5.1)), ("low", "mean", (9, 1, 5))) == "close"
    assert won("harmful", ("alone", "mean", (1,))) == "alone"


def test_harm_is_read_on_words_and_refusal_at_the_last_token() -> None:
    """Keywords and perplexity read nothing, and cannot be a guard's."""
    rows = (
        ("words", None, (0, 0)),
        ("end", "last", (1, 1)),
        ("middle", "mean", (2, 2)),
        ("first", "instruction", (3, 3)),
    )
    assert won("harmful", *rows) == "middle"
    assert won("refuse", *rows) == "end"
