"""Configuration of the Oracle-MoE family: GPT-2's decoder (pre-norm) with experts in some blocks and a router by name."""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from swapless.errors import UnknownNameError, UsageError, message

__all__ = ["ROUTERS", "SIZES", "OracleMoeConfig", "RouterKind", "of_size"]


class RouterKind(NamedTuple):
    """What a router looks at, and how it chooses from what it sees."""

    theme: str
    choice: str


ROUTERS = {
    "switch": RouterKind("token", "gate"),
    "sticky": RouterKind("token", "gate"),
    "theme-gate": RouterKind("group", "gate"),
    "oracle": RouterKind("group", "centroids"),
    "oracle-paper": RouterKind("paper-group", "centroids"),
    "soft-theme": RouterKind("attended", "centroids"),
    "attention-output": RouterKind("attention-output", "centroids"),
    "prefix-mean": RouterKind("prefix", "centroids"),
    "hash-document": RouterKind("document-hash", "hash"),
}
"""Every router by name; ``dense`` besides, which has no experts."""

SIZES = ("tiny", "195M", "295M", "729M", "2.06B")
"""Configuration files of the package, by the paper's labels; what they really count is in docs/oracle.md."""


class OracleMoeConfig(PreTrainedConfig):
    """Shape and router of an Oracle-MoE.

    Parameters
    ----------
    moe_blocks : list of int
        Blocks whose feed-forward is a set of experts; all of them unless ``router`` is ``"dense"``.
    router : str
        A name of :data:`ROUTERS`, or ``"dense"``.
    group_fraction : float
        Share of a group's members that a token must attend to in order to join it (decision D4); 1 is the paper's clique.
    epsilon : float
        Absolute threshold on attention of ``oracle-paper``; the others have a relative one, fitted for each MoE layer.
    space_rank : int
        Dimensions of the oracle space (D6).
    centre : bool
        Whether the space is centred before its decomposition (D7).
    theme_tokens : float, optional
        The mean of a group, or of the document (``prefix-mean``), forgets over about so many tokens; None never forgets.
    memory_tokens : float
        ``theme-gate`` also sees a mean that forgets over about so many tokens; 0 for none.
    change_budget : float, optional
        Experts changed a token that a learned gate may spend; training finds the bonus for staying that keeps to it.
    sticky_weight : float
        Weight of the penalty of ``sticky`` on the squared step of its gate vector.
    trained : bool
        Whether the weights were trained; a fit needs them to be.
    soft_mass, soft_tokens : float
        Share of the attention that ``soft-theme`` keeps, and the tokens over which its mean forgets.

    Raises
    ------
    UnknownNameError
        No such router.
    UsageError
        A number outside its range.
    """

    model_type = "oracle_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.0
    moe_blocks: list[int] | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 1
    router: str = "oracle"
    group_fraction: float = 0.9
    epsilon: float = 0.01
    space_rank: int = 16
    centre: bool = False
    theme_tokens: float | None = None
    memory_tokens: float = 8.0
    change_budget: float | None = None
    sticky_weight: float = 0.3
    soft_mass: float = 0.75
    soft_tokens: float = 32.0
    trained: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check what types alone do not say."""
        if self.moe_blocks is None:
            self.moe_blocks = [] if self.router == "dense" else list(range(1, self.num_hidden_layers, 2))
        self.moe_blocks = sorted(self.moe_blocks)
        super().__post_init__(**kwargs)
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                _refuse(name, value, "a finite number of 0 or more")
        if self.router not in (*ROUTERS, "dense"):
            raise UnknownNameError.of("router", self.router, [*ROUTERS, "dense"])
        if (self.router == "dense") != (not self.moe_blocks):
            _refuse("moe_blocks", self.moe_blocks, "none for the router 'dense', and some for every other")
        if self.moe_blocks and not 0 <= self.moe_blocks[0] <= self.moe_blocks[-1] < self.num_hidden_layers:
            _refuse("moe_blocks", self.moe_blocks, f"0 to {self.num_hidden_layers - 1}")
        if self.hidden_size % self.num_attention_heads:
            _refuse("num_attention_heads", self.num_attention_heads, f"a divisor of hidden_size, {self.hidden_size}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            _refuse("num_experts_per_tok", self.num_experts_per_tok, f"1 to {self.num_experts}, the experts of a layer")
        if not 0 < self.group_fraction <= 1:
            _refuse("group_fraction", self.group_fraction, "over 0, at most 1")
        if not 1 <= self.space_rank <= self.hidden_size:
            _refuse("space_rank", self.space_rank, f"1 to {self.hidden_size}, the hidden size")
        if self.theme_tokens is not None and self.theme_tokens < 1:
            _refuse("theme_tokens", self.theme_tokens, "1 or more, or None")
        if self.change_budget is not None and not 0 < self.change_budget <= self.num_experts_per_tok:
            _refuse("change_budget", self.change_budget, f"over 0, at most {self.num_experts_per_tok} (K)")

    @property
    def kind(self) -> RouterKind:
        """What the router looks at and how it chooses."""
        return ROUTERS[self.router]

    @property
    def moe_intermediate_size(self) -> int:
        """F: an expert is as wide as a dense feed-forward, so that a dense twin computes as much."""
        return self.intermediate_size


_NUMBERS = (
    "layer_norm_eps",
    "initializer_range",
    "dropout",
    "group_fraction",
    "epsilon",
    "theme_tokens",
    "memory_tokens",
    "change_budget",
    "sticky_weight",
    "soft_mass",
    "soft_tokens",
)


def _refuse(name: str, got: Any, allowed: str) -> None:
    raise UsageError(message(f"{name} of an Oracle-MoE is out of range.", got=got, allowed=allowed))


def of_size(size: str, **changes: Any) -> OracleMoeConfig:
    """The configuration of a named size; ``changes`` override single values.

    Raises
    ------
    UnknownNameError
        No such size.
    """
    if size not in SIZES:
        raise UnknownNameError.of("size", size, SIZES)
    shape = json.loads(files("swapless.oracle").joinpath("sizes", f"{size}.json").read_text(encoding="utf-8"))
    if changes.get("router", shape.get("router")) == "dense":
        changes["moe_blocks"] = []
    return OracleMoeConfig(**shape | changes)
