"""Tiny random checkpoints of two families whose experts lie one by one, at one thread, where every bit can be compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


@pytest.fixture(autouse=True)
def logging_is_free() -> Iterator[None]:
    """An interrupt between taking the lock of ``logging`` and giving it back would have all other threads wait for ever."""
    yield
    lock: Any = logging._lock
    while lock._is_owned():
        lock.release()


class Shape(NamedTuple):
    """What the tiny checkpoints have in common."""

    num_moe_layers: int = 3
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 64
    inner_size: int = 48
    vocabulary: int = 128

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in bf16: gate, up and down."""
        return 3 * self.hidden_size * self.inner_size * 2


SHAPE = Shape()


def _config(family: str) -> Any:
    from transformers import OlmoeConfig, Qwen3MoeConfig

    common = {
        "vocab_size": SHAPE.vocabulary,
        "hidden_size": SHAPE.hidden_size,
        "num_hidden_layers": SHAPE.num_moe_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": SHAPE.num_experts,
        "num_experts_per_tok": SHAPE.top_k,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "olmoe":
        return OlmoeConfig(intermediate_size=SHAPE.inner_size, **common)
    return Qwen3MoeConfig(moe_intermediate_size=SHAPE.inner_size, head_dim=16, decoder_sparse_step=1, **common)


def _save(family: str, folder: Path, **options: Any) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_config(family))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = 1.0 if "embed_tokens" in name else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    return folder


def word_tokenizer() -> Any:
    """A tokenizer for the tiny checkpoints, whose words are w4 to w127."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{number}": number for number in range(4, SHAPE.vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **names)


@pytest.fixture(scope="session")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE in bf16, a tensor an expert, in several shards."""
    return _save("olmoe", tmp_path_factory.mktemp("olmoe"), max_shard_size="150KB")


@pytest.fixture(scope="session")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE in bf16, a tensor an expert, in one shard."""
    return _save("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.fixture
def own_olmoe(olmoe: Path, tmp_path: Path) -> Path:
    """A copy of :func:`olmoe` that a test may damage."""
    return Path(shutil.copytree(olmoe, tmp_path / "olmoe"))


@pytest.fixture
def load() -> Iterator[Callable[..., Any]]:
    """``swapless.load`` with a short context; whatever it loads is closed after the test."""
    import swapless

    loaded = []

    def call(folder: Path, *args: Any, **options: Any) -> Any:
        if not args and "memory" not in options:
            options.setdefault("resident", 0.25)
        model = swapless.load(folder, *args, **{"context": 64} | options)
        loaded.append(model)
        return model

    yield call
    for model in loaded:
        model.swapless.close()


@pytest.fixture
def eager() -> Callable[[Path], Any]:
    """The checkpoint in plain transformers: eager experts, weights aligned to 64 bytes."""
    from transformers import AutoModelForCausalLM

    from tests.families.tiny import clone_weights

    def call(folder: Path, **options: Any) -> Any:
        options = {"experts_implementation": "eager"} | options
        return clone_weights(AutoModelForCausalLM.from_pretrained(folder, **options).eval())

    return call


@pytest.fixture
def prompt() -> Any:
    """Twelve token ids, int64 (1, 12)."""
    import torch

    return torch.randint(3, SHAPE.vocabulary, (1, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def generate() -> Callable[..., Any]:
    """Greedy tokens of a model: ``generate(model, ids, n)`` gives the whole sequences."""
    import torch

    def call(model: Any, ids: Any, new_tokens: int = 8, **options: Any) -> Any:
        options = {"attention_mask": torch.ones_like(ids)} | options
        return model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options)

    return call


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads changes the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(olmoe: Path, load: Any) -> Any:
    """OLMoE in float32, offloaded: bits differ by the shape of a product, choices hardly ever."""
    return load(olmoe, dtype="float32", resident=0.5, context=128)


@pytest.fixture
def plain(olmoe: Path, eager: Any) -> Any:
    """The same in plain transformers."""
    import torch

    return eager(olmoe, dtype=torch.float32)


@pytest.fixture
def repetitive() -> Any:
    """Thirteen tokens, int64 (1, 13), that a look-up in the prompt finds again."""
    import torch

    return torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
