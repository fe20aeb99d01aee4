"""Plans: work counted by running a study on stand-ins, and its price, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config

from command_line import run
from demur.plan.counting import EFFICIENCY, Machine, ModelSizes, PromptLengths, Work, count_work, model_sizes
from demur.saes import Sae, SaeSpec, Suite
from demur.studies import STUDIES
from demur.studies.base import Study, StudyResult
from demur.studies.config import Sources, StudyConfig
from demur.studies.context import Context
from demur.types import SplitSizes

LENGTHS = PromptLengths(before=3, message=7, after=2)
SIZES = SplitSizes(direction=8, selection=4, tuning=4, test=6)
MODEL = ModelSizes(
    parameters=1000, n_layers=4, d_model=10, value_bytes=2, token_flops=100.0, logit_flops=50.0, saved_bytes=80.0
)
COUNTED_MODEL = replace(MODEL, n_layers=3, d_model=100)


def unread_suite(*layers: int) -> Suite:
    """SAEs of which only the sizes are known."""

    def unread() -> Any:
        raise AssertionError("weights were asked for")

    sizes: dict[str, Any] = {"d_model": 100, "d_sae": 4000, "activation": "relu", "source": "none", "identity": "none"}
    return Suite([Sae(SaeSpec(layer=layer, **sizes), unread) for layer in layers], "none")


class Config(StudyConfig):
    """Options of the study that is planned."""

    passages: Sources = ()
    """Texts to read."""
    tasks: tuple[str, ...] = ("mmlu",)
    """What another program would run."""


def study(work: Any) -> Study[Config, StudyResult]:
    """A study that does `work(context)`."""

    def do(context: Context[Config]) -> StudyResult:
        work(context)
        return StudyResult()

    return Study("measured", Config, StudyResult, do, lambda _: ())


def counted(work: Any, **options: Any) -> dict[str, Work]:
    config = Config.model_validate({"n": SIZES, "max_new_tokens": 5} | options)
    return count_work(study(work), config, COUNTED_MODEL, unread_suite(0, 2), LENGTHS, 30)


def test_answers_are_counted_in_batches_by_stage() -> None:
    def work(context: Context[Config]) -> None:
        with context.timed("answers"):
            judged = context.answer("test", context.splits.test.harmful)
        assert judged.refusal.value == 1.0
        with context.timed("again"):
            context.answer("test", context.splits.test.harmful)
        assert context.answer("harmless", context.splits.test.harmless).refusal.value == 0.0

    found = counted(work)
    # Six prompts of 12 tokens with 5 to write: one at a time in batches of 30 tokens. The first new token comes with
    # the prompt.
    one = {"passes": 6, "tokens": 72, "logits": 6, "steps": 24, "written": 24}
    assert found["answers"] == Work(**one)
    # Kept in the run folder, so not written again.
    assert found["again"] == Work()
    # What no stage times is counted too.
    assert found["rest"] == Work(**one)


def test_passes_and_gradients_are_counted() -> None:
    def work(context: Context[Config]) -> None:
        model, items = context.model, context.model.tokenize(context.splits.test.harmful.head(2))
        batch = model.batch(items)
        assert tuple(batch.input_ids.shape) == (2, 12)
        with context.timed("plain"), torch.inference_mode():
            model.last_logits(batch)
            model.head(model.final_states(batch)[0])
        with context.timed("gradient"):
            for _ in range(3):
                leaf = torch.zeros(model.d_model, requires_grad=True)
                with model.edited({0: [lambda x, _cursor, leaf=leaf: x + leaf]}):
                    model.last_logits(batch).sum().backward()

    found = counted(work)
    assert found["plain"] == Work(passes=2, tokens=48, logits=2 + 12)
    assert found["gradient"] == Work(passes=3, tokens=72, logits=6, backward_passes=3, backward_tokens=72)


def test_large_test_sets_are_counted_by_their_first_prompts() -> None:
    def work(context: Context[Config]) -> None:
        with context.timed("answers"):
            context.answer("test", context.splits.test.harmful)
        with context.timed("choosing"), torch.inference_mode():
            context.model.last_logits(context.model.batch(context.model.tokenize(context.splits.direction.harmful)))

    sizes = SIZES.model_dump()
    found = counted(work, n=SIZES.model_copy(update={"test": 10**6}))
    # One prompt of 12 tokens a pass, as above; what does not depend on the test prompts stays.
    assert found["answers"] == Work(passes=10**6, tokens=12 * 10**6, logits=10**6, steps=4 * 10**6, written=4 * 10**6)
    assert found["choosing"] == Work(passes=1, tokens=12 * sizes["direction"], logits=sizes["direction"])


def test_conversions_to_float32_are_counted_and_priced_in_float32() -> None:
    def work(context: Context[Config]) -> None:
        with context.timed("exact"), torch.inference_mode(), context.model.in_float32():
            context.model.last_logits(context.model.batch(context.model.tokenize(context.splits.test.harmful.head(1))))

    found = counted(work)["exact"]
    assert found == Work(passes=1, tokens=12, logits=1, conversions=1)
    slow = replace(MACHINE, single=10.0)
    assert slow.seconds(found, MODEL) == pytest.approx(100 * MACHINE.seconds(found, MODEL))
    assert slow.seconds(replace(found, conversions=0), MODEL) == MACHINE.seconds(found, MODEL)


def test_products_with_whole_dictionaries_are_counted_in_real_sizes() -> None:
    def work(context: Context[Config]) -> None:
        suite, width = context.suite, context.model.d_model
        assert suite.layers == (0, 2)
        with context.timed("encode"), torch.inference_mode():
            for block in suite[0].encoder_blocks(8192):
                block.encode(torch.zeros(5, 6, width))
        with context.timed("decoder"):
            for _, rows in suite[2].decoder_blocks(8192):
                _ = rows @ torch.zeros(width)
        with context.timed("a few rows"):
            suite[0].rows(range(10)).encode(torch.zeros(5, 6, width))

    found = counted(work)
    assert found["encode"].dictionary == 2 * 5 * 6 * 100 * 4000
    assert found["decoder"].dictionary == 2 * 100 * 4000
    assert found["a few rows"].dictionary == 0


def test_files_that_are_named_need_not_exist_and_other_programs_are_left_out() -> None:
    seen: list[Config] = []

    def work(context: Context[Config]) -> None:
        from demur.data import read_texts

        seen.append(context.config)
        assert len(read_texts(context.config.passages[0], limit=10)) == 10

    counted(work, passages=("absent.csv::text",))
    assert seen[0].tasks == ()
    counted(work, passages=("absent.csv::text",))


@pytest.mark.parametrize("name", ["study", pytest.param("benchmark", marks=pytest.mark.slow)])
def test_demurs_own_studies_run_on_the_stand_ins(name: str) -> None:
    entry = STUDIES[name]
    config = entry.config.model_validate(
        {"n": "8,4,4,4", "max_new_tokens": 4, "n_exact": 2, "k": 3, "k0": 2, "random_sets": 2}
        | ({"resamples": 100, "sizes": "1,2", "induce_multiples": "1"} if name == "benchmark" else {})
    )
    found = count_work(entry, config, COUNTED_MODEL, unread_suite(0, 1, 2), LENGTHS, 2048)
    assert list(found)[:4] == ["clean answers", "direction", "pool", "attribution"]
    # Prompts of all splits and both classes are answered, and the benchmark's 100 over-refusal prompts.
    assert found["clean answers"].written == (2 * (8 + 4 + 4 + 4) + 100 * (name == "benchmark")) * 3
    # Means of 8 + 8 prompts; candidates on 3 of 3 layers within 0.8 of the depth, at 2 positions: one addition and two
    # forms of ablation on both classes; and the clean run.
    assert found["direction"].tokens == 12 * (16 + 4 + 3 * 2 * (4 + 2 * 8))
    # The decoders are looked through once.
    assert found["pool"].dictionary == 3 * 2 * 100 * 4000
    assert found["attribution"].backward_passes > 0
    assert found["suppression and induction"].written > 0


def test_the_study_of_categories_runs_on_the_stand_ins() -> None:
    entry = STUDIES["categories"]
    small = {
        "n": "14,7,7,14",
        "max_new_tokens": 4,
        "k": 3,
        "k0": 2,
        "random_sets": 2,
        "min_prompts": 2,
        "suppress": "0",
    }
    found = count_work(entry, entry.config.model_validate(small), COUNTED_MODEL, unread_suite(0, 1, 2), LENGTHS, 2048)
    # Each of 7 categories has two test prompts: the whole sets, then three kinds of each of two parts, graded or not,
    # and two random sets for each part; its features on the other six, with the common ones free and held.
    assert found["parts"].written in {14 * 3 * (1 + 6 * splits + 4 * bool(splits)) for splits in (0, 1, 2)}
    assert found["transfer"].written in (0, 2 * 7 * 12 * 3)
    assert found["roles"].passes > 0


def test_sizes_of_a_model_are_counted_without_its_weights() -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma2Config(vocab_size=100, hidden_size=16, intermediate_size=32, **shape)
    sizes = model_sizes(config, torch.float32, tokens=10)
    # Per layer q and o 16 × 16, k and v 16 × 8, three matrices 16 × 32; embedding 100 × 16, tied; norms: four a layer
    # and the last, 16 each.
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32)
    assert sizes.parameters == weights + 1600 + 9 * 16
    assert (sizes.n_layers, sizes.d_model, sizes.value_bytes) == (2, 16, 4)
    # Two operations for each weight; scores and mixing over 10 tokens in 2 layers, with heads of 8 + 8.
    assert sizes.token_flops == 2 * weights + 2 * 2 * 2 * 10 * 16
    assert sizes.logit_flops == 2 * 16 * 100
    # Two layers' 12 values of the residual's width and 4 of the inner one's, and keys and values of 2 layers, 8 wide.
    assert sizes.pass_bytes == 4 * (2 * (12 * 16 + 4 * 32) + 2 * 2 * 8)
    # At least the residual and the three inner values of each layer are kept for the gradient.
    assert sizes.saved_bytes > 2 * 4 * (16 + 3 * 32)


def test_known_models_cost_what_they_are_known_to() -> None:
    # Two of the layers of Gemma 2 2B, so that the model is made in no time.
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    gemma = Gemma2Config(vocab_size=256_000, hidden_size=2304, intermediate_size=9216, head_dim=256, **shape)
    sizes = model_sizes(gemma, torch.bfloat16, tokens=40)
    # The whole model has 2,614,341,888 parameters and 4.05e9 operations a token, without attention's percent.
    layer = 2 * 2304 * 2048 + 2 * 2304 * 1024 + 3 * 2304 * 9216
    assert sizes.parameters == 2_614_341_888 - 24 * (layer + 4 * 2304)
    assert sizes.token_flops == pytest.approx(4.05e9 * 2 / 26, rel=0.01)
    assert sizes.logit_flops == 2 * 2304 * 256_000


MACHINE = Machine(flops=1000.0, bandwidth=1e9)


def test_reading_and_gradients_are_priced_by_their_operations() -> None:
    work = Work(passes=2, tokens=30, logits=4, backward_passes=1, backward_tokens=10, dictionary=600.0)
    # 40 tokens and 4 positions of logits, and the dictionary.
    assert MACHINE.flops_of(work, MODEL) == 4000 + 200 + 600
    assert MACHINE.seconds(work, MODEL) == pytest.approx(4800 / (EFFICIENCY * 1000))
    # Two passes and one backward of twice the calls, through four layers.
    assert replace(MACHINE, layer_call=0.5).seconds(work, MODEL) == pytest.approx(9.6 + 0.5 * 4 * 4)


def test_several_processes_take_turns_at_whole_batches() -> None:
    work = Work(passes=5, tokens=30, steps=3, written=20)
    alone = MACHINE.seconds(work, MODEL)
    assert alone > 0
    # Three rounds of two, one of five, and no more than that.
    assert MACHINE.seconds(work, MODEL, 2) == pytest.approx(alone * 3 / 5)
    assert MACHINE.seconds(work, MODEL, 5) == MACHINE.seconds(work, MODEL, 50) == pytest.approx(alone / 5)
    # Without passes there is nothing to take turns at.
    pool = Work(dictionary=600.0)
    assert MACHINE.seconds(pool, MODEL, 4) == MACHINE.seconds(pool, MODEL) == pytest.approx(1.2)


def test_writing_is_bound_by_operations_or_by_reading_the_weights() -> None:
    work = Work(steps=5, written=20)
    assert MACHINE.flops_of(work, MODEL) == 20 * 150
    assert MACHINE.seconds(work, MODEL) == pytest.approx(3000 / 500)
    # Five times 1000 weights of two bytes, at 100 bytes a second.
    assert replace(MACHINE, bandwidth=100.0).seconds(work, MODEL) == pytest.approx(100.0)


def tiny_config(folder: Path) -> Path:
    """A Gemma 2 configuration without weights."""
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    Gemma2Config(vocab_size=100, hidden_size=16, intermediate_size=32, dtype="float32", **shape).save_pretrained(folder)
    return folder


@pytest.fixture
def measured() -> Any:
    """A small study of the command line."""

    def work(context: Context[Config]) -> None:
        with context.timed("answers"):
            context.answer("test", context.splits.test.harmful)

    return STUDIES.register("measured", study(work))


@pytest.mark.usefixtures("measured")
def test_the_bundled_model_is_planned_without_a_model() -> None:
    code, out, _ = run("plan", "measured", "-n", "8,4,4,6", "--max-new-tokens", "4")
    assert code == 0
    text = " ".join(out.split())
    assert "demur plan measured: the bundled model" in text
    assert "8 layers of 384 features" in text
    assert "download: model 0 bytes" in text
    assert "answers of 4" in text
    assert "workers" not in text.split("Time stage")[1]
    several = " ".join(run("plan", "measured", "-n", "8,4,4,6", "--max-new-tokens", "4", "--workers", "3").out.split())
    assert "stage TFLOP time 3 workers" in several
    assert "with 3 workers) in float32" in several
    assert "Workers take turns at batches" in several
    code, out, _ = run("plan", "measured", "-n", "8,4,4,6", "--workers", "3", "--gpu", "h100", "--dtype", "float32")
    text = " ".join(out.split())
    assert "with 3 workers) in float32 on 3 x h100" in text
    # 0.8 of 67 TFLOP/s and 3.35 TB/s.
    assert "By the data sheet of the h100: 53,600 GFLOP/s in a matrix product, 2,680 GB/s in a copy" in text
    assert "unknown GPU 'h10'; there are a100, h100" in run("plan", "measured", "--gpu", "h10").error
    longer = run("plan", "measured", "-n", "8,4,4,6", "--prompt-tokens", "100")
    assert "prompts of 100 tokens" in " ".join(longer.out.split())


@pytest.mark.shared
@pytest.mark.usefixtures("measured")
def test_a_local_model_needs_no_prompts_and_no_network(shared: Path) -> None:
    folder = shared / "organism-en"
    code, out, error = run("plan", "measured", folder / "model", "--saes", folder / "saes", "--layers", "2-4")
    assert code == 0, error
    text = " ".join(out.split())
    assert "3 layers of 1,024 features" in text
    assert "float32 on cpu" in text
    # 10 features of each layer, encoder and decoder rows of 128 float32.
    assert "memory: SAE rows of the pool 30.7 kB" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there is no preset for"),
        (("--saes", "google/gemma-2-2b-it", "--device", "toaster"), "unknown device 'toaster'"),
        (("--paper-settings", "--saes", "google/gemma-3-1b-it"), "the paper has no settings for google/gemma-3-1b-it"),
    ],
)
def test_what_cannot_be_planned_is_named(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, out, error = run("plan", tiny_config(tmp_path / "model"), *options)
    assert (code, out) == (2, "")
    assert message in error


def test_an_unreadable_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, error = run("plan", tmp_path, "--saes", "x")
    assert code == 2
    assert "cannot read the configuration of" in error


@pytest.mark.usefixtures("measured")
def test_a_download_adds_up_the_files_that_a_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import transformers

    from demur.bundled import bundled_path

    sizes = {"model-1.safetensors": 100, "model-2.safetensors": 20, "tokenizer.json": 3, "original/consolidated.pth": 9}
    asked: list[tuple[str, object]] = []

    class Api:
        def model_info(self, repo: str, *, revision: str | None, files_metadata: bool) -> object:
            asked.append((repo, revision))
            assert files_metadata
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in sizes.items()])

    config = transformers.AutoConfig.from_pretrained(str(bundled_path().model))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    code, out, error = run("plan", "measured", "own/name", "--revision", "r1", "--saes", bundled_path().saes)
    assert code == 0, error
    assert asked == [("own/name", "r1")]
    assert "download: model 123 bytes" in " ".join(out.split())


def test_suites_that_are_compared_are_planned_without_being_read() -> None:
    entry = STUDIES["dictionaries"]
    small = {"n": "8,4,4,4", "max_new_tokens": 4, "n_exact": 0, "k": 3, "k0": 2, "conversations": 8}
    one = count_work(entry, entry.config.model_validate(small), COUNTED_MODEL, unread_suite(0, 1, 2), LENGTHS, 2048)
    names = ("trained on the chat model", "trained before safety training")
    assert set(names) <= set(one)
    # The second suite's conversations were run before, and so were its ablations: they do not depend on the SAE.
    assert one[names[0]].tokens > one[names[1]].tokens > 0
    more = entry.config.model_validate(small | {"against": ("absent/one", "absent/two")})
    assert {"absent/one", "absent/two"} <= set(
        count_work(entry, more, COUNTED_MODEL, unread_suite(0, 1, 2), LENGTHS, 2048)
    )


@pytest.mark.slow
def test_other_checkpoints_are_planned_as_models_of_their_own() -> None:
    entry = STUDIES["checkpoints"]
    small = {"n": "8,4,4,4", "max_new_tokens": 4, "k": 3, "k0": 2, "random_sets": 2, "n_answers": 2, "n_alone": 2}

    def answered(*before: str) -> int:
        config = entry.config.model_validate(small | {"before": before})
        return count_work(entry, config, COUNTED_MODEL, unread_suite(0, 1, 2), LENGTHS, 2048)["clean answers"].written

    # Each checkpoint answers every prompt that chooses.
    assert answered("absent/one") == 2 * (8 + 4 + 4) * 3 * 2
    assert answered("absent/one", "absent/two") == 2 * (8 + 4 + 4) * 3 * 3
