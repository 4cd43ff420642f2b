"""What a forward call holds: foreseen from a model without weights, and never less than it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swapless.runtime.dry import CacheSize
from swapless.runtime.needs import Call, Needs, call_of
from tests.fresh import numbers_of

NEEDS = Needs(((64, 100), (256, 500), (1024, 6500)), step_bytes=50, logits_row_bytes=7, cache=CacheSize(10, 3))


def test_prompts_between_those_that_were_tried_lie_on_a_line_and_longer_ones_above_it() -> None:
    def prompt(tokens: int) -> int:
        return NEEDS.of(Call(1, tokens, 0, 1))

    assert [prompt(n) for n in (2, 64, 160, 256, 640, 1024)] == [100, 100, 300, 500, 3500, 6500]
    assert prompt(2048) == 4 * 6500
    found = [prompt(n) for n in range(2, 3000, 7)]
    assert found == sorted(found)


def test_decode_steps_and_what_goes_on_behind_others() -> None:
    assert NEEDS.of(Call(1, 1, 700, 1)) == 50 and NEEDS.of(Call(8, 1, 700, 1)) == 400
    assert NEEDS.of(Call(1, 512, 512, 1)) == 50 + 3250
    assert NEEDS.of(Call(1, 5, 1019, 5)) == 50 + 6500 * 64 // 1024 + 4 * 7, "a scan takes a whole chunk for a few tokens"


def test_batches_and_logits() -> None:
    assert NEEDS.of(Call(4, 64, 0, 1)) == min(400, 500)
    assert NEEDS.of(Call(2, 512, 0, 1)) == 2 * 2500
    assert NEEDS.of(Call(2, 64, 0, 64)) == 200 + 2 * 63 * 7
    assert NEEDS.prompt_bytes == 6500


def test_what_is_asked_for_beside_the_last_logits() -> None:
    config: Any = SimpleNamespace(vocab_size=100, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    ids = torch.ones(2, 10, dtype=torch.long)
    assert call_of({"input_ids": ids}, config, 2, 10, 0) == Call(2, 10, 0, 10)
    assert call_of({"logits_to_keep": 1}, config, 2, 10, 5) == Call(2, 10, 5, 1)
    assert call_of({"logits_to_keep": torch.tensor([1, 4, 5])}, config, 1, 10, 5) == Call(1, 10, 5, 3)
    assert call_of({"labels": ids, "logits_to_keep": 1}, config, 2, 10, 0).extra_bytes == 3 * 4 * 20 * 100
    hidden = call_of({"output_hidden_states": True, "logits_to_keep": 1}, config, 2, 10, 0)
    assert hidden.extra_bytes == 4 * 20 * 8 * 4
    weights = call_of({"output_attentions": True, "logits_to_keep": 1}, config, 2, 10, 6)
    assert weights.extra_bytes == 4 * 2 * 10 * 16 * 2 * 5
    config.output_hidden_states = True
    assert call_of({"logits_to_keep": 1}, config, 2, 10, 0) == hidden


def test_the_cache_grows_by_tokens_and_windows_keep_their_last() -> None:
    size = CacheSize(fixed=1000, per_token=10, windows=((7, 128), (2, 32)))
    assert size.of(64) == 1000 + 640 + 7 * 64 + 2 * 32
    assert size.of(65) == 1000 + 1280 + 7 * 65 + 2 * 32, "room for 64 at a time"
    assert size.whole(100) == 2 * 68 and size.whole(32) == 0
    needs = NEEDS._replace(cache=size)
    assert needs.cached(Call(2, 1, 64, 1)) == 2 * size.of(65)
    assert needs.new_in_cache(Call(2, 1, 64, 1)) == 2 * (640 + 7)
    assert needs.new_in_cache(Call(1, 64, 0, 1)) == size.of(64)
    assert needs.of(Call(1, 64, 0, 1)) == 100 + 2 * 32, "until a prompt is over, windows hold all of it"
    assert needs.prompt_bytes == 6500 + 7 * (1024 - 128) + 2 * (1024 - 32)


FEW = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoehybrid")
FORESEEN_AND_HELD = """
import gc
import sys
from pathlib import Path

import torch

from swapless.runtime.allocator import give_back, pages_of_their_own
from swapless.runtime.door import experts_of, part_heads
from swapless.runtime.dry import dry_run
from swapless.runtime.hollow import hollow_model
from swapless.runtime.memory import Spike
from swapless.runtime.open import open_checkpoint
from swapless.runtime.rehearsal import rehearse
from tests.families.tiny import decorated_families, tiny_model

name, folder = sys.argv[1:]
real = tiny_model(decorated_families()[name])
real.save_pretrained(folder)
opened = open_checkpoint(Path(folder))
hollow = hollow_model(opened)
part_heads(hollow)
needs = rehearse(hollow, opened.layout.moe_layers, dry_run(hollow).cache, 256, 1 << 40)
assert not any("swapless_engine" in vars(module) for _, module in experts_of(hollow)), "left as it was"
assert needs.prompts[-1][0] == 256 and needs.step_bytes > 0
assert [nbytes for _, nbytes in needs.prompts] == sorted(nbytes for _, nbytes in needs.prompts)
part_heads(real)
real.set_experts_implementation("eager")
ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
pages_of_their_own(True)
with torch.no_grad():
    real(input_ids=ids, logits_to_keep=1)
    gc.collect()
    give_back()
    with Spike() as spike:
        real(input_ids=ids, logits_to_keep=1)
print(needs.prompt_bytes, spike.nbytes)
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FEW)
def test_a_model_without_weights_tells_what_the_real_one_holds(name: str, tmp_path: Path) -> None:
    """Of random tokens in a real model with all its products; what oneDNN keeps of those is another part of the budget."""
    foreseen, held = numbers_of(FORESEEN_AND_HELD, name, str(tmp_path))
    assert held <= foreseen + (2 << 20), "within what the allocator leaves lying about"
    assert foreseen <= 2 * held + (2 << 20)


def test_code_that_is_mapped_on_the_way_is_no_part_of_a_prompt(tmp_path: Any) -> None:
    """As in a forked child, which finds none of its libraries mapped."""
    import mmap

    from swapless.runtime.dry import dry_run
    from swapless.runtime.hollow import hollow_model
    from swapless.runtime.open import open_checkpoint
    from swapless.runtime.rehearsal import rehearse
    from tests.families.tiny import decorated_families, tiny_model

    code = tmp_path / "code"
    code.write_bytes(bytes(24 << 20))
    tiny_model(decorated_families()["qwen3_moe"]).save_pretrained(tmp_path)
    opened = open_checkpoint(tmp_path)
    hollow = hollow_model(opened)
    cache = dry_run(hollow).cache
    found = rehearse(hollow, opened.layout.moe_layers, cache, 128, 1 << 40)
    maps = []

    def load_code(module: Any, args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] == 128 and not maps:
            with code.open("rb") as file:
                maps.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            assert not sum(maps[0][:: mmap.PAGESIZE])

    hook = hollow.register_forward_pre_hook(load_code, with_kwargs=True)
    again = rehearse(hollow, opened.layout.moe_layers, cache, 128, 1 << 40)
    hook.remove()
    assert len(maps) == 1
    assert abs(again.prompt_bytes - found.prompt_bytes) < 4 << 20
