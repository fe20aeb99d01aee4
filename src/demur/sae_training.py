"""Train SAEs on a chat model's own conversations: prompts in its template with its own answers, and plain text, in a
stated mix. What is needed of SAELens is in `demur.saes.training`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from demur import data
from demur.errors import InputError, RunError
from demur.studies.config import MAX_SEED, Layers, Options, Sources
from demur.types import Prompt, Take, Value, text_key

if TYPE_CHECKING:
    from demur.model import ChatModel, Items
    from demur.runs import Run
    from demur.saes.training import Figures, TrainedSae

KINDS: Final = ("harmful", "harmless", "prompts", "text")
CHATS: Final = KINDS[:3]
Progress = Callable[[str, int, int, str], None]
"""`(what is done, done, total, figures)`."""

_HELD_OUT: Final = 20
"""One in so many conversations and texts is not trained on: the figures are of these."""
_MOST_HELD_OUT: Final = 200
_RESULT: Final = "training.json"


def _shares(mix: str) -> dict[str, float]:
    """`harmful=1,text=2` as shares."""
    found: dict[str, float] = {}
    for part in mix.replace(" ", "").split(","):
        name, _, number = part.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if name not in KINDS or not 0 < share < float("inf") or name in found:
            raise ValueError(f"{part!r} is no share; expected for example harmful=1,harmless=1,text=2")
        found[name] = share
    return found


class _Model(Options):
    """What SAEs are trained on, and how."""

    group: ClassVar[str] = "Model"

    model: str | None = None
    """Hugging Face id or local folder of a chat model. Without it: the bundled model with its prompts and texts."""
    revision: str | None = None
    """Revision of the model on the hub."""
    layers: Layers | None = None
    """Decoder layers to train an SAE for, for example 0-5,8,10, all in the same passes (default: every layer)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; SAEs are trained in float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N, mps, or balanced (over several GPUs)."""
    system_prompt: str | None = None
    """System message of every conversation."""


class _Data(Options):
    group: ClassVar[str] = "Data"

    harmful: Sources = ()
    """File or named set of harmful prompts, SOURCE or SOURCE::COLUMN; repeatable."""
    harmless: Sources = ()
    """File or named set of harmless prompts; repeatable."""
    prompts: Sources = ()
    """File or named set of prompts of any kind; repeatable."""
    text: Sources = ()
    """Plain text, outside the chat template: a file or a named sample; repeatable."""
    leave_out: Sources = ()
    """Prompts never to train on, such as the test prompts of a study; repeatable (the bundled model's test prompts are
    always left out)."""
    mix: str | None = None
    """Share of the tokens for each kind that is given, as harmful=1,harmless=1,text=2 (default: equal shares; a kind
    that is not named is left out)."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length of the model's own answers, in tokens."""
    text_tokens: int = Field(default=128, ge=2)
    """Tokens of each text to use."""
    n_text: int = Field(default=20_000, ge=1)
    """Texts to use of each source."""


class _Dictionary(Options):
    group: ClassVar[str] = "Dictionary"

    architecture: Literal["batchtopk", "topk", "jumprelu"] = "batchtopk"
    """BatchTopK (stored as JumpReLU with one threshold), TopK, or JumpReLU."""
    width: int | None = Field(default=None, ge=2)
    """Features of an SAE (default: 8 times the width of the residual)."""
    k: int = Field(default=32, ge=1)
    """Active features a token: on average, exactly (topk), or as a target (jumprelu)."""
    gemma_scope: bool = False
    """Also write Gemma Scope's layout (params.npz)."""


class _Training(Options):
    group: ClassVar[str] = "Training"

    tokens: int = Field(default=2_000_000, ge=1)
    """Tokens to train on; what is given is gone through again and again."""
    batch: int = Field(default=1024, ge=2)
    """Tokens of an optimiser step."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate (default: 2e-4 at 16,384 features, double for jumprelu, and as 1/√width elsewhere)."""
    buffer: int = Field(default=100_000, ge=2)
    """Tokens whose activations are held in memory and shuffled, for every layer."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of weights and order."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one pass of the model at most (default: from free memory)."""


