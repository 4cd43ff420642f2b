"""Train one run: warm up, fit, fork, go on. Every twin comes from here, and sees the same tokens in the same order.

A run folder holds ``recipe.json``, ``log.jsonl`` (a line every ten steps), ``checkpoint.pt`` while it runs and ``model/`` when
it is done. A run that was stopped goes on from its last checkpoint, on a CPU bit for bit as if it had never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from swapless.atomic import whole_folder, write_json, write_whole
from swapless.errors import UsageError, message
from swapless.onednn import keep_many
from swapless.oracle.corpus import WindowSampler
from swapless.oracle.fit import fit_routers
from swapless.oracle.fork import Carry, fork, match_experts
from swapless.oracle.losses import router_losses
from swapless.oracle.model import OracleMoeForCausalLM
from swapless.oracle.muon import Muon, split_parameters
from swapless.oracle.recipe import Recipe
from swapless.oracle.router import changes
from swapless.oracle.sorted_experts import SORTED, register_sorted_experts

__all__ = ["Trainer", "export", "join_rows", "train"]

Report = Callable[[str, float], None]


def join_rows(ids_BT: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The batch with a share of its rows replaced by the beginnings, middles and ends of three neighbours: int64 (B, T)."""
    out = ids_BT.copy()
    rows, tokens = ids_BT.shape
    for row in range(rows - round(share * rows), rows):
        first, second = np.sort(rng.integers(tokens // 5, 4 * tokens // 5, 2))
        out[row, first:second] = ids_BT[(row + rows // 3) % rows, first:second]
        out[row, second:] = ids_BT[(row + 2 * rows // 3) % rows, second:]
    return out


class Trainer:
    """Model, optimisers and data order of one run; :meth:`step` changes all three. ``forked`` says that the warm-up is over.

    Parameters
    ----------
    recipe : Recipe
        What to do.
    streams : dict of str to int32 ndarray
        Held-in tokens by domain.
    tokens : dict
        ``vocab_size`` and special ids of the tokenizer, for the configuration.
    accelerator : accelerate.Accelerator
        Devices, precision and processes.
    """

    def __init__(self, recipe: Recipe, streams: dict[str, np.ndarray], tokens: dict[str, Any], accelerator: Any) -> None:
        self.recipe, self._tokens, self._accelerator = recipe, tokens, accelerator
        self._sampler = WindowSampler(
            streams, rows=recipe.rows, window_tokens=recipe.window_tokens, power=recipe.domain_power, seed=recipe.seed
        )
        self.step_count = 0
        self.forked = False
        self.elapsed_s = 0.0
        self.fit_notes: list[dict[str, float]] = []
        torch.manual_seed(recipe.seed)
        self._adopt(OracleMoeForCausalLM(recipe.warmup_config(**tokens)))

    @property
    def model(self) -> OracleMoeForCausalLM:
        """The model itself, out of its wrappers."""
        return self._accelerator.unwrap_model(self._wrapped)

    def _adopt(self, model: OracleMoeForCausalLM) -> None:
        register_sorted_experts()
        if model.config.moe_blocks:
            model.set_experts_implementation(SORTED)
        recipe, split = self.recipe, split_parameters(model)
        decay, share = recipe.weight_decay, recipe.adamw_lr_share
        muon = Muon([{"params": split.hidden, "share": 1.0}], lr=recipe.peak_lr, weight_decay=decay)
        groups = [
            {"params": split.tables, "weight_decay": decay, "share": share},
            {"params": split.gates, "weight_decay": 0.0, "share": recipe.gate_lr_share},
            {"params": split.vectors, "weight_decay": 0.0, "share": share},
        ]
        adamw = torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)
        self._wrapped, *self._optimisers = self._accelerator.prepare(model, muon, adamw)

    def fork(self, report: Report = lambda stage, done: None) -> None:
        """End the warm-up: fit the routers to held-in text, make the experts, carry the optimiser's moments over."""
        recipe, old = self.recipe, self.model
        config = recipe.config(**self._tokens)
        self.forked = True
        if config.router == "dense" or config.to_dict() == old.config.to_dict():
            return
        batches = self._fit_batches(old.device)
        needs_fit = config.kind.choice == "centroids" or config.kind.theme == "group"
        fits = None
        if needs_fit:
            fits = fit_routers(old, config, batches, seed=recipe.seed, report=lambda done: report("fitting", done))
            spaces = [(found, found.space) for found in fits if found.space is not None]
            self.fit_notes = [
                {"tau": f.tau, "groups": f.groups, "least_share": float(s.shares.min()), "distance": s.distance}
                for f, s in spaces
            ]
        torch.manual_seed(recipe.seed + 1)
        new, carry = fork(old, config, fits, None)
        there: Any = new  # transformers' annotation of to's self does not fit its own models
        if old.config.router != "dense" and recipe.expert_map == "match" and config.kind.choice == "centroids":
            new, carry = fork(old, config, fits, match_experts(old, there.to(old.device), batches))
        moments = self.moments()
        self._adopt(new)
        self._put_moments(moments, carry)

    def _fit_batches(self, device: torch.device) -> list[Tensor]:
        # A sampler of its own: the order of the training windows must not depend on the router.
        recipe, streams = self.recipe, self._sampler.streams
        sampler = WindowSampler(
            streams, rows=recipe.rows, window_tokens=recipe.window_tokens, power=recipe.domain_power, seed=recipe.seed + 10_000
        )
        drawn = [sampler.next_batch()[:, :-1] for _ in range(recipe.fit_batches)]
        rng = np.random.default_rng([recipe.seed, 2])
        return [torch.from_numpy(join_rows(ids, recipe.joined_share, rng)).to(device) for ids in drawn]

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The optimisers' state by its keys, then by parameter name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            for optimiser in self._optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    found.setdefault(key, {})[name] = value
        return found

    def _put_moments(self, moments: dict[str, dict[str, Tensor]], carry: Carry) -> None:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        steps = next(iter(moments.get("step", {}).values()), None)
        for optimiser in self._optimisers:
            inner = getattr(optimiser, "optimizer", optimiser)
            keys = ("momentum",) if isinstance(inner, Muon) else ("exp_avg", "exp_avg_sq")
            for parameter in (one for group in inner.param_groups for one in group["params"]):
                carried = {key: carry(moments.get(key, {}), names[parameter]) for key in keys}
                state = {key: value.clone().contiguous() for key, value in carried.items() if value is not None}
                if len(state) < len(keys):
                    continue
                if "exp_avg" in state and steps is not None:
                    state["step"] = steps.clone()
                inner.state[parameter] = state

    def step(self) -> dict[str, Any]:
        """One optimiser step; returns the figures to log."""
        started = time.monotonic()
        recipe, accelerator = self.recipe, self._accelerator
        drawn = join_rows(
            self._sampler.next_batch(), recipe.joined_share, np.random.default_rng([recipe.seed, 1, self.step_count])
        )
        mine = drawn[accelerator.process_index :: accelerator.num_processes]
        ids_BT = torch.from_numpy(mine).to(accelerator.device)
        rate = recipe.learning_rate(self.step_count)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["share"] * rate
        self._wrapped.train()
        out = self._wrapped(ids_BT[:, :-1], shift_labels=ids_BT[:, 1:], use_cache=False)
        loss = out.loss
        extra = router_losses(self.model, out, recipe.balance)
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
        accelerator.backward(loss + extra)
        norm = accelerator.clip_grad_norm_(self._wrapped.parameters(), recipe.max_grad_norm)
        for optimiser in self._optimisers:
            optimiser.step()
        for router, ids_TK in zip(self.model.routers, out.expert_ids, strict=True):
            router.observe(ids_TK, out.restarts.to(ids_TK.device))
        self.step_count += 1
        self.elapsed_s += time.monotonic() - started
        figures: dict[str, Any] = {"loss": loss.item(), "router_loss": extra.item(), "grad_norm": float(norm), "lr": rate}
        if out.expert_ids:
            figures["changes"] = [round(float(changes(ids, out.restarts.to(ids.device))), 4) for ids in out.expert_ids]
            figures["stay"] = [round(float(router.stay), 3) for router in self.model.routers if hasattr(router, "stay")]
        return figures

    def save(self, path: Path) -> None:
        """Write the whole state, whole or not at all."""
        state = {
            "recipe": asdict(self.recipe),
            "forked": self.forked,
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "rng": torch.get_rng_state(),
            "sampler": self._sampler.state,
            "step_count": self.step_count,
            "elapsed_s": self.elapsed_s,
            "fit_notes": self.fit_notes,
        }
        if self._accelerator.is_main_process:
            write_whole(path, lambda part: _save_state(state, part))

    def restore(self, path: Path, *, shared: bool = False) -> None:
        """Go on from a checkpoint of the same recipe, or from a ``shared`` warm-up.

        Raises
        ------
        UsageError
            The checkpoint is of another recipe.
        """
        state = torch.load(path, weights_only=True, map_location="cpu")
        differs = sorted(k for k, v in asdict(self.recipe).items() if state["recipe"].get(k) != v)
        if differs and not shared:
            raise UsageError(
                message(
                    "The run was begun with another recipe.",
                    where=path,
                    got=f"differs in {', '.join(differs)}",
                    step="Use a new run folder.",
                )
            )
        self.forked = state["forked"]
        if self.forked:
            self._adopt(OracleMoeForCausalLM(self.recipe.config(**self._tokens)))
        self.model.load_state_dict(state["model"])
        for optimiser, known in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(known)
        torch.set_rng_state(state["rng"])
        self._sampler.restore(state["sampler"])
        self.step_count, self.elapsed_s, self.fit_notes = state["step_count"], state["elapsed_s"], state["fit_notes"]


def train(
    recipe: Recipe,
    streams: dict[str, np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    run: Path,
    *,
    warmups: Path | None = None,
    save_every_s: float = 120.0,
    report: Report = lambda stage, done: None,
) -> Path:
    """Train, or go on training, and export the model.

    Parameters
    ----------
    recipe : Recipe
        What to do.
    streams : dict of str to int32 ndarray
        Held-in tokens by domain.
    tokenizer : PreTrainedTokenizerFast
        Saved beside the weights.
    run : Path
        The run's folder.
    warmups : Path, optional
        Folder in which runs share their warm-ups.
    save_every_s : float
        Between checkpoints.
    report : callable
        Told the stage and the share done.

    Returns
    -------
    Path
        The folder of the exported model; at once if it is there already.

    Raises
    ------
    UsageError
        The folder holds a run of another recipe, or accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise UsageError(message("Training needs accelerate.", step="pip install accelerate scikit-learn")) from error

    keep_many()
    exported = run / "model"
    if (run / "recipe.json").exists():
        _same_recipe(run, recipe)
    if (exported / "config.json").exists():
        return exported
    run.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
    trainer = Trainer(recipe, streams, special_tokens(tokenizer), accelerator)
    checkpoint = run / "checkpoint.pt"
    shared = None if warmups is None else warmups / f"warmup-{recipe.warmup_key}.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    elif shared is not None and shared.exists():
        trainer.restore(shared, shared=True)
    if accelerator.is_main_process:
        write_json(run / "recipe.json", asdict(recipe))
    saved_at = time.monotonic()
    with (run / "log.jsonl").open("a", encoding="utf-8") as log:
        while trainer.step_count < recipe.steps or not trainer.forked:
            if trainer.step_count >= recipe.warmup_steps and not trainer.forked:
                trainer.fork(report)
                trainer.save(checkpoint)
                if trainer.fit_notes:
                    print(json.dumps({"step": trainer.step_count, "fit": trainer.fit_notes}), file=log, flush=True)
                continue
            figures = trainer.step()
            report(f"step {trainer.step_count}, loss {figures['loss']:.3f}", trainer.step_count / recipe.steps)
            if trainer.step_count == recipe.warmup_steps and shared is not None and not shared.exists():
                shared.parent.mkdir(parents=True, exist_ok=True)
                trainer.save(shared)
            if time.monotonic() - saved_at > save_every_s:
                trainer.save(checkpoint)
                saved_at = time.monotonic()
            if accelerator.is_main_process and (trainer.step_count % 10 == 0 or trainer.step_count == recipe.steps):
                where = {"step": trainer.step_count, "elapsed_s": round(trainer.elapsed_s, 1)}
                print(json.dumps(where | figures), file=log, flush=True)
    if accelerator.is_main_process:
        export(trainer.model, tokenizer, exported)
        checkpoint.unlink(missing_ok=True)
    return exported


def _save_state(state: dict[str, Any], part: Path) -> None:
    with part.open("wb") as file:  # an opened file keeps the reason of a failed write, a path loses it
        torch.save(state, file)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What a configuration takes from the tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _same_recipe(run: Path, recipe: Recipe) -> None:
    found = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(asdict(recipe)))
    if found != wanted:
        differs = sorted(name for name in wanted if found.get(name) != wanted[name])
        raise UsageError(
            message(
                "The folder holds a run of another recipe.",
                where=run,
                got=f"differs in {', '.join(differs)}",
                step="Name another.",
            )
        )


def export(model: OracleMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as users get it: bfloat16, but routers in float32; tokenizer and sampling settings beside.

    Changes ``model``.
    """
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.trained = True
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
