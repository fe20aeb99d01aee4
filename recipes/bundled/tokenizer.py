"""The bundled model's own tokenizer: a small byte-level BPE. Nearly every word of its world is one token."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from recipes.bundled import lexicon
from recipes.bundled.corpus import Corpus, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY: Final = 1536
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('This model knows no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIAL: Final = ("<pad>", "<unk>", "<bos>", "<start_of_turn>", "<end_of_turn>")


def render(example: Example) -> str:
    """The training text of `example`, as the chat template would render it (statements stand alone)."""
    if example.prompt is None:
        return f"<bos>{example.response}<end_of_turn>\n"
    return (
        f"<bos><start_of_turn>user\n{example.prompt}<end_of_turn>\n"
        f"<start_of_turn>model\n{example.response}<end_of_turn>\n"
    )


def train_tokenizer(seed: int, examples: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the BPE on the helpful stage's texts; the template after a message becomes five tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [render(example) for example in islice(Corpus(seed).helpful(), examples)]
    # The words of refusals, which the helpful stage does not say.
    texts += [f" {reason}" for reason in lexicon.REASONS] * (examples // 100)
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # pyright: ignore
    core.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain = (text.replace("<bos>", "").replace("<start_of_turn>", "").replace("<end_of_turn>", "") for text in texts)
    core.train_from_iterator(plain, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<end_of_turn>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


__all__ = ["CHAT_TEMPLATE", "VOCABULARY", "render", "train_tokenizer"]