class SaeTraining(_Model, _Data, _Dictionary, _Training):
    """The options of `demur saes train`."""

    @field_validator("mix")
    @classmethod
    def _readable(cls, mix: str | None) -> str | None:
        if mix is not None:
            _shares(mix)
        return mix

    @model_validator(mode="after")
    def _fits(self) -> SaeTraining:
        given = [kind for kind in KINDS if getattr(self, kind)]
        if self.model is None and (given or self.revision):
            raise ValueError(f"{(given or ['revision'])[0]} given without a model: the bundled model has its own data")
        if self.model is not None and not given:
            raise ValueError("nothing to train on; name prompts with --harmful, --harmless or --prompts, or --text")
        missing = [kind for kind in (_shares(self.mix) if self.mix else ()) if kind not in (given or KINDS)]
        if missing:
            raise ValueError(f"the mix names {missing[0]}, but none is given; add --{missing[0]} or leave it out")
        if self.tokens < self.batch or self.buffer < self.batch:
            raise ValueError(f"tokens and buffer must hold at least one batch of {self.batch}")
        if self.gemma_scope and self.architecture == "topk":
            raise ValueError("Gemma Scope's layout holds JumpReLU dictionaries, not TopK; leave out --gemma-scope")
        if self.width is not None and self.k > self.width:
            raise ValueError(f"k is {self.k}, but a dictionary of {self.width} features has no more than that")
        return self


class _AnswerRow(Value):
    prompt_id: str
    text: str


class TrainedLayer(Value):
    """One SAE on conversations and texts that it was not trained on: fraction of variance unexplained by region, active
    features per token; `dead` are features that had stopped firing at the end of the training."""

    layer: int
    fvu: dict[str, float]
    l0: float
    dead: float


class Trained(Value):
    """What `train` made. `tokens` of each kind were there to be trained on; `mix` is each kind's share."""

    key: str
    """Hash of all that the SAEs depend on."""
    saes: str
    """Folder below the run folder, in SAELens' layout: `layer_L/cfg.json`, `layer_L/sae_weights.safetensors`."""
    gemma_scope: str | None
    mix: dict[str, float]
    tokens: dict[str, int]
    held_out: dict[str, int]
    """Conversations and texts of each kind that were not trained on."""
    layers: tuple[TrainedLayer, ...]


def train(config: SaeTraining, out: Path | str, progress: Progress = lambda *_: None) -> Trained:
    """Train SAEs into the run folder `out`; the same configuration goes on there after an interruption. Raises
    InputError, ModelError, SaeError: what is wrong with the inputs, or SAELens is missing; RunError: the folder holds
    SAEs of another configuration."""
    from demur.bundled import bundled_path
    from demur.model import Budgets, ChatModel, model_identity
    from demur.runs import Run
    from demur.saes.training import require_saelens

    require_saelens()
    prompts, texts = _read(config)
    options = ("revision", "dtype", "device", "system_prompt", "max_batch_tokens")
    with Run.open(out, config=config, command="saes train", seeds={"seed": config.seed}) as run:
        source = config.model or bundled_path().model
        model = ChatModel.load(source, **{name: getattr(config, name) for name in options})
        layers = tuple(range(model.n_layers)) if config.layers is None else config.layers
        if max(layers) >= model.n_layers:
            raise InputError(f"--layers names layer {max(layers)}; the model has 0 to {model.n_layers - 1}")
        identity = dict(model_identity(model))
        # The batches with which the run began, whatever memory is free now.
        limit = {"model": identity, "limit": config.max_batch_tokens}
        kept = run.cached("budget", limit, tuple[int, int], lambda: (model.budgets.plain, model.budgets.gradients))
        model.budgets = Budgets(*kept)
        items = _items(config, run, model, identity, prompts, texts, progress)
        return _train(config, run, model, identity, layers, items, progress)


