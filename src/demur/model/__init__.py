"""Chat models: the adapter, the chat format with its regions, and hooks. Knows nothing of SAEs or refusal."""

from demur.model._adapter import Budgets, ChatModel, find_layers, load_model
from demur.model._chat import PINNED_DATE, SCORED_REGIONS, Batch, ChatFormat, Region, TokenizedPrompt, pad
from demur.model._hooks import Captured, Cursor, Edit, capture, count_hooks, edited, hooked, track
from demur.model._identity import model_identity
from demur.model._memory import by_length, halving, is_out_of_memory, next_batch, peak_memory
from demur.model._threads import fitting_threads

__all__ = [
    "PINNED_DATE",
    "SCORED_REGIONS",
    "Batch",
    "Budgets",
    "Captured",
    "ChatFormat",
    "ChatModel",
    "Cursor",
    "Edit",
    "Region",
    "TokenizedPrompt",
    "by_length",
    "capture",
    "count_hooks",
    "edited",
    "find_layers",
    "fitting_threads",
    "halving",
    "hooked",
    "is_out_of_memory",
    "load_model",
    "model_identity",
    "next_batch",
    "pad",
    "peak_memory",
    "track",
]
