"""MoE-Beyond's published architecture on what a trace holds. It sees the whole document at once: for comparison only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np

from swapless.errors import UsageError, message
from swapless.predict._kernels import multi_hot
from swapless.predict.paper_scores import matrices, score_piece
from swapless.predict.popularity import popularity
from swapless.predict.predictor import Fitted, Lead, Predictor, Progress, quiet, token_kind
from swapless.predict.vocabulary import Vocabulary
from swapless.trace import Trace
from swapless.trace.parallel import spread

if TYPE_CHECKING:
    from swapless.predict.paper_network import PaperNetwork


@final
class Paper(Predictor):
    """A transformer encoder over all (MoE layer, token) rows of a document, layer after layer, without mask or positions.

    Parameters
    ----------
    width, depth, heads : int
        Of the encoder; 512, 4 and 8 as published.
    epochs, learning_rate, seed : number
        Of its training by AdamW.
    batch_tokens : int
        Tokens of a document that are seen together; attention costs the square of L times as many.

    Notes
    -----
    Departs from [1]_ where it must: no trace holds the vector that the published predictor reads, which is the router's own
    input at the very layer asked for, so that a learned vector of the token stands in its place. The loader of the published
    evaluation and its padding are left out; the layer's vector is random and frozen, as there.

    References
    ----------
    .. [1] Gavhane et al., "MoE-Beyond", 2025, arXiv:2508.17137, section 3; sizes from its code.
    """

    name = "paper"
    causal = False
    reads_tokens = True

    def __init__(
        self,
        width: int = 512,
        depth: int = 4,
        heads: int = 8,
        epochs: int = 2,
        batch_tokens: int = 32,
        learning_rate: float = 1e-4,
        seed: int = 0,
    ) -> None:
        if min(width, depth, heads, epochs, batch_tokens) < 1 or width % heads:
            got = f"width={width}, depth={depth}, heads={heads}, epochs={epochs}, batch_tokens={batch_tokens}"
            raise UsageError(message("paper cannot be made so.", got=got, allowed="at least 1, heads dividing the width"))
        self.width, self.depth, self.heads, self.epochs = width, depth, heads, epochs
        self.batch_tokens, self.learning_rate, self.seed = batch_tokens, learning_rate, seed

    def fit(self, trace: Trace, *, progress: Progress = quiet) -> Self:
        """Train on pieces of documents, one a step."""
        import torch
        from torch.nn import functional as F

        kind = token_kind(trace)
        popularity(trace)
        self.fitted_ = Fitted.of(trace, vocabulary=kind)
        self.vocabulary_ = Vocabulary.of(trace, kind, most=1 << 14)
        trace = trace.grouped()
        torch.manual_seed(self.seed)
        network = self._network()
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=0.01)
        words = torch.from_numpy(self.vocabulary_.encode(trace))
        pieces = list(self._pieces(trace))
        total = self.epochs * len(pieces)
        network.train()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums of its attention depend on the number of threads
        try:
            for step in range(total):
                epoch, place = divmod(step, len(pieces))
                if place == 0:
                    order = np.random.default_rng([self.seed, epoch]).permutation(len(pieces))
                rows = pieces[order[place]]
                chosen = np.zeros((rows.stop - rows.start, trace.num_moe_layers, trace.num_experts), np.float32)
                multi_hot(trace.expert_ids[rows], trace.num_experts, chosen)
                loss = F.binary_cross_entropy_with_logits(network(words[rows]), torch.from_numpy(chosen).transpose(0, 1))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                progress(f"paper, epoch {epoch + 1} of {self.epochs}", (step + 1) / total)
        finally:
            torch.set_num_threads(threads)
        self.weights_ = {name: value.numpy() for name, value in network.state_dict().items()}
        return self

    def scores_batch(self, trace: Trace, lead: Lead) -> np.ndarray:
        """Probabilities; the same at every lead, and the future is in them."""
        self.require_fitted()
        words, weights = self.vocabulary_.encode(trace), matrices(self.weights_)
        scores = np.empty((len(trace), trace.num_moe_layers, self.fitted_.num_experts), np.float32)

        def work(rows: slice) -> np.ndarray:
            return score_piece(weights, words[rows], depth=self.depth, heads=self.heads)

        for rows, found in spread(work, self._pieces(trace)):
            scores[rows] = found.transpose(1, 0, 2)
        return scores

    def _pieces(self, trace: Trace) -> Iterator[slice]:
        for start, end in itertools.pairwise(trace.document_offsets.tolist()):
            for first in range(start, end, self.batch_tokens):
                yield slice(first, min(first + self.batch_tokens, end))

    def _network(self) -> PaperNetwork:
        from swapless.predict.paper_network import PaperNetwork

        fitted = self.fitted_
        words, layers, experts = len(self.vocabulary_), fitted.num_moe_layers, fitted.num_experts
        return PaperNetwork(words, layers, experts, self.width, self.depth, self.heads)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Vocabulary and weights."""
        weights = {f"network.{name}": value for name, value in self.weights_.items()}
        names = ("width", "depth", "heads", "epochs", "batch_tokens", "learning_rate", "seed")
        return {**self.vocabulary_.arrays(), **weights}, {name: getattr(self, name) for name in names}

    @classmethod
    def restore(cls, fitted: Fitted, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Self:
        """From vocabulary and weights."""
        made = cls(**settings)
        made.fitted_ = fitted
        made.vocabulary_ = Vocabulary.restored(fitted.vocabulary or "token", arrays)
        made.weights_ = {key.removeprefix("network."): value for key, value in arrays.items() if key.startswith("network.")}
        return made


def sizes_of(words: int | None, layers: int, experts: int, width: int, depth: int) -> dict[str, tuple[int | None, ...]]:
    """Lengths of the axes of each of the network's arrays; ``words`` of its vocabulary, None where that is not known."""
    found: dict[str, tuple[int | None, ...]] = {"words.weight": (words, 4 * width), "layer_vectors": (layers, width)}
    linear = {"enter": (width, 5 * width), "head.0": (width, width), "head.3": (experts, width)}
    for number in range(depth):
        own = f"encoder.layers.{number}."
        found |= {f"{own}self_attn.in_proj_weight": (3 * width, width), f"{own}self_attn.in_proj_bias": (3 * width,)}
        found |= {f"{own}{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        linear |= {f"{own}self_attn.out_proj": (width, width)}
        linear |= {f"{own}linear1": (4 * width, width), f"{own}linear2": (width, 4 * width)}
    for name, sizes in linear.items():
        found |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
    return found
