"""Predictors as an engine uses them, token by token, against their batch form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from swapless.errors import UsageError
from swapless.notation import NO_EXPERT
from swapless.predict import PREDICTORS, make_predictor
from swapless.predict.batches import Documents
from swapless.predict.network import Network
from swapless.predict.predictor import known_layers
from swapless.predict.saved import load_predictor, save_predictor
from swapless.predict.stream import Stream
from swapless.predict.token_stream import STREAMS, open_stream
from swapless.predict.training import logits_of
from swapless.predict.transformer import Transformer
from tests.predict.made import made_trace

SMALL = {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}
LEADS = (1, 2, 3, 4, "token")


@pytest.fixture(scope="module", params=["token", "token_id"])
def learned(request, tmp_path_factory):
    """Trained for some epochs, so that every weight has moved, saved and loaded."""
    columns = {} if request.param == "token" else {"token": None, "token_id": np.arange(147) % 9}
    predictor = Transformer(sizes=SMALL, epochs=8, batch_tokens=32, held_out=0.2, patience=8).fit(made_trace(**columns))
    path = tmp_path_factory.mktemp("learned") / "p"
    save_predictor(path, predictor)
    return load_predictor(path)


def unseen(vocabulary):
    """A trace to follow, some of its words never seen, and its words."""
    columns = {} if vocabulary == "token" else {"token": None, "token_id": np.arange(56) % 11}
    trace = made_trace(lengths=(21, 1, 34), seed=5, **columns)
    words = trace.tokens if vocabulary == "token" else trace.token_id.tolist()
    words[5] = words[30] = "never seen" if isinstance(words[0], str) else 99
    return made_trace(lengths=(21, 1, 34), seed=5, **{**columns, vocabulary: words}), words


def follow(stream, trace, words, rows):
    """What the stream says of each row, before the token and after each MoE layer; ``rows`` of one document."""
    for t in rows:
        said = [stream.begin_token(words[t]).copy()]
        said += [stream.observe(layer, trace.expert_ids[t, layer]).copy() for layer in range(trace.num_moe_layers)]
        yield t, said


def documents(trace):
    return [range(start, end) for start, end in itertools.pairwise(trace.document_offsets.tolist())]


@pytest.mark.few(1)
def test_the_stream_says_what_the_batch_says(learned):
    trace, words = unseen(learned.fitted_.vocabulary)
    batch = {lead: learned.scores_batch(trace, lead) for lead in LEADS}
    stream = Stream(learned)
    for rows in documents(trace):
        stream.begin_document()
        for t, said in follow(stream, trace, words, rows):
            for lead, scores in batch.items():
                for layer in range(trace.num_moe_layers):
                    known = known_layers(layer, lead)
                    assert np.array_equal(said[known][layer - known], scores[t, layer]), (t, layer, lead)


def test_both_say_what_the_trained_network_says(learned):
    """Network and loops share no code: what was trained is what is asked."""
    shape, trace = learned.shape_, unseen(learned.fitted_.vocabulary)[0]
    network = Network(shape, torch.zeros(shape.num_moe_layers, shape.num_experts))
    network.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in learned.weights_.items()})
    given = Documents(trace, learned.memory_, words=shape.words, buckets=shape.buckets)
    batch = given.batch(given.plan(range(given.count), 1024, None)[0], own=False)
    for lead, logits in zip(LEADS, logits_of(network, batch, LEADS)):
        expected = logits.sigmoid().permute(1, 0, 2).numpy()
        assert np.abs(learned.scores_batch(trace, lead) - expected).max() < 1e-5, lead


@pytest.mark.parametrize("kind", sorted(set(STREAMS.names()) - {"transformer"}))
def test_so_do_those_of_the_plain_predictors(kind):
    predictor = make_predictor(kind).fit(made_trace())
    trace, words = unseen("token")
    compared = 0
    batch = {lead: predictor.scores_batch(trace, lead) for lead in LEADS}
    stream = open_stream(predictor)
    for rows in documents(trace):
        stream.begin_document()
        for t, said in follow(stream, trace, words, rows):
            for layer, lead in itertools.product(range(trace.num_moe_layers), LEADS):
                known = known_layers(layer, lead)
                # A stream takes the weights for the lead that there is; a batch those for the lead that was asked for.
                if kind != "linear" or predictor.place_of(layer - known + 1) == predictor.place_of(lead):
                    assert np.abs(said[known][layer - known] - batch[lead][t, layer]).max() < 1e-5, (t, layer, lead)
                    compared += 1
    assert compared > len(trace) * trace.num_moe_layers


def streaming():
    """Every kind that can follow a model, fitted."""
    for kind in STREAMS.names():
        options = {"sizes": SMALL, "epochs": 3, "batch_tokens": 32} if kind == "transformer" else {}
        yield make_predictor(kind, **options).fit(made_trace())


def test_taking_in_is_following_without_a_word():
    trace, words = unseen("token")
    *_, rows = documents(trace)
    for predictor in streaming():
        followed, told = open_stream(predictor), open_stream(predictor)
        for _ in follow(followed, trace, words, rows[:-2]):
            pass
        # One token is followed, the rest comes in pieces, longer and shorter than the attention window.
        for _ in follow(told, trace, words, rows[:1]):
            pass
        for part in (slice(rows[1], rows[24]), slice(rows[24], rows[-2])):
            told.take_in(words[part], trace.expert_ids[part])
        for (_, one), (_, other) in zip(follow(followed, trace, words, rows[-2:]), follow(told, trace, words, rows[-2:])):
            for a, b in zip(one, other):
                assert np.array_equal(a, b), predictor.name


def test_siblings_do_not_disturb_each_other():
    trace, words = unseen("token")
    first, _, last = documents(trace)
    for predictor in streaming():
        alone = [list(follow(open_stream(predictor), trace, words, rows)) for rows in (first, last)]
        stream = open_stream(predictor)
        list(follow(stream, trace, words, first[:3]))  # the sibling of a stream in the middle of a document begins its own
        other = stream.sibling()
        stream.begin_document()
        together = zip(follow(stream, trace, words, first), follow(other, trace, words, last))
        for ours, theirs in zip(together, zip(*alone)):
            for (_, found), (_, expected) in zip(ours, theirs):
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), predictor.name


def test_only_the_next_layers_and_unknown_choices(learned):
    _trace, words = unseen(learned.fitted_.vocabulary)
    whole, few = Stream(learned), Stream(learned)
    ids = np.array([3, NO_EXPERT])
    assert np.array_equal(whole.begin_token(words[0])[:2], few.begin_token(words[0], 2))
    assert np.array_equal(whole.observe(0, ids)[:1], few.observe(0, ids, 1))
    assert few.observe(1, ids, 9).shape == (2, 8)


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


@pytest.mark.parametrize("kind", ["eam", "expert_map", "paper"])
def test_the_others_are_refused_with_the_names_of_those_that_can(kind):
    assert kind in PREDICTORS.names()
    options = {"epochs": 1, "width": 16, "depth": 1, "heads": 2} if kind == "paper" else {}
    predictor = make_predictor(kind, **options).fit(made_trace(lengths=(9, 9)))
    with pytest.raises(UsageError, match="linear, popularity, previous_token, token_prior, transformer"):
        open_stream(predictor)


@pytest.mark.slow
def test_the_published_encoder_is_asked_as_it_was_trained():
    """Torch's own encoder against the loops that share no code with it."""
    predictor = make_predictor("paper", epochs=6, width=16, depth=2, heads=2, learning_rate=0.02).fit(made_trace())
    network = predictor._network()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in predictor.weights_.items()})
    trace = made_trace(lengths=(21, 40), seed=5)
    words = torch.from_numpy(predictor.vocabulary_.encode(trace))
    with torch.no_grad():
        pieces = [network.eval()(words[rows]).sigmoid().transpose(0, 1) for rows in predictor._pieces(trace)]
    assert len(pieces) == 3
    assert np.abs(predictor.scores_batch(trace, 1) - torch.cat(pieces).numpy()).max() < 1e-5
