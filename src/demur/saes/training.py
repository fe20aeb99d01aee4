"""Training SAEs of several layers at once with SAELens' trainers (extra `demur[saelens]`), on activations that come in
shuffled blocks; a run that was killed goes on from its last checkpoint to the weights of one that was not.

SAELens gives the architectures, their losses (the auxiliary one included), the optimiser step and the schedules: one
`SAETrainer` a layer, driven through its public `step`. The loop is demur's own, because that of `MultiSAETrainer`
neither says how it fares between steps nor finds its place in the data again; so are the normalisation by mean and
spread, and the revival of features that have stopped firing.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demur.errors import InputError, SaeError
from demur.model import Batch, ChatModel, Items, Region
from demur.saes._sae import DenseSae
from demur.types import Value

Architecture = Literal["batchtopk", "topk", "jumprelu"]
Blocks = Callable[[int], "Mapping[int, Float[Tensor, 'tokens d_model'] | Shuffled]"]
"""Number of a block → activations by layer, the same tokens in the same, shuffled, order; always the same block."""

TRAINED: Final = (Region.INSTRUCTION, Region.POST_INSTRUCTION, Region.RESPONSE)
"""Tokens that SAEs are trained on: never BOS, headers or padding. All of a plain text but its first token is among
them."""
_REVIVED: Final = (2, 3, 4, 5, 6)
"""Eighths of the training at which features that have stopped firing are revived."""
_CALIBRATED: Final = 20_000
"""Tokens on which the threshold of a BatchTopK dictionary is set."""
_FIRST_THRESHOLD: Final = 0.01
_RARELY: Final = 20.0
"""Checkpoints are at least so many times as far apart as writing one takes."""


class SaeRecipe(Value):
    """How SAEs are trained. `k`: mean active features per token (of each token, for `topk`; the target, for
    `jumprelu`)."""

    width: int
    k: int
    steps: int
    batch: int = 1024
    """Tokens of a step."""
    architecture: Architecture = "batchtopk"
    lr: float | None = None
    """Peak of the learning rate; None: 2e-4 at 16,384 features (4e-4 for `jumprelu`), and as 1/√width elsewhere."""
    seed: int = 0

    @property
    def peak(self) -> float:
        # A threshold moves by little more than the rate in a step, and has far to go.
        usual = 4e-4 if self.architecture == "jumprelu" else 2e-4
        return self.lr or usual * (2**14 / self.width) ** 0.5

    @property
    def dead_after(self) -> int:
        """Steps without firing after which a feature counts as dead."""
        return min(1000, max(20, self.steps // 13))


class Figures(NamedTuple):
    """How one SAE fares on the latest steps: fraction of variance unexplained, active features per token, and the share
    of features that are dead."""

    fvu: float
    l0: float
    dead: float


class TrainedSae(NamedTuple):
    """A dictionary in the model's own units, and the share of its features that were dead at the end."""

    sae: DenseSae
    dead: float


Report = Callable[[int, Mapping[int, Figures]], None]
"""Called with the steps that are done and each layer's figures since the last call."""


@dataclass(frozen=True)
class Shuffled:
    """Rows of a tensor in another order, a slice at a time."""

    values: Float[Tensor, "tokens d_model"]
    order: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> Float[Tensor, "_ d_model"]:
        return self.values[self.order[rows]]


