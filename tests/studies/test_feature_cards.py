"""Feature cards on the planted model, whose features are known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from page_parts import unshown

from demur.model import Region
from demur.studies.config import FindConfig
from demur.studies.features import Result
from demur.studies.inputs import neuronpedia_source


@pytest.fixture(scope="module")
def result(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return files.study(tmp_path_factory.mktemp("run") / "cards", "features", **few(files))


def few(files: Any, **changes: Any) -> dict[str, Any]:
    left_out = ("random_sets",)
    options = {**files.options(), **changes}
    return {name: None if name in left_out else value for name, value in options.items()}


def test_cards_are_f_star_then_harm_features(files: Any, result: Result) -> None:
    truth = files.truth.truth
    own = [card.feature for card in result.cards if card.score is not None]
    assert set(own) == truth.causal
    assert len(result.cards) == len({card.feature for card in result.cards})
    assert {card.feature for card in result.cards if card.role.role == "harm"} == truth.harm
    assert "3 fire where the answer begins (refusal), 8 on the user's words (harm)" in result.page().verdicts[0]


def test_harm_features_beyond_f_star_have_cards_of_their_own(files: Any, tmp_path: Path) -> None:
    found = files.study(tmp_path / "run", "features", **few(files, k=3, harm_features=4, neuronpedia=False))
    own, beyond = ([card for card in found.cards if (card.score is None) is new] for new in (False, True))
    assert len(own) == 3
    assert beyond
    assert {card.feature for card in beyond} < files.truth.truth.harm
    without = files.study(tmp_path / "run", "features", **few(files, k=3, harm_features=0, neuronpedia=False))
    assert [card.feature for card in without.cards] == [card.feature for card in own]


def test_the_lens_reads_what_a_refusal_feature_writes(files: Any, result: Result) -> None:
    for card in result.cards:
        if card.feature in files.truth.truth.refusal:
            assert card.promotes[0].strip() == "I"
        assert not set(card.promotes) & set(card.demotes)


def test_tokens_and_spreads_by_hand(files: Any, result: Result) -> None:
    truth = files.truth
    card = next(card for card in result.cards if card.role.role == "harm")
    layer, index = card.feature
    from demur.model import ChatModel

    model = ChatModel(truth.model, truth.tokenizer, name="planted")
    used = {
        text: label for label, each in (("harmful", truth.harmful), ("harmless", truth.harmless)) for text in each.texts
    }
    means: dict[str, list[float]] = {}
    maxima: dict[str, float] = {}
    for text in used:
        (item,) = model.tokenize([text])
        batch = model.batch([item])
        with torch.inference_mode(), model.capture([layer]) as residuals:
            model.last_logits(batch)
            values = truth.suite[layer].dense().encode(residuals[layer])[0, :, index].numpy()
        maxima[text] = float(values[np.array(item.regions) == Region.INSTRUCTION].max())
        for token, value, region in zip(item.ids, values, item.regions, strict=True):
            if region in (Region.INSTRUCTION, Region.POST_INSTRUCTION):
                means.setdefault(model.decode([token]), []).append(float(value))
    # The feature fires with one strength on each of its words, whatever prompts are drawn.
    best = sorted({word for word in means if np.mean(means[word]) > 0.1})
    assert {token for token, mean, _ in card.tokens if mean > 0.1} <= set(best)
    assert card.tokens[0][1] == pytest.approx(max(np.mean(each) for each in means.values()), rel=1e-3)
    example = card.examples[0]
    assert example.activation == pytest.approx(maxima[example.prompt], rel=1e-3)
    assert (example.label, example.token) == ("harmful", card.tokens[0][0])
    fires = {(spread.label, spread.region): spread.fires.value for spread in card.spreads}
    assert fires["harmless", "instruction"] == fires["harmful", "post-instruction"] == 0
    assert 0 < fires["harmful", "instruction"] < 1
    for spread in card.spreads:
        assert sum(spread.counts) == spread.fires.n
        # All that do not fire are in the first bin, and nothing lies between that and the feature's one strength.
        if spread.region == "instruction":
            assert spread.counts[0] == round(spread.fires.n * (1 - spread.fires.value))
            assert spread.counts[-1] == spread.fires.n - spread.counts[0]


class Pages(BaseHTTPRequestHandler):
    """A Neuronpedia with a description of every feature, or one that fails."""

    status: ClassVar[int] = 200
    asked: ClassVar[list[str]] = []
    moved: ClassVar[bool] = False

    def do_GET(self) -> None:
        if self.moved and not self.path.startswith("/new"):
            self.send_response(307)
            self.send_header("Location", f"/new{self.path}")
            self.end_headers()
            return
        self.asked.append(self.path)
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps({"explanations": [{"description": f"about {self.path[-4:]}"}]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Pages]]:
    server = HTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("demur.studies.features.NEURONPEDIA", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("demur.studies.inputs.neuronpedia_source", lambda _config: "planted/{layer}-res")
    monkeypatch.setattr(Pages, "asked", [])
    yield Pages
    server.shutdown()
    server.server_close()


def test_descriptions_are_asked_for_once(
    files: Any, pages: type[Pages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = files.study(tmp_path / "run", "features", **few(files, harm_features=0))
    found = files.study(tmp_path / "run", "features", **few(files, harm_features=0))
    assert found.cards == first.cards
    assert len(pages.asked) == len(found.cards)
    card = found.cards[0]
    assert card.url.endswith(f"/planted/{card.feature.layer}-res/{card.feature.index}")
    assert pages.asked[0] == f"/api/feature/planted/{card.feature.layer}-res/{card.feature.index}"
    assert card.description == f"about {pages.asked[0][-4:]}"
    assert "quick-list" in found.list_url
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    files.study(tmp_path / "offline", "features", **few(files, harm_features=0))
    assert len(pages.asked) == len(found.cards)


def test_a_neuronpedia_that_has_moved_is_followed(
    files: Any, pages: type[Pages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "moved", True)
    found = files.study(tmp_path / "run", "features", **few(files, harm_features=0))
    assert all(card.description.startswith("about") for card in found.cards)
    assert all(path.startswith("/new/api/feature/") for path in pages.asked)


def test_a_neuronpedia_that_fails_is_a_warning(
    files: Any, pages: type[Pages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "status", 500)
    found = files.study(tmp_path / "run", "features", **few(files, harm_features=0))
    assert any("Neuronpedia gave no descriptions" in warning for warning in found.warnings)
    assert len(found.cards) == 11
    assert not any(card.description for card in found.cards)


def test_neuronpedia_has_the_saes_of_a_preset() -> None:
    def source(**options: Any) -> str | None:
        prompts = {"harmful": "a", "harmless": "b"} if "model" in options else {}
        return neuronpedia_source(FindConfig(**prompts, **options))

    assert source(model="google/gemma-2-2b-it") == "gemma-2-2b/{layer}-gemmascope-res-65k"
    assert source(model="mine/tuned", saes="gemma-2-2b-it", sae_width="16k") == "gemma-2-2b/{layer}-gemmascope-res-16k"
    # Another average L0 is another SAE.
    assert source(model="google/gemma-2-2b-it", average_l0=20.0) is None
    assert source(model="mine/tuned", saes="mine/saes") is None
    assert source() is None


def test_what_the_result_holds_is_on_its_page(result: Any) -> None:
    # Left out of the page: details for code that reads results, and what is in a cell with its neighbour.
    assert unshown(result) == {"Card.demotes", "Card.url", "FeatureRole.instruction", "FeatureRole.post_instruction"}
