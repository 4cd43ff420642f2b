"""Training: the fork loses nothing, a stopped run goes on bit for bit, twins see the same tokens, budgets are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoTokenizer

from swapless import embedded
from swapless.errors import NotFittedError, UsageError
from swapless.oracle.config import ROUTERS
from swapless.oracle.corpus import domain_texts, read_documents, token_streams
from swapless.oracle.fit import fit_routers
from swapless.oracle.fork import fork
from swapless.oracle.losses import balance_loss, sticky_loss
from swapless.oracle.muon import Muon, orthogonalised, split_parameters
from swapless.oracle.output_loss import next_token_loss
from swapless.oracle.recipe import Recipe
from swapless.oracle.router import changes
from swapless.oracle.sorted_experts import sorted_experts_forward
from swapless.oracle.train import Trainer, join_rows, special_tokens, train
from tests.oracle.conftest import build, text
from tests.oracle.corpus import MOE, RECIPE, SMALL, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def streams(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    documents = read_documents(write_corpus(folder / "corpus.parquet"))
    return token_streams(domain_texts(documents, held_out=False), tokenizer, folder)


def recipe(router: str, **changes) -> Recipe:
    shape = SMALL | ({} if router == "dense" else MOE)
    if router == "theme-gate":
        shape = shape | {"change_budget": 0.1}
    return Recipe(router=router, changes=shape, **RECIPE | changes)


@pytest.fixture
def trainer(streams, tokenizer):
    def make(chosen: Recipe) -> Trainer:
        return Trainer(chosen, streams, special_tokens(tokenizer), Accelerator(cpu=True))

    return make


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_the_fork_from_a_dense_warm_up_loses_nothing(trainer, router):
    run = trainer(recipe(router))
    run.step()
    ids = text(0, 40) % 4000
    before = run.model.eval()(ids, use_cache=False).logits
    before_fork = {key: dict(found) for key, found in run.moments().items()}
    run.fork()
    after = run.model.eval()(ids, use_cache=False)
    assert torch.allclose(after.logits, before, atol=1e-4)
    carried = run.moments()
    mlp = "model.layers.1.mlp"
    for key, new, old in (
        ("momentum", f"{mlp}.experts.up_proj", f"{mlp}.up_proj.weight"),
        ("exp_avg", f"{mlp}.experts.up_proj_bias", f"{mlp}.up_proj.bias"),
    ):
        source = before_fork[key][old]
        assert source.any() and all(torch.equal(one, source) for one in carried[key][new])
    embedding = "model.embed_tokens.weight"
    assert torch.equal(carried["exp_avg_sq"][embedding], before_fork["exp_avg_sq"][embedding])
    assert carried["step"][f"{mlp}.experts.up_proj_bias"] == 1
    run.step()


def test_steps_of_muon_are_orthogonal_and_of_adamw_the_rest():
    model = build("switch")
    split = split_parameters(model)
    assert sum(map(len, split)) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden, tables, gates, vectors = ([names[id(p)] for p in part] for part in split)
    assert all("proj" in name for name in hidden) and any(p.ndim == 3 for p in split.hidden)
    assert any(name.endswith("up_proj_bias") for name in vectors) and all("embed" in name for name in tables)
    assert {name.rpartition(".")[2] for name in gates} == {"weight", "bias"}
    stack = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(stack))
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    assert torch.equal(orthogonalised(stack)[1], orthogonalised(stack[1:2])[0])
    parameter = torch.nn.Parameter(torch.zeros(40, 10))
    parameter.grad = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    Muon([parameter], lr=0.1).step()
    assert torch.allclose(parameter.detach(), -0.1 * 2 * orthogonalised(parameter.grad), atol=1e-2)


def test_the_loss_in_pieces_is_the_loss(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=rng).requires_grad_(), torch.randn(30, 16, generator=rng).requires_grad_()
    expected = torch.randint(0, 30, (50,), generator=rng)
    monkeypatch.setattr("swapless.oracle.output_loss._LOGITS_AT_ONCE", 30 * 7)
    results = []
    for loss in (next_token_loss(hidden, weight, expected), F.cross_entropy(hidden @ weight.t(), expected)):
        results.append([loss, *torch.autograd.grad(3 * loss, [hidden, weight])])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("router", "warmup"), [("theme-gate", "dense"), ("oracle", "switch"), ("dense", "dense")])
def test_a_stopped_run_goes_on_bit_for_bit(trainer, tmp_path, router, warmup):
    chosen = recipe(router, warmup=warmup)

    def go(run: Trainer, until: int) -> Trainer:
        while run.step_count < until:
            if run.step_count >= chosen.warmup_steps and not run.forked:
                run.fork()
            run.step()
        return run

    whole = go(trainer(chosen), 6)
    for stop in (1, 4):
        go(trainer(chosen), stop).save(tmp_path / "checkpoint.pt")
        again = trainer(chosen)
        again.restore(tmp_path / "checkpoint.pt")
        assert again.step_count == stop
        go(again, 6)
        for (name, one), (_, two) in zip(whole.model.state_dict().items(), again.model.state_dict().items(), strict=True):
            assert torch.equal(one, two), name


IN_HALF_PRECISION = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from swapless import embedded
from swapless.oracle.corpus import domain_texts, read_documents, token_streams
from swapless.oracle.recipe import Recipe
from swapless.oracle.train import train
from tests.oracle.corpus import MOE, RECIPE, SMALL, write_corpus

folder = Path(sys.argv[1])
documents = read_documents(write_corpus(folder / "corpus.parquet"))
tokenizer = AutoTokenizer.from_pretrained(embedded.path())
streams = token_streams(domain_texts(documents, held_out=False), tokenizer, folder)
recipe = Recipe(router="theme-gate", changes=SMALL | MOE, **RECIPE | {"precision": "bf16"})

class Stopped(Exception): ...

def stop(stage, done):
    if stage.startswith("step 4"):
        raise Stopped

train(recipe, streams, tokenizer, folder / "whole")
try:
    train(recipe, streams, tokenizer, folder / "parts", save_every_s=0.0, report=stop)
except Stopped:
    train(recipe, streams, tokenizer, folder / "parts")
"""