def require_saelens() -> Any:
    """The package `sae_lens`. Raises SaeError: it is not installed, or too old."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import sae_lens
            from sae_lens.training import sae_trainer
    except ImportError as error:
        raise SaeError("SAEs are trained with SAELens: pip install 'demur[saelens]'") from error
    if not hasattr(sae_trainer.SAETrainer, "step"):
        raise SaeError(f"SAELens {sae_lens.__version__} is too old to train with: pip install -U 'demur[saelens]'")
    return sae_lens


@dataclass
class ChatActivations:
    """Activations of a model's layers on conversations and texts, in blocks: all layers from one pass.

    Args:
        model: whose residuals are read.
        layers: after which decoder layers.
        items: kind → conversations or texts. Each kind is gone through in shuffled rounds, again and again.
        mix: kind → its share of the tokens, in any unit.
        size: tokens of a block, at least. More are shuffled better, and take `size · layers · d_model` numbers.
        seed: of the order.
    """

    model: ChatModel
    layers: Sequence[int]
    items: Mapping[str, Items]
    mix: Mapping[str, float]
    size: int
    seed: int = 0
    _held: tuple[list[tuple[str, int]], Mapping[int, Tensor]] | None = field(default=None, init=False, repr=False)

    def __call__(self, number: int) -> Mapping[int, Shuffled]:
        """A block. One that holds the same items as the one before it is only shuffled anew."""
        drawn = self._plan(number)
        chosen = sorted(set(drawn))
        if self._held is None or self._held[0] != chosen:
            self._held = None  # Two blocks may not fit in memory.
            self._held = chosen, self.read([self.items[kind][n] for kind, n in chosen])
        sizes = torch.tensor([_counted(self.items[kind][n]) for kind, n in chosen])
        starts = dict(zip(chosen, (sizes.cumsum(0) - sizes).tolist(), strict=True))
        rows = [torch.arange(_counted(self.items[kind][n])) + starts[kind, n] for kind, n in drawn]
        order = torch.cat(rows)[torch.randperm(sum(map(len, rows)), generator=_generator(self.seed, number))]
        return {layer: Shuffled(values, order) for layer, values in self._held[1].items()}

    def read(self, items: Items) -> dict[int, Float[Tensor, "tokens d_model"]]:
        """Residuals at the trained tokens of `items`, in their order, in the model's dtype, on the CPU."""
        ends = torch.tensor([0, *map(_counted, items)]).cumsum(0).tolist()
        shape, dtype = (ends[-1], self.model.d_model), self.model.dtype
        found = {layer: torch.empty(shape, dtype=dtype) for layer in self.layers}

        def run(batch: Batch) -> list[dict[int, Tensor]]:
            residuals, inside = self.model.residuals(batch, list(self.layers)), batch.within(TRAINED)
            flat = {layer: values[inside.to(values.device)].cpu() for layer, values in residuals.items()}
            parts = {layer: values.split(inside.sum(1).tolist()) for layer, values in flat.items()}
            return [{layer: parts[layer][row] for layer in parts} for row in range(len(batch))]

        for places, rows in self.model.over_batches(items, run):
            for place, row in zip(places, rows, strict=True):
                for layer, values in row.items():
                    found[layer][ends[place] : ends[place + 1]] = values
        return found

    def _plan(self, number: int) -> list[tuple[str, int]]:
        while len(self._planned) <= number:
            drawn, tokens = list[tuple[str, int]](), 0
            while tokens < self.size:
                kind, n = next(self._draws)
                drawn.append((kind, n))
                tokens += _counted(self.items[kind][n])
            self._planned.append(drawn)
        return self._planned[number]

    @cached_property
    def _planned(self) -> list[list[tuple[str, int]]]:
        return []

    @cached_property
    def _draws(self) -> Iterator[tuple[str, int]]:
        def rounds(kind: str) -> Iterator[int]:
            generator = _generator(self.seed, kind)
            while True:
                yield from torch.randperm(len(self.items[kind]), generator=generator).tolist()

        def draw() -> Iterator[tuple[str, int]]:
            streams = {kind: rounds(kind) for kind in self.mix}
            given = dict.fromkeys(self.mix, 0.0)
            while True:
                # The kind that is furthest behind its share.
                kind = min(given, key=lambda each: given[each] / self.mix[each])
                n = next(streams[kind])
                given[kind] += _counted(self.items[kind][n])
                yield kind, n

        for kind in self.mix:
            if not sum(map(_counted, self.items[kind])):
                raise InputError(f"there is no token to train on among the {kind} items; leave {kind} out of the mix")
        return draw()


def _counted(item: Any) -> int:
    return sum(item.regions.count(region) for region in TRAINED)


def _generator(*seeds: object) -> torch.Generator:
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@dataclass(frozen=True)
class _Scale:
    """Residuals as the SAE sees them: `(x − mean) / size`, of variance 1 in the mean over dimensions."""

    mean: Float[Tensor, " d_model"]
    size: float

    @classmethod
    def of(cls, x: Float[Tensor, "tokens d_model"]) -> _Scale:
        mean, square = torch.zeros(x.shape[1], dtype=torch.float64), 0.0
        for part in x.split(1 << 16):
            mean += part.double().sum(0) / len(x)
        for part in x.split(1 << 16):
            square += float((part.double() - mean).square().sum()) / x.numel()
        if square <= 0:
            raise SaeError("the activations to train on are all the same")
        return cls(mean.float(), square**0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean.to(x.device)) / self.size


