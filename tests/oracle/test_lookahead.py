"""The first layer tells the deeper ones, where it does; the contract's own tests enrol the predictor by its name."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.errors import NotFittedError
from swapless.oracle.lookahead import FirstLayer
from swapless.predict.evaluate import check_cut
from swapless.trace import Trace, TraceHeader


def trace(tokens: int = 400, seed: int = 0) -> Trace:
    """Themes that last; layer 0 shows the theme, the others follow from it by a fixed map."""
    rng = np.random.default_rng(seed)
    theme = np.repeat(rng.integers(0, 4, tokens // 10), 10)
    ids = np.stack([theme, (theme + 1) % 4, 3 - theme], axis=1)[:, :, None].astype(np.int16)
    header = TraceHeader(model_id="m", num_experts=4, top_k=1, moe_blocks=(0, 1, 2))
    return Trace.from_arrays(header, expert_ids=ids, document=np.arange(tokens) // 100)


def test_deeper_layers_follow_from_the_first_on_every_token():
    made, fresh = FirstLayer().fit(trace(4000)), trace(seed=1)
    near, far = (made.scores_batch(fresh, lead).argmax(axis=2) == fresh.expert_ids[:, :, 0] for lead in (1, "token"))
    assert (
        near[:, 1].mean() > 0.99
        and made.scores_batch(fresh, 2).argmax(axis=2)[:, 2].tolist() == fresh.expert_ids[:, 2, 0].tolist()
    )
    assert far[:, 1].mean() < 0.95  # before the token starts, a change of theme cannot be known


def test_it_keeps_to_the_cut_and_comes_back_from_its_state():
    made, fresh = FirstLayer().fit(trace()), trace(200, seed=2)
    for lead in (1, 2, "token"):
        check_cut(made, fresh, lead)
    again = FirstLayer.restore(made.fitted_, *made.state())
    assert np.array_equal(again.scores_batch(fresh, 1), made.scores_batch(fresh, 1))
    with pytest.raises(NotFittedError):
        FirstLayer().scores_batch(fresh, 1)