def test_a_run_in_half_precision_goes_on_bit_for_bit(tmp_path):
    # A process of its own: Accelerate keeps one precision a process.
    subprocess.run([sys.executable, "-c", IN_HALF_PRECISION, str(tmp_path)], check=True, capture_output=True)
    whole, parts = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert (tmp_path / "parts" / "log.jsonl").stat().st_size > 0


def test_a_checkpoint_of_another_recipe_is_refused(trainer, tmp_path):
    run = trainer(recipe("switch"))
    run.save(tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="peak_lr"):
        trainer(recipe("switch", peak_lr=1e-2)).restore(tmp_path / "checkpoint.pt")


def test_a_whole_run_and_its_shared_warm_up(streams, tokenizer, tmp_path):
    chosen = recipe("theme-gate")
    warmups = tmp_path / "warmups"
    alone = train(chosen, streams, tokenizer, tmp_path / "alone")
    first = train(recipe("oracle"), streams, tokenizer, tmp_path / "oracle", warmups=warmups)
    assert [file.name for file in warmups.iterdir()] == [f"warmup-{chosen.warmup_key}.pt"]
    shared = train(chosen, streams, tokenizer, tmp_path / "shared", warmups=warmups)
    assert (alone / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "oracle" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "fit" in line]) == 1 and lines[-1]["step"] == 6
    assert not (tmp_path / "oracle" / "checkpoint.pt").exists() and first.exists()
    assert train(chosen, streams, tokenizer, tmp_path / "shared") == shared  # finished: nothing to do
    with pytest.raises(UsageError, match="seed"):
        train(replace(chosen, seed=1), streams, tokenizer, tmp_path / "shared")


def test_twins_see_the_same_tokens(trainer):
    seen = []
    for router in ("switch", "dense", "oracle"):
        run = trainer(recipe(router, warmup_steps=3))
        seen.append([run.step()["loss"] for _ in range(3)])
    assert seen[0] == seen[1] == seen[2]
    assert asdict(recipe("switch"))["router"] == "switch" and recipe("switch").warmup_key == recipe("oracle").warmup_key
    assert recipe("switch").warmup_key != recipe("switch", seed=3).warmup_key


