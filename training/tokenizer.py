"""The tokenizer of the embedded model: byte-level BPE, trained on an equal share of every domain so that every script gets
merges of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def balanced_texts(texts_by_domain: Mapping[str, Sequence[str]], characters_per_domain: int) -> Iterator[str]:
    """Yield `characters_per_domain` of every domain, small domains more than once: merges count on equal shares."""
    for texts in texts_by_domain.values():
        left = characters_per_domain
        while left > 0:
            for text in texts:
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break


def train_tokenizer(texts: Iterator[str], vocab_size: int, context_tokens: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that round-trips every UTF-8 text: no normaliser, no added space, all 256 bytes in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
