"""Training of the learned predictor: batches of whole documents, one cycle of the learning rate, checkpoints, early stopping.

Every random choice is drawn from the seed and the number of the step, so that a resumed run and an uninterrupted one give the
same bits on a CPU with the same number of threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from swapless.atomic import write_whole
from swapless.errors import PredictorError, PredictorMismatchError, TraceValueError, message
from swapless.predict.batches import Batch, Documents
from swapless.predict.network import Network
from swapless.predict.predictor import Lead, Progress, known_layers
from swapless.predict.recipe import Recipe

HELD_LEADS: tuple[Lead, ...] = (1, 3, "token")


@dataclass(slots=True)
class Course:
    """Where training stands: all of it goes into a checkpoint. ``best`` holds the weights of the best epoch so far."""

    step: int = 0
    begun: int = 0  # the step at which this epoch began: not every epoch has as many steps
    epochs: int | None = None
    recalls: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def stale(self) -> int:
        """Epochs since the best one."""
        means = [sum(values) / len(values) for values in self.recalls]
        return len(means) - 1 - means.index(max(means)) if means else 0


def train(
    network: Network,
    documents: Documents,
    recipe: Recipe,
    *,
    progress: Progress,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: str = "",
) -> Course:
    """Train ``network`` in place; it ends with the weights of the best epoch.

    Parameters
    ----------
    network : Network
        Freshly made.
    documents : Documents
        Training documents; the last ones are held out by the recipe.
    recipe : Recipe
        How.
    progress : callable
        Told stage and share done.
    checkpoint : path, optional
        Written after every epoch and once a minute; training goes on from it if it is there.
    identity : str
        What the checkpoint belongs to, beside the recipe.

    Returns
    -------
    Course
        What happened.

    Raises
    ------
    TraceValueError
        Too few documents to hold one out.
    PredictorMismatchError
        The checkpoint is of another trace, network or recipe.
    """
    held = max(1, round(recipe.held_out * documents.count))
    if documents.count - held < 1:
        got = f"{documents.count} documents"
        raise TraceValueError(message("Too few documents to train on and to hold out.", got=got, allowed="at least 2"))
    kept = range(documents.count - held)
    optimizer = torch.optim.AdamW(_groups(network, recipe), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    identity = json.dumps({**asdict(recipe), "network": network.shape.settings(), "of": identity}, sort_keys=True)
    course = Course(epochs=None if recipe.minutes else recipe.epochs)
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(checkpoint, network, optimizer, course, identity)
    begun, saved = time.monotonic() - course.seconds, time.monotonic()
    a_epoch = len(documents.plan(kept, recipe.batch_tokens, np.random.default_rng([recipe.seed, 0])))
    while True:
        epoch, place = len(course.recalls), course.step - course.begun
        if course.epochs is not None and (epoch >= course.epochs or course.stale >= recipe.patience):
            break
        plan = documents.plan(kept, recipe.batch_tokens, np.random.default_rng([recipe.seed, epoch]))
        for number in range(place, len(plan)):
            if course.epochs is None and (course.step == TIMING_STEPS):
                a_step = (time.monotonic() - begun) / course.step
                course.epochs = max(epoch + 1, int(recipe.minutes * 60 / (a_step * a_epoch * (1 + recipe.held_out))))
            total = a_epoch * (course.epochs or 1 << 20)
            rng = np.random.default_rng([recipe.seed, 1, course.step])
            torch.manual_seed(int(rng.integers(1 << 62)))
            batch = documents.batch(plan[number], own=True, unknown=recipe.unknown, rng=rng)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * group["scale"] * _cycle(course.step, total)
            loss = _loss(network, batch, recipe, rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            course.losses.append(loss.item())
            course.step += 1
            course.seconds = time.monotonic() - begun
            progress(_stage(course, a_epoch), min(1.0, course.step / total))
            if checkpoint is not None and number + 1 < len(plan) and time.monotonic() - saved > 60:
                _save(checkpoint, network, optimizer, course, identity)
                saved = time.monotonic()
        recalls = held_recalls(network, documents, range(len(kept), documents.count), recipe.batch_tokens)
        course.recalls.append(recalls)
        course.begun = course.step
        if course.stale == 0:
            course.best = {name: value.detach().clone() for name, value in network.state_dict().items()}
        course.seconds = time.monotonic() - begun
        if checkpoint is not None:
            _save(checkpoint, network, optimizer, course, identity)
            saved = time.monotonic()
    network.load_state_dict(course.best)
    return course


TIMING_STEPS = 12


def _stage(course: Course, a_epoch: int) -> str:
    recent = course.losses[-50:]
    shown = f"epoch {course.step / a_epoch:.1f} of {course.epochs or '?'}, loss {sum(recent) / len(recent):.4f}"
    last = course.recalls[-1] if course.recalls else None
    return shown if last is None else f"{shown}, held out {' / '.join(f'{value:.1%}' for value in last)}"


def _groups(network: Network, recipe: Recipe) -> list[dict[str, Any]]:
    """Matrices decay; biases, gains and embeddings do not."""
    bare = ("word", "letters", "gain", "shift", "scalars", "bias", "distance", "base_hidden")
    groups: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for name, value in network.named_parameters():
        groups[not any(part in name for part in bare)].append(value)
    return [
        {"params": groups[True], "weight_decay": recipe.weight_decay, "scale": 1.0},
        {"params": groups[False], "weight_decay": 0.0, "scale": 1.0},
    ]


def _cycle(step: int, total: int) -> float:
    """One cycle: up over the first 4 % of the steps, then down along a cosine to nearly zero."""
    rise = max(8, round(0.04 * total)) if total < 1 << 20 else 100
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _loss(network: Network, batch: Batch, recipe: Recipe, rng: np.random.Generator) -> torch.Tensor:
    """Cross-entropy of every expert's yes or no, read at two leads: a short one and a longer one or none of this token."""
    layers = network.shape.num_moe_layers
    state, base = network.context(batch.words, batch.groups, batch.blocks, batch.scalars, batch.document, recipe.dropout)
    seen = network.walk(state, batch.chosen, recipe.dropout)
    short: Lead = 1 if rng.random() < 0.75 else 2
    draw = rng.random()
    far: Lead = "token" if draw < 0.4 else 3 if draw < 0.75 else int(rng.integers(4, 9))
    losses = []
    for lead in (short, far):
        known = torch.tensor([known_layers(layer, lead) for layer in range(layers)])
        losses.append(F.binary_cross_entropy_with_logits(network.logits(seen, base, batch.chosen, known), batch.chosen))
    return losses[0] + losses[1]