class _Layer:
    """One layer's SAE in training."""

    def __init__(self, recipe: SaeRecipe, layer: int, scale: _Scale, device: torch.device) -> None:
        self.recipe, self.layer, self.scale, self.device = recipe, layer, scale, device
        self._sums = torch.zeros(3, device=device)
        lens: Any = require_saelens()
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_in = len(scale.mean)
        options: dict[str, Any] = {"d_in": d_in, "d_sae": recipe.width, "dtype": "float32", "device": str(device)}
        if recipe.architecture == "jumprelu":
            # Gemma Scope 2's penalty around a target; a share of the loss at any width of the residual.
            options |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(recipe.k)}
            options |= {"l0_coefficient": 0.03 * d_in, "l0_warm_up_steps": recipe.steps // 5}
            options |= {"jumprelu_init_threshold": _FIRST_THRESHOLD}
            kinds = lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig
        elif recipe.architecture == "topk":
            options["k"], kinds = recipe.k, (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig)
        else:
            options["k"], kinds = float(recipe.k), (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(recipe.seed + layer)
            self.sae: Any = kinds[0](kinds[1](**options))
        config = SAETrainerConfig(
            total_training_samples=recipe.steps * recipe.batch,
            train_batch_size_samples=recipe.batch,
            lr=recipe.peak,
            lr_end=recipe.peak / 10,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=recipe.steps // 16 if recipe.steps >= 32 else 0,
            dead_feature_window=recipe.dead_after,
            device=str(device),
        )
        self.trainer: Any = SAETrainer(config, self.sae, iter(()))

    def step(self, x: Float[Tensor, "batch d_model"]) -> None:
        """One optimiser step on raw activations."""
        out = self.trainer.step(self.scale(x.to(self.device)))
        self.trainer.n_training_steps += 1
        seen, made = out.sae_in.detach().float(), out.sae_out.detach().float()
        spread = (seen - seen.mean(0)).square().sum()
        active = (out.feature_acts > 0).sum() / len(seen)
        self._sums += torch.stack([(seen - made).square().sum() / spread, active, torch.ones_like(spread)])

    @property
    def dead(self) -> Tensor:
        return self.trainer.n_forward_passes_since_fired >= self.recipe.dead_after

    def figures(self) -> Figures:
        """On the steps since the last call."""
        fvu, l0, steps = self._sums.tolist()
        self._sums.zero_()
        return Figures(fvu / steps, l0 / steps, float(self.dead.float().mean()))

    @torch.no_grad()
    def revive(self, x: Float[Tensor, "tokens d_model"], seed: int) -> None:
        """Point features that no longer fire at what is reconstructed worst, and forget their optimiser state: the
        auxiliary loss alone leaves many dead in early layers."""
        dead, sae = self.dead, self.sae
        count = int(dead.sum())
        if not 0 < count < len(dead):
            return
        seen = self.scale(x.to(self.device))
        residue = seen - sae(seen)
        chances = residue.square().sum(-1).cpu()
        tokens = torch.multinomial(chances, count, count > len(chances), generator=_generator(seed, self.layer))
        directions = torch.nn.functional.normalize(residue[tokens.to(self.device)], dim=-1)
        sae.W_dec[dead] = directions * sae.W_dec[~dead].norm(dim=-1).mean()
        sae.W_enc[:, dead] = directions.T * sae.W_enc[:, ~dead].norm(dim=0).mean()
        sae.b_enc[dead] = 0.0
        places: list[tuple[Tensor, Any]] = [(sae.W_dec, dead), (sae.W_enc, (slice(None), dead)), (sae.b_enc, dead)]
        if self.recipe.architecture == "jumprelu":
            sae.threshold[dead] = _FIRST_THRESHOLD
            places.append((sae.threshold, dead))
        for weight, where in places:
            for name in ("exp_avg", "exp_avg_sq"):
                self.trainer.optimizer.state[weight][name][where] = 0.0
        self.trainer.n_forward_passes_since_fired[dead] = 0

    _COUNTED = ("n_training_samples", "n_training_steps", "n_forward_passes_since_fired")

    @property
    def state(self) -> dict[str, Any]:
        """All that training goes on from, as tensors and plain values."""
        trainer = self.trainer
        return {
            "weights": self.sae.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "coefficients": {name: each.state_dict() for name, each in trainer.coefficient_schedulers.items()},
            "counts": {name: getattr(trainer, name) for name in self._COUNTED},
            "scale": (self.scale.mean, self.scale.size),
            "sums": self._sums,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.sae.load_state_dict(state["weights"])
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        self.trainer.lr_scheduler.load_state_dict(state["schedule"])
        for name, each in state["coefficients"].items():
            self.trainer.coefficient_schedulers[name].load_state_dict(each)
        for name, value in state["counts"].items():
            setattr(self.trainer, name, value.to(self.device) if isinstance(value, Tensor) else value)
        self._sums = state["sums"].to(self.device)

    @torch.no_grad()
    def dense(self, x: Float[Tensor, "tokens d_model"]) -> DenseSae:
        """The dictionary in the model's own units, decoder rows of norm 1."""
        sae, size, mean = self.sae, self.scale.size, self.scale.mean
        w_enc, b_enc, w_dec, b_dec = (getattr(sae, name).cpu() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        norms = w_dec.norm(dim=-1).clamp(min=1e-12)
        centre = b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros_like(b_dec)
        w_enc, b_enc = w_enc * norms, (b_enc - centre @ w_enc) * norms
        # x̂ = mean + size · (b_dec + f_normed w_dec), and f = size · f_normed.
        found = DenseSae(
            layer=self.layer,
            w_enc=w_enc,
            b_enc=size * b_enc - mean @ w_enc,
            threshold=size * sae.threshold.cpu().clamp(min=0) * norms if hasattr(sae, "threshold") else None,
            k=self.recipe.k if self.recipe.architecture == "topk" else None,
            w_dec=w_dec / norms[:, None],
            b_dec=mean + size * b_dec,
        )
        return calibrated(found, x, self.recipe.k) if self.recipe.architecture == "batchtopk" else found


def calibrated(sae: DenseSae, x: Float[Tensor, "tokens d_model"], k: float) -> DenseSae:
    """A JumpReLU dictionary with the one threshold that leaves `k` features a token active on `x`."""
    x = x[:: max(1, len(x) // _CALIBRATED)].float()
    count, best = int(k * len(x)), torch.empty(0)
    for part in x.split(1024):
        values = (part @ sae.w_enc + sae.b_enc).relu().flatten()
        best = torch.cat([best, values])
        best = best.topk(min(count + 1, len(best)), sorted=False).values
    low = best.topk(min(count + 1, len(best))).values[-2:]
    # Between the last that is to be active and the next, so that rounding decides nothing.
    threshold = torch.full_like(sae.b_enc, float(low.mean()))
    return DenseSae(sae.layer, sae.w_enc, sae.b_enc, threshold, sae.w_dec, None, sae.b_dec)


def train_saes(
    recipe: SaeRecipe,
    blocks: Blocks,
    layers: Sequence[int],
    *,
    device: Callable[[int], torch.device] = lambda _: torch.device("cpu"),
    save: Callable[[Mapping[str, Any]], object] | None = None,
    saved: Path | None = None,
    report: Report | None = None,
    between: float = 5.0,
) -> dict[int, TrainedSae]:
    """Train one SAE for each layer. With the same seed, data and number of threads, the same weights; and, on one
    machine, the same ones after a kill. Raises SaeError: SAELens is missing; InputError: a block holds less than a
    batch.

    Args:
        recipe: what is trained, and for how long.
        blocks: the activations. The first block sets the normalisation.
        layers: decoder layers.
        device: layer → where its SAE is trained.
        save: stores a checkpoint, of tensors and plain values, whole or not at all.
        saved: the checkpoint to go on from, where there is such a file, as `torch.save` wrote it.
        report: told of progress about a hundred times.
        between: seconds between two checkpoints, at least.
    """
    require_saelens()
    state: Any = torch.load(saved, map_location="cpu", weights_only=True) if saved and saved.is_file() else None
    step, number, start = (0, 0, 0) if state is None else state["at"]
    acts = blocks(number)
    scales = {n: _Scale.of(acts[n][:]) if state is None else _Scale(*state["layers"][n]["scale"]) for n in layers}
    trained = {layer: _Layer(recipe, layer, scales[layer], device(layer)) for layer in layers}
    if state is not None:
        for layer, each in trained.items():
            each.load(state["layers"][layer])
    revivals = {recipe.steps * share // 8 for share in _REVIVED}
    every = max(1, recipe.steps // 100)
    last, took = time.monotonic(), 0.0
    while step < recipe.steps:
        size = len(acts[layers[0]]) // recipe.batch
        if not size:
            raise InputError(f"a block has {len(acts[layers[0]])} tokens, less than a batch of {recipe.batch}")
        for start in range(start, min(size, start + recipe.steps - step)):  # noqa: B020
            for layer, each in trained.items():
                if step in revivals:
                    each.revive(acts[layer][: 8 * recipe.batch], recipe.seed + step)
                each.step(acts[layer][start * recipe.batch : (start + 1) * recipe.batch])
            step += 1
            if report and (step % every == 0 or step == recipe.steps):
                report(step, {layer: each.figures() for layer, each in trained.items()})
            now = time.monotonic()
            if save and (step == recipe.steps or now - last > max(between, _RARELY * took)):
                save({"at": (step, number, start + 1), "layers": {n: each.state for n, each in trained.items()}})
                last, took = time.monotonic(), time.monotonic() - now
        if step < recipe.steps:
            number, start = number + 1, 0
            acts = blocks(number)
    return {n: TrainedSae(each.dense(acts[n][:]), float(each.dead.float().mean())) for n, each in trained.items()}
