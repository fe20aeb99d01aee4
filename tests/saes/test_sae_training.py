"""Training of SAEs: planted dictionaries are found, a run that was stopped ends where it would have ended, and what is
written is read by SAELens as by demur."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from command_line import run
from demur.bundled import bundled_path, bundled_prompts, bundled_texts
from demur.errors import InputError, SaeError
from demur.model import ChatModel
from demur.sae_training import SaeTraining, Trained, train
from demur.saes import load_suite
from demur.saes.training import TRAINED, ChatActivations, SaeRecipe, calibrated, train_saes

D, FEATURES, ACTIVE = 32, 48, 3.0
EXACTLY = "donot_use_mm_for_euclid_dist"


def planted(layer: int) -> Tensor:
    """Unit directions of the planted dictionary of a layer."""
    return torch.nn.functional.normalize(
        torch.randn(FEATURES, D, generator=torch.Generator().manual_seed(layer)), dim=1
    )


def activations(number: int) -> Mapping[int, Tensor]:
    """Sparse sums of planted features, off the origin and in units of their own, with a little noise."""
    generator = torch.Generator().manual_seed(1000 + number)
    found: dict[int, Tensor] = {}
    for layer in (0, 3):
        on = torch.rand(8192, FEATURES, generator=generator) < ACTIVE / FEATURES
        f = on * (0.5 + torch.rand(8192, FEATURES, generator=generator))
        noise = 0.01 * torch.randn(8192, D, generator=generator)
        found[layer] = 5 * (f @ planted(layer) + noise) + torch.arange(D) / 4
    return found


def recipe(**changes: Any) -> SaeRecipe:
    return SaeRecipe.model_validate({"width": 64, "k": 3, "steps": 800, "batch": 256, "lr": 3e-3} | changes)


def fvu(x: Tensor, made: Tensor) -> float:
    return float((x - made).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.saelens
@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu"])
def test_planted_features_are_found_at_every_layer(architecture: str) -> None:
    told: dict[int, Any] = {}
    trained = train_saes(
        recipe(architecture=architecture, **({"lr": 6e-3, "steps": 1600} if architecture == "jumprelu" else {})),
        activations,
        [0, 3],
        report=lambda _, each: told.update(each),
    )
    for layer, (sae, dead) in trained.items():
        x = activations(99)[layer]
        f = sae.encode(x)
        cosines = torch.nn.functional.normalize(sae.w_dec, dim=1) @ planted(layer).T
        assert float(cosines.amax(0).mean()) > 0.9
        error = fvu(x, sae.decode(f))
        assert error < (0.2 if architecture == "topk" else 0.12)
        assert told[layer].fvu == pytest.approx(error, abs=0.03)
        assert float((f > 0).sum(1).float().mean()) == pytest.approx(3, abs=1.5 if architecture == "jumprelu" else 0.5)
        assert told[layer].dead == dead <= 0.5
        torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(64))
        assert (sae.activation, sae.k) == (("topk", 3) if architecture == "topk" else ("jumprelu", None))


@pytest.mark.saelens
@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu"])
def test_a_run_that_was_stopped_ends_where_it_would_have_ended(architecture: str, tmp_path: Path) -> None:
    class Stop(Exception): ...

    asked = recipe(architecture=architecture, steps=90)
    whole = train_saes(asked, activations, [0, 3])
    saved = tmp_path / "checkpoint.pt"

    def save(state: object) -> None:
        torch.save(state, saved)

    def stop_at(stop: int) -> Callable[[int, Any], None]:
        def report(step: int, _: Any) -> None:
            if step == stop:
                raise Stop

        return report

    # In the middle of a block; between two; and after some features were revived.
    for stop in (11, 33, 65):
        with pytest.raises(Stop):
            train_saes(asked, activations, [0, 3], save=save, saved=saved, report=stop_at(stop), between=0.0)
    resumed = train_saes(asked, activations, [0, 3], save=save, saved=saved, between=0.0)
    again = train_saes(asked, activations, [0, 3], saved=saved)
    for layer in (0, 3):
        for name, tensor in whole[layer].sae.tensors.items():
            torch.testing.assert_close(resumed[layer].sae.tensors[name], tensor, rtol=1e-6, atol=1e-6)
            assert torch.equal(again[layer].sae.tensors[name], resumed[layer].sae.tensors[name])


@pytest.mark.saelens
def test_features_that_died_are_revived() -> None:
    found = train_saes(recipe(width=96, steps=400), activations, [0])[0]
    assert found.dead < 0.4
    x = activations(99)[0]
    assert float((found.sae.encode(x) > 0).any(0).float().mean()) > 0.6


def test_threshold_leaves_as_many_active_as_asked() -> None:
    from demur.saes import DenseSae

    sae = DenseSae(0, torch.eye(2), torch.zeros(2), None, torch.eye(2), None, torch.zeros(2))
    x = torch.tensor([[4.0, 1.0], [3.0, -1.0], [2.0, 5.0], [0.5, 0.0]])
    # 5, 4, 3 and 2 are the four largest; the next is 1.
    found = calibrated(sae, x, 1.0)
    assert found.threshold is not None
    assert found.threshold.tolist() == [1.5, 1.5]


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return ChatModel.load(bundled_path().model, device="cpu", max_batch_tokens=400)


def test_blocks_hold_the_activations_of_the_mix_and_no_template_head(model: ChatModel) -> None:
    from demur.method.likelihood import texts_to_score

    chats = [model.chat.tokenize(prompt, "I cannot help.") for prompt in bundled_prompts().harmful.prompts[:12]]
    texts = texts_to_score(model, bundled_texts(20), max_tokens=20)
    blocks = ChatActivations(model, [2, 5], {"chat": chats, "text": texts}, {"chat": 1.0, "text": 3.0}, 2000, seed=4)
    first, second = blocks(0), blocks(1)
    assert len(first[2]) == len(first[5]) >= 2000
    again = ChatActivations(model, [2, 5], {"chat": chats, "text": texts}, {"chat": 1.0, "text": 3.0}, 2000, seed=4)
    torch.testing.assert_close(again(1)[5][:], second[5][:])
    assert not torch.equal(first[5][:50], second[5][:50])

    def rows(items: Any, layer: int) -> Tensor:
        """One conversation at a time, without padding."""
        found: list[Tensor] = []
        for item in items:
            batch = model.batch([item])
            found.append(model.residuals(batch, [layer])[layer][0, batch.within(TRAINED)[0]])
        return torch.cat(found)

    chat, text = rows(chats, 5), rows(texts, 5)
    nearest = torch.cdist(first[5][:], torch.cat([chat, text]), compute_mode=EXACTLY).min(1)
    assert float(nearest.values.max()) < 1e-3
    share = float((nearest.indices >= len(chat)).float().mean())
    assert share == pytest.approx(0.75, abs=0.03)
    # The same token at both layers.
    at = torch.cdist(first[5][:20], torch.cat([chat, text]), compute_mode=EXACTLY).argmin(1)
    torch.testing.assert_close(first[2][:20], torch.cat([rows(chats, 2), rows(texts, 2)])[at], rtol=1e-3, atol=1e-3)


# -- the command -------------------------------------------------------------------------------------------------------

SMALL = ("--layers", "1,4", "--width", "48", "--k", "6", "--max-new-tokens", "12", "--batch", "256", "--buffer", "4000")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prompts = bundled_prompts()
    for name, each in (("bad", prompts.harmful), ("good", prompts.harmless)):
        (folder / f"{name}.txt").write_text("\n".join(p.text for p in each.prompts[:60]), encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(bundled_texts(60)), encoding="utf-8")
    return folder


def given(files: Path, **changes: Any) -> SaeTraining:
    values: dict[str, Any] = {
        "model": str(bundled_path().model),
        "layers": "1,4",
        "width": 48,
        "k": 6,
        "tokens": 60_000,
    }
    values |= {"harmful": str(files / "bad.txt"), "harmless": str(files / "good.txt"), "text": str(files / "text.txt")}
    values |= {"max_new_tokens": 12, "batch": 256, "buffer": 4000, "device": "cpu", "max_batch_tokens": 2000}
    return SaeTraining.model_validate(values | changes)


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(given(files, gemma_scope=True), folder)


@pytest.mark.saelens
def test_figures_are_those_of_the_conversations_that_were_kept_apart(
    made: tuple[Path, Trained], files: Path, model: ChatModel
) -> None:
    folder, result = made
    assert result.held_out == {"harmful": 3, "harmless": 3, "text": 3}
    assert result.mix == {"harmful": 1 / 3, "harmless": 1 / 3, "text": 1 / 3}
    asked = [p for name in ("bad", "good") for p in (files / f"{name}.txt").read_text().splitlines()[::20]]
    suite = load_suite(folder / result.saes)
    for row in result.layers:
        sae, real = suite[row.layer].dense(), list[Tensor]()
        for answer in model.generate(asked, max_new_tokens=12):
            batch = model.batch([model.chat.tokenize(answer.prompt, answer.text)])
            real.append(model.residuals(batch, [row.layer])[row.layer][0, batch.within(TRAINED[2:])[0]].float())
        x = torch.cat(real)
        assert row.fvu["response"] == pytest.approx(fvu(x, sae.decode(sae.encode(x))), rel=1e-3)
        assert 0.02 < row.fvu["text"] < 0.6
        assert 3 < row.l0 < 12
    # The same command again finds it done; another one does not write over it.
    assert train(given(files, gemma_scope=True), folder).layers == result.layers
    from demur.errors import RunError

    with pytest.raises(RunError, match="trained otherwise"):
        train(given(files, k=5), folder)


@pytest.mark.saelens
def test_saelens_and_demur_read_both_layouts_alike(made: tuple[Path, Trained]) -> None:
    folder, result = made
    with warnings.catch_warnings(action="ignore"):
        import sae_lens
    own, scope = load_suite(folder / result.saes), load_suite(folder / str(result.gemma_scope))
    x = 3 * torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    for layer in (1, 4):
        mine, theirs = own[layer].dense(), sae_lens.SAE.load_from_disk(folder / result.saes / f"layer_{layer}")
        assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        torch.testing.assert_close(mine.encode(x), theirs.encode(x).detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.decode(mine.encode(x)), theirs(x).detach(), rtol=1e-4, atol=1e-4)
        for name, tensor in mine.tensors.items():
            assert torch.equal(scope[layer].dense().tensors[name], tensor)


def test_prompts_to_be_left_out_are_not_trained_on(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.saes.training.require_saelens", lambda: None)
    seen: dict[str, Any] = {}

    class Seen(Exception): ...

    def stop(_recipe: Any, blocks: ChatActivations, *_: Any, **__: Any) -> None:
        seen.update(blocks.items)
        raise Seen

    monkeypatch.setattr("demur.saes.training.train_saes", stop)
    lines = (files / "bad.txt").read_text().splitlines()
    # Compared without case and spacing.
    (tmp_path / "test.txt").write_text("\n".join(line.upper() for line in lines[:40]), encoding="utf-8")
    with pytest.raises(Seen):
        train(given(files, leave_out=str(tmp_path / "test.txt"), mix="harmful=1"), tmp_path / "run")
    model = ChatModel.load(bundled_path().model, device="cpu")
    texts = {str(model.tokenizer.decode(list(item.ids))) for item in seen["harmful"]}
    assert list(seen) == ["harmful"]
    assert len(texts) == 19  # 20 are left, and one in twenty is kept apart
    assert not any(line in text for line in lines[:40] for text in texts)
    with pytest.raises(InputError, match="every harmful prompt is among those of --leave-out"):
        train(given(files, leave_out=str(files / "bad.txt")), tmp_path / "other")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mix", "chat=1"], "'chat=1' is no share; expected for example harmful=1,harmless=1,text=2"),
        (["--mix", "harmful=1,harmful=2"], "'harmful=2' is no share"),
        (["--text", "x.txt"], "text given without a model: the bundled model has its own data"),
        (["MODEL"], "nothing to train on; name prompts with --harmful, --harmless or --prompts, or --text"),
        (["MODEL", "--text", "x", "--mix", "harmful=1"], "the mix names harmful, but none is given"),
        (["--architecture", "topk", "--gemma-scope"], "holds JumpReLU dictionaries, not TopK"),
        (["--width", "8", "--k", "9"], "k is 9, but a dictionary of 8 features has no more"),
        (["--tokens", "10"], "must hold at least one batch of 1024"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(words: list[str], told: str) -> None:
    ran = run("saes", "train", *words)
    assert ran.code == 2
    assert told in ran.error


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    ran = run("saes", "train", "--out", tmp_path / "run")
    assert ran.code == 2
    assert "pip install 'demur[saelens]'" in ran.error
    with pytest.raises(SaeError, match="SAEs are trained with SAELens"):
        train_saes(recipe(), activations, [0])


@pytest.mark.saelens
def test_a_block_smaller_than_a_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="a block has 8192 tokens, less than a batch of 10000"):
        train_saes(recipe(batch=10_000), activations, [0])


@pytest.mark.saelens
@pytest.mark.slow
def test_killed_and_run_again_it_goes_on_and_ends_with_the_same_saes(files: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        sources = ("--harmful", files / "bad.txt", "--harmless", files / "good.txt", "--text", files / "text.txt")
        options = (*SMALL, "--tokens", "300000", *sources, "--max-batch-tokens", "2000", "--device", "cpu")
        return [
            sys.executable,
            "-m",
            "demur",
            "saes",
            "train",
            *map(str, (bundled_path().model, *options, "--out", out)),
        ]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("stages/sae-training-*/checkpoint.pt")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "training.json").exists()
    at = torch.load(next(out.glob("stages/sae-training-*/checkpoint.pt")), weights_only=True)["at"][0]
    assert 0 < at < 300_000 // 256
    again = subprocess.run(command(out), env=environment, check=True, capture_output=True, text=True)
    # It did not begin anew: the first tenth that it tells of is behind the checkpoint.
    first = next(line for line in again.stderr.splitlines() if line.startswith("training: ") and " of " in line)
    assert int(first.split()[1]) >= at * 256
    assert "FVU" in first
    assert "s left" in first
    subprocess.run(command(tmp_path / "clean"), env=environment, check=True, capture_output=True)
    left, right = load_suite(out / "saes"), load_suite(tmp_path / "clean" / "saes")
    for layer in (1, 4):
        for name, tensor in right[layer].dense().tensors.items():
            torch.testing.assert_close(left[layer].dense().tensors[name], tensor, rtol=1e-5, atol=1e-5)
    assert json.loads((out / "training.json").read_text()) == json.loads((tmp_path / "clean/training.json").read_text())
    assert not list(out.glob("stages/sae-training-*/checkpoint.pt"))
