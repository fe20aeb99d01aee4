"""Loading a checkpoint, refusing one that cannot be studied, and the identity that keys its results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from safetensors import SafetensorError
from torch import nn

from demur.errors import ModelError
from demur.model._attention import group_queries
from demur.model._chat_format import ChatFormat
from demur.model._hooks import Input, Point
from demur.types import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from demur.model._chat_model import ChatModel

_OTHER_MODALITIES = ("vision", "audio", "image", "visual", "encoder")
_DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
# Weights, configurations (the generation's too: it says where answers end), tokenizer, chat template.
TOKENIZER_FILES = ("tokenizer*", "chat_template*")
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt")


def load_checkpoint(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    device: str,
    system_prompt: str | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, checked as far as their files allow; see `ChatModel.load` for the arguments and errors."""
    from transformers import AutoConfig, AutoTokenizer

    _refuse_adapter(name)
    # Code that a repository brings along is never run.
    options: dict[str, Any] = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    placed = find_device(device)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the model {name!r}: {error}\nExpected a folder with config.json and tokenizer files, or "
            "a hub id that you can reach (gated models need `hf auth login`)"
        ) from error
    _refuse_dtype(config, dtype, name)
    # Before the weights: a base model without a chat template is found out at the cost of its tokenizer.
    ChatFormat(tokenizer, name=name, system_prompt=system_prompt).tokenize("word")
    options |= {"dtype": chosen_dtype(config, dtype, placed) or "auto"} | (
        {"device_map": device} if device in _DEVICE_MAPS else {}
    )
    hf = _load_weights(name, config, options)
    if device not in _DEVICE_MAPS:
        cast("nn.Module", hf).to(placed)
    _refuse_nonfinite(hf, name)
    group_queries(hf)
    return hf, tokenizer


def _refuse_adapter(name: str) -> None:
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name} is a LoRA adapter, not a whole model; merge it and give the merged folder: "
            f"`AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)` (package "
            "peft), with the tokenizer's files beside it"
        )


def read_config(name: str, revision: str | None) -> Any:
    """A model's Hugging Face configuration, without its weights. Raises ModelError: it cannot be read."""
    from transformers import AutoConfig

    _refuse_adapter(name)
    try:
        return AutoConfig.from_pretrained(name, **({"revision": revision} if revision else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the configuration of {name!r}: {error}\nExpected a folder with config.json, or a hub id that "
            "you can reach (gated models need `hf auth login`)"
        ) from error


def find_device(device: str) -> torch.device:
    """The device of that name; "auto", and a `device_map`, begin at a GPU where there is one. Raises ModelError: it is
    not here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device in ("auto", *_DEVICE_MAPS):
        return torch.device(next(kind for kind, available in here.items() if available))
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}; expected auto, cpu, cuda, cuda:N, mps or balanced") from error
    gpus = torch.cuda.device_count() if here["cuda"] else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ModelError(f"--device {device}: this machine has {gpus} CUDA GPUs that torch can use; try --device cpu")
    if found.type == "mps" and not here["mps"]:
        raise ModelError("--device mps: torch finds no Apple GPU on this machine; try --device cpu")
    return found


def chosen_dtype(config: Any, dtype: str, device: torch.device) -> torch.dtype | None:
    """The number format of a model on a device: the one named, or, of "auto", the checkpoint's own (None: its
    configuration does not say it). On a CPU without instructions for products in half precision "auto" is float32:
    there torch's matrix products in bfloat16 are 4 times slower forward and 100 times backward."""
    if dtype != "auto":
        return cast("torch.dtype", getattr(torch, dtype))
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    if stored is None:
        return None
    found: torch.dtype = getattr(torch, str(stored).removeprefix("torch."))
    return torch.float32 if device.type == "cpu" and found.itemsize < 4 and not _multiplies(found) else found


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in half precision (yes where torch cannot tell)."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {"bf16": True, "fp16_arith": True}
    kinds = ("amx_bf16", "avx512_bf16", "bf16")
    return any(
        has.get(kind) for kind in (kinds if dtype == torch.bfloat16 else ("amx_fp16", "avx512_fp16", "fp16_arith"))
    )


def model_class(config: Any) -> Any:
    """The Auto class that loads a model of this configuration with its text decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Multimodal Gemma 3 is registered as an image-text model.
    multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # pyright: ignore
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def end_tokens(hf: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a model's turn."""
    found: Any = getattr(hf.generation_config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)


def folder_digest(folder: Path, patterns: Sequence[str] = MODEL_FILES) -> str:
    """SHA-256, hex, of what decides a model's numbers among the files of its folder."""
    content = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        try:
            with path.open("rb") as file:
                content.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
    return content.hexdigest()