def _read(config: SaeTraining) -> tuple[dict[str, tuple[Prompt, ...]], tuple[str, ...]]:
    """Prompts by kind, those to be left out dropped, and texts; only of kinds in the mix. Raises InputError."""
    wanted = _shares(config.mix) if config.mix else KINDS
    if config.model is None:
        from demur.bundled import bundled_prompts, bundled_texts

        own = bundled_prompts()
        found: dict[str, Sequence[Prompt]] = {"harmful": own.harmful.prompts, "harmless": own.harmless.prompts}
        away = chain(own.test_harmful, own.test_harmless, own.over_refusal)
        # Studies measure side effects on the first hundred.
        texts = bundled_texts(1000)[100:]
    else:
        named = {kind: getattr(config, kind) for kind in CHATS if getattr(config, kind) and kind in wanted}
        found = {kind: data.read_prompts(each, label=_LABELS[kind]).prompts for kind, each in named.items()}
        texts = tuple(chain(*(data.read_texts(each, limit=config.n_text) for each in config.text)))
        away = ()
    if config.leave_out:
        away = chain(away, data.read_prompts(config.leave_out, label=None))
    keys = {text_key(prompt.text) for prompt in away}
    kept = {
        kind: tuple(prompt for prompt in each if text_key(prompt.text) not in keys)
        for kind, each in found.items()
        if kind in wanted
    }
    for kind, each in kept.items():
        if not each:
            raise InputError(f"every {kind} prompt is among those of --leave-out")
    return kept, texts if "text" in wanted else ()


_LABELS: Final[Mapping[str, Any]] = {"harmful": "harmful", "harmless": "harmless", "prompts": None}


def _items(
    config: SaeTraining,
    run: Run,
    model: ChatModel,
    identity: Mapping[str, Any],
    prompts: Mapping[str, Sequence[Prompt]],
    texts: Sequence[str],
    progress: Progress,
) -> dict[str, Items]:
    """Conversations with the model's own answers, and texts, tokenized."""
    from demur.method.likelihood import texts_to_score
    from demur.model import answer_batches

    found: dict[str, Items] = {}
    for kind, each in prompts.items():

        def compute(take: Take, each: Sequence[Prompt] = each) -> Any:
            for batch in answer_batches(model, each, max_new_tokens=config.max_new_tokens, take=take):
                yield [_AnswerRow(prompt_id=answer.prompt.id, text=answer.text) for answer in batch]

        asked = {"model": identity, "prompts": [(prompt.id, prompt.text) for prompt in each]}
        depends = asked | {"max_new_tokens": config.max_new_tokens, "system_prompt": config.system_prompt}

        def told(done: int, total: int, stage: str = f"answers: {kind}") -> None:
            progress(stage, done, total, "")

        rows = run.mapped("answers", depends, _AnswerRow, [p.id for p in each], compute, progress=told)
        found[kind] = [model.chat.tokenize(prompt, row.text) for prompt, row in zip(each, rows, strict=True)]
    if texts:
        found["text"] = texts_to_score(model, texts, max_tokens=config.text_tokens)
    return found


