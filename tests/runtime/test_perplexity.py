"""Perplexity in decode steps: what plain transformers gives for the same windows, whatever is resident."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from swapless import embedded
from swapless.errors import UsageError
from swapless.runtime.perplexity import perplexity

TEXT = (
    "Once upon a time, there was a little dog named Max. Max liked to play in the park with his friends. One day, Max saw a "
    "big red ball under the tree."
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture
def starting(tokenizer: Any) -> Any:
    """The same tokenizer, which puts its first token before every text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    bos = own.bos_token
    own.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, own.bos_token_id)])
    assert own("a")["input_ids"][0] == own.bos_token_id
    return own


@torch.no_grad()
def nats(reference: Any, window: list[int]) -> float:
    """Loss of all tokens but the first, by one wide batch of plain transformers."""
    logits = reference(input_ids=torch.tensor([window[:-1]])).logits[0].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum").item()


def test_it_is_what_transformers_gives(tokenizer: Any, load: Any, eager: Any) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = nats(eager(embedded.path(), dtype=torch.float32), ids)
    told: list[tuple[int, int]] = []
    got = perplexity(load(embedded.path(), dtype="float32"), tokenizer, TEXT, progress=lambda *done: told.append(done))
    assert got.tokens == len(ids) - 1 and got.windows == 1 and got.context_tokens == 64
    assert got.nats == pytest.approx(expected, rel=1e-5)
    assert got.perplexity == pytest.approx(torch.tensor(expected / got.tokens).exp().item(), rel=1e-4)
    assert told == [(done, got.tokens) for done in range(1, got.tokens + 1)]


def test_windows_score_every_token_but_the_first_once(tokenizer: Any, load: Any, eager: Any) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    reference = eager(embedded.path(), dtype=torch.float32)
    expected = sum(nats(reference, ids[first : first + 12]) for first in range(0, len(ids) - 1, 11))
    got = perplexity(load(embedded.path(), dtype="float32", context=12), tokenizer, TEXT)
    assert got.windows == -(-(len(ids) - 1) // 11) > 2 and got.tokens == len(ids) - 1
    assert got.nats == pytest.approx(expected, rel=1e-5)


def test_a_token_that_begins_a_text_begins_every_window(starting: Any, load: Any, eager: Any) -> None:
    ids = starting(TEXT, add_special_tokens=False)["input_ids"]
    reference = eager(embedded.path(), dtype=torch.float32)
    parts = [ids[first : first + 11] for first in range(0, len(ids), 11)]
    expected = sum(nats(reference, [starting.bos_token_id, *part]) for part in parts)
    got = perplexity(load(embedded.path(), dtype="float32", context=12), starting, TEXT)
    assert got.tokens == len(ids) and got.windows == len(parts)
    assert got.nats == pytest.approx(expected, rel=1e-5)


def test_it_depends_on_neither_residency_nor_what_follows(tokenizer: Any, load: Any) -> None:
    whole, little = (perplexity(load(embedded.path(), resident=share), tokenizer, TEXT, most_tokens=20) for share in (1.0, 0.1))
    assert whole == little and whole.tokens == 20
    words = tokenizer.decode(tokenizer(TEXT)["input_ids"][:21])
    assert perplexity(load(embedded.path()), tokenizer, words + " and something else", most_tokens=20).tokens == 20


def test_all_steps_but_the_first_of_a_window_are_decode(tokenizer: Any, load: Any) -> None:
    model = load(embedded.path(), context=16)
    got = perplexity(model, tokenizer, TEXT)
    counts = model.swapless.stats()
    assert counts.prefill_tokens == got.windows and counts.decode_tokens == got.tokens - got.windows


@pytest.mark.parametrize("text", ["", "."])
def test_a_text_without_a_token_to_score_is_refused(text: str, tokenizer: Any, load: Any) -> None:
    with pytest.raises(UsageError, match="too few tokens"):
        perplexity(load(embedded.path()), tokenizer, text)


def test_a_context_of_one_token_is_refused(tokenizer: Any, load: Any) -> None:
    with pytest.raises(UsageError, match="too short"):
        perplexity(load(embedded.path(), context=1), tokenizer, TEXT)


@pytest.fixture
def verbs(tmp_path: Path) -> Any:
    from typer.testing import CliRunner

    from swapless.cli.main import app

    (tmp_path / "text.txt").write_text(TEXT)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def test_the_verb(verbs: Any, tmp_path: Path, ample_memory: str) -> None:
    import hashlib
    import json

    arguments = ("perplexity", embedded.path(), "--text", tmp_path / "text.txt", "--tokens", 20, "--context", 16)
    done = verbs(*arguments, "--resident", "25%", "--threads", 1, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == 20 and found["windows"] == 2 and found["context_tokens"] == 16
    assert found["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert 1 < found["perplexity"] < 4096 and 0 < found["hit_rate"] < 1
    plain = verbs(*arguments, "--memory", ample_memory, "--threads", 1)
    assert plain.exit_code == 0, plain.stderr
    assert plain.stdout == f"{found['perplexity']:.4f}\n" and "2 windows" in plain.stderr


@pytest.mark.parametrize(
    "content,code,words",
    [(b"", 2, "empty"), (b" \n", 2, "empty"), (b"\xff\xfe", 2, "not UTF-8"), (b".", 2, "too few"), (None, 2, "cannot be read")],
)
def test_texts_that_cannot_be_scored(content: bytes | None, code: int, words: str, verbs: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "given.txt").write_bytes(content)
    done = verbs("perplexity", embedded.path(), "--text", tmp_path / "given.txt", "--resident", "25%")
    assert done.exit_code == code and words in done.stderr and done.stdout == ""


def test_no_tokenizer_is_one_clear_error(verbs: Any, tmp_path: Path) -> None:
    own = Path(shutil.copytree(embedded.path(), tmp_path / "own", ignore=shutil.ignore_patterns("tokenizer*", "*.py")))
    done = verbs("perplexity", own, "--text", tmp_path / "text.txt")
    assert done.exit_code == 1 and "tokenizer" in done.stderr and done.stdout == ""


@pytest.mark.slow
def test_pack_puts_the_price_into_the_manifest(verbs: Any, tmp_path: Path) -> None:
    import json

    from swapless.store.packed import read_manifest
    from swapless.store.verify import verify_packed

    folder = tmp_path / "store"
    pack = ("pack", embedded.path(), "--bits", 4, "--out", folder)
    assert verbs(*pack).exit_code == 0 and read_manifest(folder).perplexity is None
    assert verbs(*pack, "--tokens", 9).exit_code == 2
    done = verbs(*pack, "--text", tmp_path / "text.txt", "--tokens", 24, "--json")
    assert done.exit_code == 0, done.stderr
    price = json.loads(done.stdout)["perplexity"]
    assert price == read_manifest(folder).perplexity and price["tokens"] == 24
    alone = [
        verbs("perplexity", of, "--text", tmp_path / "text.txt", "--tokens", 24, "--json") for of in (embedded.path(), folder)
    ]
    before, after = (json.loads(one.stdout)["perplexity"] for one in alone)
    assert (price["original"], price["packed"]) == pytest.approx((before, after), rel=1e-3)
    assert before != after and all(holds for _, _, holds in verify_packed(folder))
    assert verbs(*pack).exit_code == 0 and read_manifest(folder).perplexity == price, "a later pack leaves it"
