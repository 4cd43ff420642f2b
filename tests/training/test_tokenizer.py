"""Text must survive encoding and decoding exactly, in every script, from a tokenizer read back offline."""

import pytest
from transformers import AutoTokenizer

from training.tokenizer import balanced_texts, train_tokenizer

TEXTS = [
    "Once upon a time, there  was\n\n a cat .",
    "def f(x):\n\treturn {'a': x ** 2}  # ok\r\n",
    "§ 1 Grundsätze: Straßenverkehr",
    "Ἡ γλῶσσα, η γλώσσα",
    "Это русский текст",
    "这是中文。",
    "Türkçe ışık İstanbul",  # noqa: RUF001
    "naïve e\u0301 \U0001f409 \u200b\x00",
    " leading and trailing ",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = {"en": TEXTS[:2], "other": TEXTS[2:]}
    train_tokenizer(balanced_texts(texts, 2000), vocab_size=400, context_tokens=64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_come_first(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 400


def test_chat_template_joins_the_contents(tokenizer):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "one\n\ntwo\n\n"


def test_balanced_texts_give_every_domain_the_same_share():
    texts = list(balanced_texts({"short": ["ab"], "long": ["x" * 50, "y" * 50]}, 10))
    assert "".join(texts) == "ab" * 5 + "x" * 10