@torch.no_grad()
def logits_of(network: Network, batch: Batch, leads: tuple[Lead, ...]) -> Iterator[torch.Tensor]:
    """Logits (L, N, E) of a batch at each lead."""
    network.eval()
    state, base = network.context(batch.words, batch.groups, batch.blocks, batch.scalars, batch.document)
    seen = network.walk(state, batch.chosen)
    for lead in leads:
        known = torch.tensor([known_layers(layer, lead) for layer in range(network.shape.num_moe_layers)])
        yield network.logits(seen, base, batch.chosen, known)
    network.train()


def held_recalls(network: Network, documents: Documents, which: range, batch_tokens: int) -> list[float]:
    """Recall at K on the documents ``which`` at leads 1, 3 and before the token; their own counts are left out."""
    found, asked = np.zeros(len(HELD_LEADS)), 0.0
    for pieces in documents.plan(which, batch_tokens, None):
        batch = documents.batch(pieces, own=True)
        asked += float(batch.chosen.sum())
        for place, logits in enumerate(logits_of(network, batch, HELD_LEADS)):
            top = logits.topk(network.shape.top_k, -1).indices
            found[place] += float(batch.chosen.gather(2, top).sum())
    return (found / max(asked, 1.0)).tolist()


def _save(path: Any, network: Network, optimizer: torch.optim.Optimizer, course: Course, identity: str) -> None:
    from safetensors.torch import save_file

    tensors = {f"network.{name}": value.detach().contiguous() for name, value in network.state_dict().items()}
    tensors |= {f"best.{name}": value.contiguous() for name, value in course.best.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value.contiguous() for name, value in state.items()}
    about = {name: getattr(course, name) for name in ("step", "begun", "epochs", "recalls", "losses", "seconds")}
    metadata = {"identity": identity, "course": json.dumps(about)}
    write_whole(path, lambda part: save_file(tensors, part, metadata))


def _resume(path: Any, network: Network, optimizer: torch.optim.Optimizer, course: Course, identity: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != identity:
                what = "The checkpoint is of another training: another trace, network or recipe."
                raise PredictorMismatchError(message(what, where=path, step="Give another --checkpoint, or delete it."))
            tensors: dict[str, dict[str, torch.Tensor]] = {"network": {}, "best": {}, "optimizer": {}}
            for key in file.keys():  # noqa: SIM118 (safe_open is no dict)
                kind, _, name = key.partition(".")
                tensors[kind][name] = file.get_tensor(key)
    except SafetensorError as error:
        raise PredictorError(message("The checkpoint cannot be read.", where=path, got=str(error))) from error
    network.load_state_dict(tensors["network"])
    course.best = tensors["best"]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors["optimizer"].items():
        number, _, part = name.partition(".")
        state.setdefault(int(number), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, value in json.loads(metadata["course"]).items():
        setattr(course, name, value)
