"""The learned predictor as an engine uses it, against its batch form."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.errors import UsageError
from swapless.predict.predictor import known_layers
from swapless.predict.saved import load_predictor, save_predictor
from swapless.predict.stream import Stream
from swapless.predict.transformer import Transformer
from tests.predict.made import made_trace

SMALL = {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}


@pytest.fixture(scope="module", params=["token", "token_id"])
def learned(request, tmp_path_factory):
    """Trained for some epochs, so that every weight has moved, saved and loaded."""
    columns = {} if request.param == "token" else {"token": None, "token_id": np.arange(147) % 9}
    predictor = Transformer(sizes=SMALL, epochs=8, batch_tokens=32, held_out=0.2, patience=8).fit(made_trace(**columns))
    path = tmp_path_factory.mktemp("learned") / "p"
    save_predictor(path, predictor)
    return load_predictor(path)


def test_the_stream_says_what_the_batch_says(learned):
    columns = {} if learned.fitted_.vocabulary == "token" else {"token": None, "token_id": np.arange(56) % 11}
    trace = made_trace(lengths=(21, 1, 34), seed=5, **columns)
    words = trace.tokens if learned.fitted_.vocabulary == "token" else trace.token_id.tolist()
    words[5] = words[30] = "never seen" if isinstance(words[0], str) else 99
    trace = made_trace(lengths=(21, 1, 34), seed=5, **{**columns, learned.fitted_.vocabulary: words})
    layers = trace.num_moe_layers
    batch = {lead: learned.scores_batch(trace, lead) for lead in (1, 2, 3, 4, "token")}
    stream, first = Stream(learned), True
    for t in range(len(trace)):
        if first or trace.document[t] != trace.document[t - 1]:
            stream.begin_document()
        first = False
        said = [stream.begin_token(words[t])]
        said += [stream.observe(layer, trace.expert_ids[t, layer]) for layer in range(layers)]
        for lead, scores in batch.items():
            for layer in range(layers):
                known = known_layers(layer, lead)
                assert np.abs(said[known][layer - known] - scores[t, layer]).max() < 1e-5, (t, layer, lead)


def test_layers_out_of_order_are_refused(learned):
    stream = Stream(learned)
    with pytest.raises(UsageError, match="in order"):
        stream.observe(0, np.array([0, 1]))
    stream.begin_token("the")
    with pytest.raises(UsageError, match="in order"):
        stream.observe(1, np.array([0, 1]))
    stream.observe(0, np.array([0, 1]))
    with pytest.raises(UsageError, match="in order"):
        stream.observe(0, np.array([0, 1]))
