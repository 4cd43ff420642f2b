"""The loop: resume is exact, the quick experts compute what transformers computes, sampler and measures do what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.corpus import WindowSampler
from training.locality import load_entropy, lru_hit_rate, shuffled_tokens
from training.model import balance_loss, build_model, embedded_config
from training.train_embedded import Recipe, Trainer

MICRO_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 8,
}
MICRO_RECIPE = Recipe(rows=4, window_tokens=16, long_rows=2, long_window_tokens=32, long_from=0.6, warmup_steps=2)


def micro_config():
    return embedded_config(64, pad=0, bos=1, eos=2, **MICRO_SHAPE)


def streams() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(64, size=size).astype(np.int32) for name, size in (("a", 900), ("b", 200), ("c", 80))}


def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path):
    whole = Trainer(micro_config(), streams(), MICRO_RECIPE, steps=6, budget_s=None)
    figures = [whole.step() for _ in range(6)]

    first = Trainer(micro_config(), streams(), MICRO_RECIPE, steps=6, budget_s=None)
    for _ in range(3):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    torch.rand(5)
    second = Trainer(micro_config(), streams(), MICRO_RECIPE, steps=6, budget_s=None)
    second.restore(tmp_path / "checkpoint.pt")

    assert [second.step() for _ in range(3)] == figures[3:]
    assert second.tokens == whole.tokens == 4 * 4 * 16 + 2 * 2 * 32
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    trainer = Trainer(micro_config(), streams(), MICRO_RECIPE, steps=6, budget_s=None)
    trainer.save(tmp_path / "checkpoint.pt")
    other = Trainer(micro_config(), streams(), replace(MICRO_RECIPE, peak_lr=1e-3), steps=6, budget_s=None)
    with pytest.raises(ValueError, match=r"another recipe.*peak_lr"):
        other.restore(tmp_path / "checkpoint.pt")


def test_exactly_one_budget():
    with pytest.raises(ValueError, match="exactly one"):
        Trainer(micro_config(), streams(), MICRO_RECIPE, steps=None, budget_s=None)


def test_training_experts_equal_eager_in_value_and_gradient():
    torch.manual_seed(0)
    model = build_model(micro_config())
    ids = torch.randint(64, (3, 12))
    outcomes = []
    for implementation in ("sorted_mm", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(ids).logits
        logits.square().mean().backward()
        outcomes.append((logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (logits, gradients), (eager_logits, eager_gradients) = outcomes
    torch.testing.assert_close(logits, eager_logits)
    for gradient, eager_gradient in zip(gradients, eager_gradients, strict=True):
        torch.testing.assert_close(gradient, eager_gradient)


def test_balance_loss_is_one_when_even_and_e_over_k_when_collapsed():
    even = torch.eye(4) * 50
    assert balance_loss([even], 1).item() == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]] * 4)
    assert balance_loss([collapsed, even], 1).item() == pytest.approx((4 + 1) / 2)


def test_sampler_keeps_the_shares_and_goes_on_from_its_state():
    sampler = WindowSampler(streams(), rows=4, window_tokens=16, power=0.5, seed=0)
    batches = [sampler.next_batch() for _ in range(50)]
    assert all(batch.shape == (4, 17) for batch in batches)
    roots = np.sqrt([900, 200, 80])
    assert np.array(sampler.state["taken"]) / 200 == pytest.approx(roots / roots.sum(), abs=0.02)
    again = WindowSampler(streams(), rows=4, window_tokens=16, power=0.5, seed=0)
    again.restore(sampler.state)
    assert np.array_equal(again.next_batch(), sampler.next_batch())


def test_sampler_refuses_a_domain_of_less_than_two_windows():
    with pytest.raises(ValueError, match=r"domain 'c' must hold two windows of 64 tokens. Got 80"):
        WindowSampler(streams(), rows=4, window_tokens=64, power=0.5, seed=0)


def test_load_entropy():
    ids = np.array([[[0, 1], [0, 1]], [[2, 3], [0, 1]]])
    assert load_entropy(ids, 4) == pytest.approx([1.0, 0.5])


def test_lru_judges_all_experts_of_a_token_at_once():
    ids = np.array([[[0, 1]], [[1, 2]], [[0, 2]], [[0, 2]]])
    # 0 1 cold; 1 hits and 0 leaves for 2; 2 hits and 1 leaves for 0; both hit
    assert lru_hit_rate(ids, 4, 2) == pytest.approx([4 / 8])
    assert lru_hit_rate(ids, 4, 4) == pytest.approx([5 / 8])
    with pytest.raises(ValueError, match="capacity_experts"):
        lru_hit_rate(ids, 4, 1)


def test_shuffling_keeps_the_load_and_loses_the_locality():
    ids = np.repeat(np.arange(8), 100).reshape(-1, 1, 1)
    shuffled = shuffled_tokens(ids, seed=0)
    assert load_entropy(shuffled, 8) == pytest.approx(load_entropy(ids, 8))
    assert lru_hit_rate(ids, 8, 2)[0] > 0.9 > 0.4 > lru_hit_rate(shuffled, 8, 2)[0]