def test_the_model_learns(trainer):
    run = trainer(recipe("theme-gate", steps=40, warmup_steps=10, peak_lr=1e-2))
    losses = []
    while run.step_count < 40:
        if run.step_count >= 10 and not run.forked:
            run.fork()
        losses.append(run.step()["loss"])
    assert losses[-1] < losses[0] - 1.5
    assert all(router.load.sum().item() == pytest.approx(1, abs=1e-4) for router in run.model.routers)


def test_the_bonus_for_staying_follows_the_budget():
    model = build("theme-gate", change_budget=0.1)
    router = model.routers[0]
    router.stay.fill_(0.5)
    restart = torch.zeros(100, dtype=torch.long)
    alternating, constant = torch.arange(100)[:, None] % 2, torch.zeros((100, 1), dtype=torch.long)
    router.observe(alternating, restart)
    assert float(router.stay) > 0.5
    for _ in range(50):
        router.observe(constant, restart)
    assert float(router.stay) == 0


def test_changes_count_within_documents():
    ids = torch.tensor([[0], [1], [1], [2], [2]])
    assert float(changes(ids, torch.tensor([1, 0, 0, 1, 0]))) == pytest.approx(1 / 3)


def test_joined_rows_are_made_of_neighbours():
    ids = np.repeat(np.arange(9)[:, None], 50, axis=1)
    out = join_rows(ids, 1 / 3, np.random.default_rng(0))
    assert (out[:6] == ids[:6]).all()
    for row in range(6, 9):
        assert list(dict.fromkeys(out[row].tolist())) == [row, (row + 3) % 9, (row + 6) % 9]


@pytest.mark.parametrize("top_k", [1, 2])
def test_sorted_experts_equal_the_eager_ones(top_k):
    model = build("switch", num_experts_per_tok=top_k)
    experts = model.model.layers[1].mlp.experts
    rng = np.random.default_rng(0)
    hidden = torch.from_numpy(rng.normal(size=(30, 32)).astype(np.float32)).requires_grad_()
    ids = torch.from_numpy(np.stack([rng.permutation(6)[:top_k] for _ in range(30)]))  # experts 6 and 7 get nothing
    weights = torch.rand(30, top_k, generator=torch.Generator().manual_seed(0))
    results = []
    experts.config._experts_implementation = "eager"
    for forward in (type(experts).forward, sorted_experts_forward):
        out = forward(experts, hidden, ids, weights)
        grads = torch.autograd.grad(out.square().sum(), [hidden, *experts.parameters()])
        results.append([out, *grads])
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


def test_losses_at_known_values():
    even, real = torch.zeros((6, 4)), torch.ones(6, dtype=torch.bool)
    assert balance_loss(even, torch.full((4,), 0.25), real).item() == pytest.approx(1)
    one = torch.tensor([[50.0, 0, 0, 0]] * 6)
    assert balance_loss(one, torch.tensor([1.0, 0, 0, 0]), real).item() == pytest.approx(4)
    flip = torch.tensor([[50.0, 0], [0, 50.0], [0, 50.0]])
    assert sticky_loss(flip, torch.tensor([1, 0, 0])).item() == pytest.approx(1)
    assert sticky_loss(flip, torch.tensor([1, 1, 0])).item() == pytest.approx(0, abs=1e-6)


def test_fitting_what_cannot_be_fitted(trainer):
    run = trainer(recipe("oracle"))
    batches = [torch.randint(3, 4000, (1, 12), generator=torch.Generator().manual_seed(0))]
    config = recipe("oracle").config(**run._tokens)
    with pytest.raises(UsageError, match="fewer groups than experts"):
        fit_routers(run.model, config, batches)
    unfitted, _ = fork(run.model, config, None, None)
    with pytest.raises(NotFittedError):
        unfitted(text(0, 8))
    with pytest.raises(UsageError, match="hidden_size"):
        fork(
            run.model,
            recipe(
                "oracle",
            ).config(**run._tokens | {"hidden_size": 64}),
            None,
            None,
        )


@pytest.mark.parametrize(
    "wrong", [{"warmup": "none"}, {"warmup_steps": 0}, {"warmup_steps": 7}, {"joined_share": 2.0}, {"precision": "fp8"}]
)
def test_recipes_that_cannot_be(wrong):
    with pytest.raises(UsageError):
        recipe("oracle", **wrong)
