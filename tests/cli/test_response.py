"""Thinking and answer told apart as families write them, and stops that name special tokens: with real tokenizers."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from swapless import embedded
from swapless.cli.response import response_format
from swapless.cli.stream import TextStream
from swapless.cli.template import chat_ids
from swapless.errors import UsageError

HARMONY = ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "<|constrain|>"]
ANALYSIS = "<|channel|>analysis<|message|>The user says hello.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>Hello!"


def _tokenizer(*special):
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@pytest.fixture(scope="module")
def harmony():
    return _tokenizer(*HARMONY)


@pytest.fixture(scope="module")
def plain():
    return _tokenizer()


def _read(tokenizer, text, *, prompt="Hi", stop=(), **how):
    answer, thinking = [], []
    stream = TextStream(tokenizer, answer.append, stop, think=thinking.append, **how)
    stream.put(tokenizer(prompt, return_tensors="pt")["input_ids"])
    for number in tokenizer(text, add_special_tokens=False)["input_ids"]:
        stream.put(torch.tensor([number]))
        if stream.stopped:
            break
    stream.end()
    assert ("".join(answer), "".join(thinking)) == (stream.text, stream.thinking) and "" not in answer
    return stream


@pytest.mark.parametrize(
    ("prompt", "text", "answer", "thinking"),
    [
        ("<|start|>assistant", ANALYSIS + FINAL + "<|return|>", "Hello!", "The user says hello."),
        ("<|start|>assistant", ANALYSIS + FINAL, "Hello!", "The user says hello."),
        ("<|start|>assistant", FINAL + "<|return|>", "Hello!", ""),
        ("<|start|>assistant<|channel|>final<|message|>", "Hello!<|return|>", "Hello!", ""),
        ("<|start|>assistant<|channel|>analysis<|message|>", "Think.<|end|><|start|>assistant" + FINAL, "Hello!", "Think."),
        ("<|start|>assistant", "<|channel|>analysis<|message|>I think", "", "I think"),
        ("<|start|>assistant", "Hello without any channel.", "Hello without any channel.", ""),
        (
            "<|start|>assistant",
            "<|channel|>commentary to=functions.a <|constrain|>json<|message|>{}<|call|><|start|>assistant" + FINAL,
            "Hello!",
            "{}",
        ),
    ],
)
def test_harmony(harmony, prompt, text, answer, thinking):
    stream = _read(harmony, text, prompt=prompt)
    assert (stream.text, stream.thinking) == (answer, thinking)
    turn = {"role": "assistant", "content": answer} | ({"reasoning_content": thinking} if thinking else {})
    assert stream.message() == turn
    if not thinking:  # a text that is only continued has channels too: they are special tokens, no part of any text
        assert _read(harmony, text, prompt=prompt, response=response_format(harmony, chat=False)).text == answer


@pytest.mark.parametrize("mark", ["think", "thinking", "seed:think"])
@pytest.mark.parametrize("special", [False, True])
def test_thinking_between_tags(mark, special):
    opening, ending = f"<{mark}>", f"</{mark}>"
    tokenizer = _tokenizer(opening, ending) if special else _tokenizer()
    for prompt, text in (
        (f"Hi {opening}\n", f"Let me think.{ending}\n\nHello!"),
        ("Hi", f"{opening}Let me think.{ending}\n\nHello!"),
    ):
        stream = _read(tokenizer, text + "<eos>", prompt=prompt)
        assert (stream.text, stream.thinking.strip()) == ("Hello!", "Let me think.")
    assert _read(tokenizer, "Hello!").text == "Hello!"
    assert _read(tokenizer, f"{opening}Let me", prompt="Hi").text == ""


def test_a_continued_text_keeps_its_tags(plain):
    text = "<think>is how a tag looks</think> in a text"
    assert _read(plain, text, response=response_format(plain, chat=False)).text == text


def test_the_tokenizers_own_template_comes_first():
    tokenizer = _tokenizer(*HARMONY)
    tokenizer.response_template = {
        "start_anchor": "assistant:",
        "fields": {"thinking": {"open": "((", "close": "))"}, "content": {}},
    }
    stream = _read(tokenizer, "((mine))Hello", prompt="user: hi assistant:")
    assert (stream.text, stream.thinking) == ("Hello", "mine")


@pytest.mark.parametrize(
    "template",
    [
        {"start_anchor": "a", "fields": {"content": {"content": "json"}}},
        {"fields": {}},
        {"start_anchor": "a", "fields": {"content": {"content": "no such"}}},
        {"start_anchor": "a", "fields": {"content": {"optional": False, "open": "never"}}},
    ],
)
def test_a_template_that_does_not_fit_leaves_plain_text(plain, template):
    tokenizer = _tokenizer()
    tokenizer.response_template = template
    stream = _read(tokenizer, "Hello, you")
    assert stream.problem or stream.text == "Hello, you"
    if "open" not in template["fields"].get("content", {}):
        assert "Hello" in stream.text


@pytest.mark.parametrize("stop", ["<|end|>", "<eos>", "!<|end|>", "<|end|><|start|>", "<|channel|>final"])
def test_stops_that_name_special_tokens(harmony, stop):
    text = "Hello!<|end|><|start|>assistant<|channel|>final<|message|>more<eos>never"
    stream = _read(harmony, text, stop=(stop,), response=None)
    assert stream.stopped
    raw = text[: text.index(stop)]
    for mark in (*HARMONY, "<eos>"):
        raw = raw.replace(mark, "")
    assert stream.text == raw


def test_special_tokens_are_no_part_of_the_text(harmony):
    for marks in itertools.permutations(["<eos>", "<|call|>"]):
        assert _read(harmony, f"a{marks[0]}b{marks[1]}c", response=None).text == "abc"


TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("template", [TEMPLATE, PARTS])
def test_templates_of_texts_and_of_parts(template):
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    assert "Hello" in tokenizer.decode(chat_ids(tokenizer, HELLO)[0])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Only users') }}", "Only users"),
        ("{% for m in messages %}{{ m.content | frobnicate }}{% endfor %}", "frobnicate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "does not work"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("", "no chat template"),
        ("{# nothing #}", "makes no prompt"),
        ({"tool_use": "a", "rag": "b"}, "'tool_use', 'rag'"),
    ],
)
def test_templates_that_do_not_work_are_one_message(template, said):
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match=r".") as caught:
        chat_ids(tokenizer, HELLO)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_beside_the_checkpoint(copy):
    from swapless.cli.session import open_tokenizer

    for file in copy.glob("chat_template*"):
        file.unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert chat_ids(open_tokenizer(str(copy)), HELLO).shape[-1] > 1