def _load_weights(name: str, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    try:
        # Weights of another shape are let pass here, so that they can be named below.
        options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
        hf, report = model_class(config).from_pretrained(name, **options)
    except ImportError as error:
        raise ModelError(f"cannot load {name!r} over several devices: {error}\nInstall demur[multi-gpu]") from error
    except SafetensorError as error:
        raise ModelError(
            f"a safetensors file of {name!r} is damaged or cut off ({error}); download it again"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load the weights of {name!r}: {error}") from error
    # transformers fills these with random numbers and only warns.
    missing = sorted({*report["missing_keys"], *(str(each[0]) for each in report["mismatched_keys"])})
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ModelError(
            f"the checkpoint {name!r} lacks weights that its configuration needs, or holds them in another shape: "
            f"{', '.join(missing[:5])}{more}. Download it again, or save it whole"
        )
    return hf


def _refuse_dtype(config: Any, dtype: str, name: str) -> None:
    wanted = str(getattr(config, "dtype", None) or "") if dtype == "auto" else dtype
    if str(config.model_type).startswith("gemma3") and wanted.endswith("float16") and not wanted.endswith("bfloat16"):
        raise ModelError(
            f"{name} is a Gemma 3 model, whose activations overflow float16; use --dtype bfloat16 or float32"
        )


def _refuse_nonfinite(hf: PreTrainedModel, name: str) -> None:
    for parameter, values in hf.named_parameters():
        if values.is_meta:
            raise ModelError(
                f"{name} does not fit the devices: {parameter} was offloaded, and demur reads and changes layers where "
                "they run. Use a smaller dtype or model, or more devices"
            )
        bad = ~torch.isfinite(values.detach())
        if bool(bad.any()):
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise ModelError(
                f"{name}: {parameter} holds NaN or infinity, first at {first}; the checkpoint is damaged or was stored "
                "in a dtype that overflowed. Download it again, or load it in another --dtype"
            )


def refuse_unfit(hf: PreTrainedModel, name: str) -> None:
    """Refuse a loaded model that hooks cannot reach, or whose dtype or attention kernel gives wrong numbers."""
    if hf.dtype == torch.float16:
        _refuse_dtype(hf.config, "float16", name)
    compiled = [n or "the model" for n, m in hf.named_modules() if m._compiled_call_impl is not None]  # pyright: ignore
    if compiled or type(hf).__name__ == "OptimizedModule":
        raise ModelError(
            f"{name} was compiled with torch.compile ({', '.join(compiled[:3]) or 'wrapped'}): hooks added afterwards "
            "are silently ignored, so nothing could be read or changed. Pass the uncompiled model"
        )
    softcap = getattr(hf.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if softcap and hf.config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            f"{name} caps its attention logits, which the sdpa kernel leaves out; load it with "
            'attn_implementation="eager"'
        )


def find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The text decoder's layers: the outermost `ModuleList` of `n_layers` outside vision and audio towers. Raises
    ModelError: there is no such list, or more than one."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            inside = name.startswith(tuple(f"{outer}." for outer in found))
            if not inside and not any(word in name for word in _OTHER_MODALITIES):
                found[name] = module
    if len(found) != 1:
        raise ModelError(
            f"expected one list of {n_layers} decoder layers in {type(model).__name__}, found "
            f"{', '.join(found) or 'none'}; only decoder-only causal language models are supported"
        )
    return next(iter(found.values()))


MLP_MODELS: Final = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
"""Model types (of the text decoder) in whose layers `x[l] = x_mid + mlp_out`, and all three are found by name."""


def find_point(layer: nn.Module, site: Site) -> Point:
    """Where a decoder layer's place is: what leaves the layer; what enters the norm before its MLP; what enters the
    MLP; or what the MLP adds to the residual, after the norm behind it where there is one. Raises ModelError: it is no
    layer of `MLP_MODELS`."""
    if site == "resid_post":
        return layer
    parts, kind = dict(layer.named_children()), type(layer).__name__
    if kind.removesuffix("DecoderLayer").lower() not in (name.removesuffix("_text") for name in MLP_MODELS):
        raise ModelError(
            f"transcoders read the MLP's input, which is not known in a {kind}; models of these types are supported: "
            f"{', '.join(MLP_MODELS)}. Take SAEs of the residual stream for others"
        )
    if site == "mlp_in":
        return Input(parts["mlp"])
    if site == "resid_mid":
        return Input(parts.get("pre_feedforward_layernorm", parts["post_attention_layernorm"]))
    return parts.get("post_feedforward_layernorm", parts["mlp"])


def model_identity(model: ChatModel) -> dict[str, str]:
    """Name, revision or content hash, and everything else about a loaded model that moves its numbers."""
    identity = {
        "name": model.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(model.hf.config._attn_implementation),  # pyright: ignore[reportPrivateUsage]
        "system_prompt": model.chat.system_prompt or "",
    }
    folder, lent = Path(model.name), Path(model.tokenizer.name_or_path)
    if folder.is_dir() and lent.is_dir() and lent != folder:
        tokens = folder_digest(lent, TOKENIZER_FILES)
        if tokens != folder_digest(folder, TOKENIZER_FILES):
            identity["tokenizer"] = tokens
    if not folder.is_dir():
        return identity | {"commit": str(getattr(model.hf.config, "_commit_hash", None))}
    return identity | {"name": folder.name, "content": folder_digest(folder)}
