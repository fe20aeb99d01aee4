"""Chat models: tokens and their regions, residuals and logits, answers, hooks. Knows nothing of SAEs or refusal."""

from demur.model._chat_format import PINNED_DATE, SCORED_REGIONS, Batch, ChatFormat, Items, Region, TokenizedPrompt, pad
from demur.model._chat_model import ChatModel, answer_batches, load_model
from demur.model._decoding import decode_greedily
from demur.model._hooks import (
    NO_SITES,
    AnswerGuard,
    AnswerWatch,
    BoundIntervention,
    CompiledIntervention,
    Cursor,
    Edit,
    Residuals,
    Sites,
    capture,
    count_hooks,
    folded_head,
    hooked,
    resumed,
    track,
)  # fmt: skip
from demur.model._loading import (
    MLP_MODELS,
    MODEL_FILES,
    chosen_dtype,
    end_tokens,
    find_device,
    find_layers,
    folder_digest,
    model_class,
    model_identity,
    read_config,
)
from demur.model._resources import (
    CPU_TOKENS,
    SMALL_MODEL,
    Budgets,
    Progress,
    answers_fill,
    by_length,
    cache_bytes,
    fitting_threads,
    halving,
    is_out_of_memory,
    next_batch,
    peak_memory,
    token_bytes,
    tokens_in,
)  # fmt: skip

__all__ = [
    "CPU_TOKENS", "MLP_MODELS", "MODEL_FILES", "NO_SITES", "PINNED_DATE", "SCORED_REGIONS", "SMALL_MODEL",
    "AnswerGuard", "AnswerWatch", "Batch", "BoundIntervention", "Budgets",
    "ChatFormat", "ChatModel", "CompiledIntervention", "Cursor", "Edit", "Items", "Progress", "Region", "Residuals",
    "Sites", "TokenizedPrompt", "answer_batches", "answers_fill", "by_length", "cache_bytes",
    "capture", "chosen_dtype", "count_hooks",
    "decode_greedily", "end_tokens", "find_device", "find_layers", "fitting_threads", "folded_head",
    "folder_digest", "halving", "hooked", "is_out_of_memory", "load_model", "model_class", "model_identity",
    "next_batch", "pad", "peak_memory", "read_config", "resumed", "token_bytes",
    "tokens_in", "track",
]  # fmt: skip