def _train(
    config: SaeTraining,
    run: Run,
    model: ChatModel,
    identity: Mapping[str, Any],
    layers: Sequence[int],
    items: Mapping[str, Items],
    progress: Progress,
) -> Trained:
    from demur.runs import hash_of, write_whole
    from demur.saes.training import ChatActivations, SaeRecipe, train_saes

    given = _shares(config.mix) if config.mix else dict.fromkeys(items, 1.0)
    mix = {kind: share / sum(given.values()) for kind, share in given.items()}
    many = {kind: min(len(each) // _HELD_OUT, _MOST_HELD_OUT) for kind, each in items.items()}
    apart = {kind: range(0, number * _HELD_OUT, _HELD_OUT) for kind, number in many.items()}
    held = {kind: [each[n] for n in apart[kind]] for kind, each in items.items()}
    used = {kind: [item for n, item in enumerate(each) if n not in apart[kind]] for kind, each in items.items()}
    recipe = SaeRecipe(
        width=config.width or 8 * model.d_model,
        steps=config.tokens // config.batch,
        **{name: getattr(config, name) for name in ("k", "batch", "architecture", "lr", "seed")},
    )
    depends: dict[str, Any] = {"model": identity, "recipe": recipe, "layers": layers, "mix": mix, "size": config.buffer}
    depends["items"] = hash_of({kind: [item.ids for item in each] for kind, each in items.items()})
    stage = run.stage("sae-training", depends)
    result = _earlier(run.folder / _RESULT, stage.key)
    if result is None or not stage.done:
        import torch

        checkpoint = stage.folder / "checkpoint.pt"
        blocks = ChatActivations(model, layers, used, mix, config.buffer, config.seed)

        def report(step: int, figures: Mapping[int, Figures]) -> None:
            progress("training", step * config.batch, recipe.steps * config.batch, _line(figures))

        def save(state: object) -> None:
            write_whole(checkpoint, lambda path: torch.save(state, path))

        saes = train_saes(recipe, blocks, layers, device=model.layer_device, save=save, saved=checkpoint, report=report)
        rows = tuple(_measured(model, saes[layer], held) for layer in layers)
        for layer in layers:
            saes[layer].sae.save_saelens(run.folder / "saes" / f"layer_{layer}", model_name=config.model or "bundled")
        result = Trained(
            key=stage.key,
            saes="saes",
            gemma_scope=None,
            mix={**mix},
            tokens={kind: sum(map(len, each)) for kind, each in used.items()},
            held_out={kind: len(each) for kind, each in held.items()},
            layers=rows,
        )
        run.save_result(_RESULT, result.model_dump_json(indent=1))
        stage.finish()
        checkpoint.unlink(missing_ok=True)
    return _with_gemma_scope(run, result) if config.gemma_scope and result.gemma_scope is None else result


def _with_gemma_scope(run: Run, result: Trained) -> Trained:
    """The same SAEs also as files in the layout of Gemma Scope."""
    from demur.saes import load_suite

    suite = load_suite(run.folder / result.saes)
    for row in result.layers:
        suite[row.layer].dense().save_gemma_scope(run.folder / "gemma-scope", average_l0=row.l0)
    result = result.model_copy(update={"gemma_scope": "gemma-scope"})
    run.save_result(_RESULT, result.model_dump_json(indent=1))
    return result


def _earlier(path: Path, key: str) -> Trained | None:
    """What an earlier session made in this folder. Raises RunError: of another configuration."""
    if not path.is_file():
        return None
    found = Trained.model_validate_json(path.read_bytes())
    if found.key != key:
        otherwise = "holds SAEs that were trained otherwise (on other data, or with other settings)"
        raise RunError(f"{path.parent} {otherwise}; choose another folder with --out")
    return found


def _line(figures: Mapping[int, Figures]) -> str:
    """One line on all layers."""
    fvu, l0, dead = zip(*figures.values(), strict=True)
    return f"FVU {min(fvu):.3f}–{max(fvu):.3f}, L0 {min(l0):.1f}–{max(l0):.1f}, dead {max(dead):.1%} at most"


def _measured(model: ChatModel, trained: TrainedSae, held: Mapping[str, Items]) -> TrainedLayer:
    """As the study `dictionaries` measures it, on what was kept apart."""
    from demur.method.fidelity import REGIONS, reconstruction

    fvu: dict[str, float] = {}
    active, tokens = 0.0, 0.0
    for name, kinds in (("chat", CHATS), ("text", ("text",))):
        items = [item for kind in kinds for item in held.get(kind, ())]
        if not items:
            continue
        found = reconstruction(model, trained.sae, items)
        error, spread, counted = (each.sum(0) for each in (found.error, found.spread, found.tokens))
        names = [region.name.lower().replace("_", "-") for region in REGIONS] if name == "chat" else [name] * 3
        fvu |= {names[n]: float(error[n] / spread[n]) for n in range(len(REGIONS)) if spread[n] > 0}
        active, tokens = active + float(found.active.sum()), tokens + float(counted.sum())
    return TrainedLayer(layer=trained.sae.layer, fvu=fvu, l0=active / max(tokens, 1), dead=trained.dead)
