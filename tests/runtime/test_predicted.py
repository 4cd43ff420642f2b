"""A saved predictor in the engine: the same bits, what it foresaw, what it took, and whose predictors are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import swapless
from swapless import embedded
from swapless.errors import CheckpointError, PredictorError, PredictorMismatchError, UsageError
from swapless.notation import Phase
from swapless.predict import make_predictor
from swapless.predict.saved import load_predictor, save_predictor
from swapless.predict.token_stream import STREAMS, open_stream
from swapless.runtime.predicted import LAYERS_AHEAD, PredictedLookahead
from swapless.runtime.record import Document, record
from swapless.runtime.routing import Step
from swapless.trace import read_trace
from tests.predict.made import made_trace
from tests.runtime.test_ahead import always_on

SMALL = {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}
PROMPT = "Once upon a time, there was a little cat who"
TEXTS = (
    "Once upon a time, there was a little girl who had a cat. The cat was small and the girl loved it very much.",
    "def main():\n    for number in range(10):\n        print(number)\n    return number\n",
    "Tom has four apples and gives two of them to his sister. How many apples does he have now? He has two apples.",
    "The patient had a fever for three days. The doctor gave him a medicine and told him to rest.",
    "One day the dog ran into the garden and saw a bird. The bird flew away and the dog was sad.",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n        self.next = None\n",
)
TOKENS = 40


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.path())


@pytest.fixture(scope="module")
def recorded(tokenizer, tmp_path_factory):
    """A trace of the embedded model, as ``swapless record`` makes it."""
    path = tmp_path_factory.mktemp("recorded") / "t.parquet"
    with swapless.load(embedded.path(), resident=1.0, context=128) as model:
        record(model, tokenizer, [Document(text) for text in TEXTS], path, decode_tokens=12)
    return read_trace(path)


@pytest.fixture(
    scope="module", params=["linear", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("token", "token_id"))]
)
def saved(request, recorded, tmp_path_factory):
    """Predictors of the embedded model: the learned one on texts and on ids, and a plain one."""
    from dataclasses import replace

    path = tmp_path_factory.mktemp("saved") / request.param
    if request.param == "linear":
        predictor = make_predictor("linear")
    else:
        predictor = make_predictor("transformer", sizes=SMALL, epochs=4, batch_tokens=64, held_out=0.2)
    trace = replace(recorded, token=None) if request.param == "token_id" else recorded
    save_predictor(path, predictor.fit(trace))
    return path


def written(model, tokenizer, texts=(PROMPT,)):
    """Tokens and logits of greedy decoding."""
    tokenizer.padding_side = "left"
    given = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    out = model.generate(**given, **how, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
def test_the_same_bits_and_what_it_foresaw(saved, load, tokenizer):
    without = load(embedded.path(), resident=0.25, context=128)
    ahead = load(embedded.path(), resident=0.25, context=128, prefetch=saved)
    always_on(ahead)
    for found, expected in zip(written(ahead, tokenizer), written(without, tokenizer), strict=True):
        assert torch.equal(found, expected)
    figures, before = ahead.swapless.stats(), without.swapless.stats()
    assert (figures.requests, figures.hits) == (before.requests, before.hits)
    assert figures.prefetch_useful + figures.prefetch_late > 0
    assert figures.prefetch_useful + figures.prefetch_late + figures.prefetch_wasted <= figures.prefetch_reads
    assert figures.prefetch_tokens == figures.decode_tokens
    assert 0 < figures.prefetch_own_s < figures.decode_s
    assert figures.to_dict()["prefetch_own_s_per_token"] == figures.prefetch_own_s / figures.decode_tokens
    assert without.swapless.stats().prefetch_own_s_per_token is None

    # The engine's own trace, seen by the batch form at each lead, gives the same recall.
    predictor, trace = load_predictor(saved), ahead.swapless.trace()
    named = made_like(trace, tokenizer.convert_ids_to_tokens(trace.token_id.tolist()))
    top_k, decoded = trace.top_k, np.flatnonzero(trace.phase == int(Phase.DECODE))
    for lead in range(1, LAYERS_AHEAD + 1):
        best = np.argsort(-predictor.scores_batch(named, lead), axis=2)[:, :, :top_k]
        layers = range(lead - 1, trace.num_moe_layers)
        right = [len(set(best[t, layer]) & set(trace.expert_ids[t, layer])) for t in decoded for layer in layers]
        assert figures.prefetch_recall[lead] == pytest.approx(sum(right) / (top_k * len(right)), abs=2e-3)


def made_like(trace, texts):
    """The trace with texts beside its ids."""
    from dataclasses import replace

    import pyarrow as pa

    return replace(trace, token=pa.array(texts, pa.string()))


@pytest.mark.slow
def test_a_batch_is_followed_row_by_row(saved, load, tokenizer):
    texts = [PROMPT, "def main():", "One and one is"]
    without = load(embedded.path(), resident=0.25, context=128)
    ahead = load(embedded.path(), resident=0.25, context=128, prefetch=str(saved))
    always_on(ahead)
    for found, expected in zip(written(ahead, tokenizer, texts), written(without, tokenizer, texts), strict=True):
        assert torch.equal(found, expected)
    assert ahead.swapless.stats().prefetch_useful > 0
    alone = ahead.swapless.stats().prefetch_recall
    assert alone.keys() == set(range(1, LAYERS_AHEAD + 1)) and min(alone.values()) > 0.2


@pytest.mark.slow
def test_its_memory_is_in_the_budget(saved, load):
    model = load(embedded.path(), resident=0.25, context=128, prefetch=saved)
    budget = model.swapless.budget
    growth_bytes = open_stream(load_predictor(saved)).growth_bytes(128)
    assert (growth_bytes > 0) == (saved.name != "linear")
    assert budget.parts["prediction"] >= growth_bytes and budget.parts["ahead"] == LAYERS_AHEAD * 2 * budget.slot_bytes
    assert budget.total_bytes == max(sum(budget.parts.values()), budget.floor_bytes)  # loading itself may have held more


# -- whose predictors are refused --------------------------------------------------------------------------------------


def saved_prior(path, kind="token_prior", **made):
    save_predictor(path, make_predictor(kind).fit(made_trace(**{"layers": 6, "experts": 16, "model_id": "embedded"} | made)))
    return path


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"layers": 5}, "MoE layers. .*Got: 5. Allowed: 6"),
        ({"experts": 8}, "experts a MoE layer. .*Got: 8. Allowed: 16"),
        ({"top_k": 3}, "experts a token. .*Got: 3. Allowed: 2"),
        ({"model_id": "somebody/else"}, "another model. .*somebody/else"),
        ({"token": ["\u4e94\u516d"] * 147}, "tokenizer. .*0% of its 1 words"),
        ({"token": None, "token_id": np.full(147, 4096)}, "token ids .*Got: 4096. Allowed: below 4096"),
    ],
    ids=["L", "E", "K", "model", "texts", "ids"],
)
def test_of_another_model(made, said, load, tmp_path):
    path = saved_prior(tmp_path / "p", **made)
    with pytest.raises(PredictorMismatchError, match=said) as caught:
        load(embedded.path(), context=64, prefetch=path)
    assert str(path) in str(caught.value) and "swapless predict train" in str(caught.value)


def test_a_kind_that_cannot_follow(load, tmp_path):
    with pytest.raises(UsageError, match="transformer"):
        load(embedded.path(), context=64, prefetch=saved_prior(tmp_path / "p", kind="eam"))


def test_no_predictor(load, tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(PredictorError, match="Not a predictor's file"):
        load(embedded.path(), context=64, prefetch=tmp_path / "junk")
    with pytest.raises(UsageError, match="no file of that name"):
        load(embedded.path(), context=64, prefetch=tmp_path / "nowhere")


def test_a_checkpoint_without_a_tokenizer(own_olmoe, load, tmp_path):
    made = {"layers": 3, "experts": 8, "model_id": "somebody/OLMoE"}
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(own_olmoe, prefetch=saved_prior(tmp_path / "texts", **made))
    model = load(own_olmoe, prefetch=saved_prior(tmp_path / "ids", token=None, token_id=np.arange(147) % 99, **made))
    assert model.swapless.budget.warnings == ()


def test_one_that_names_no_model_is_taken_with_a_word(load, tmp_path):
    model = load(embedded.path(), context=64, prefetch=saved_prior(tmp_path / "p", kind="popularity", model_id=None))
    assert any("names no model" in warning for warning in model.swapless.budget.warnings)


# -- following alone -----------------------------------------------------------------------------------------------------


def step(trace, rows, phase, document=0):
    """A forward call over these rows of a trace."""
    rows = np.array(rows)
    place = (rows - rows[0] + trace.position[rows[0]]).astype(np.int32)
    return Step(phase, np.full(len(rows), document, np.int32), place, np.ones(len(rows), bool), rows.astype(np.int32))


def walk(lookahead, trace, rows, phase, *, ask=True, layers=None, document=0):
    """One forward call: what is foreseen before it and after each MoE layer."""
    lookahead.begin(step(trace, rows, phase, document))
    ask = ask and phase is Phase.DECODE
    said = [lookahead.foresee(-1, None)] if ask else []
    for layer in range(trace.num_moe_layers if layers is None else layers):
        lookahead.seen(layer, torch.from_numpy(trace.expert_ids[rows, layer].astype(np.int64)))
        if ask:
            said.append(lookahead.foresee(layer, None))
    return said


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", STREAMS.names())
def test_what_nobody_asked_for_is_made_up_for(kind):
    options = {"sizes": SMALL, "epochs": 3, "batch_tokens": 32} if kind == "transformer" else {}
    predictor = make_predictor(kind, **options).fit(made_trace())
    trace = made_trace(lengths=(40, 30), seed=5)
    words = trace.tokens
    always, seldom, lost = (PredictedLookahead(open_stream(predictor), words.__getitem__) for _ in range(3))
    for document, (first, end) in enumerate(((0, 40), (40, 70))):
        for lookahead in (always, seldom, lost):
            assert walk(lookahead, trace, range(first, first + 9), Phase.PREFILL, document=document) == []
        walk(lost, trace, [first + 9], Phase.DECODE, document=document, layers=2)  # cut off in the middle
        for t in range(first + 9, end):
            told = walk(always, trace, [t], Phase.DECODE, document=document)
            asked = (t // 7) % 2 == 0
            assert walk(seldom, trace, [t], Phase.DECODE, ask=asked, document=document) == (told if asked else [])
            assert [len(found) for found in told] == [2, 2, 2, 1, 0]
            # One that lost its way says something else, or the same by chance, but goes on.
            assert [len(found) for found in walk(lost, trace, [t], Phase.DECODE, document=document)] == [2, 2, 2, 1, 0]
    for _, experts, worth in told[0]:
        assert len(set(experts)) == predictor.fitted_.top_k >= worth


def test_a_block_on_other_rows_ends_following_and_nothing_else():
    predictor = make_predictor("popularity").fit(made_trace())
    trace = made_trace(lengths=(40,), seed=5)
    lookahead = PredictedLookahead(open_stream(predictor), trace.tokens.__getitem__)
    lookahead.begin(step(trace, [0], Phase.DECODE))
    assert lookahead.foresee(-1, None)
    lookahead.seen(0, torch.zeros(3, 2, dtype=torch.long))
    assert lookahead.foresee(0, None) == []
    assert walk(lookahead, trace, [1], Phase.DECODE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", ["gate", "saved"])
def test_drafts_and_beams_are_followed_as_far_as_they_go(prefetch, saved, load, tokenizer):
    """Steps of several tokens, some of them taken back, and sequences that change places."""
    model = load(embedded.path(), resident=0.25, context=128, prefetch=saved if prefetch == "saved" else "gate")
    always_on(model)
    plain = load(embedded.path(), resident=0.25, context=128)
    given = tokenizer(" ".join([PROMPT] * 2), return_tensors="pt", return_token_type_ids=False)
    for options in ({"prompt_lookup_num_tokens": 4}, {"num_beams": 3}, {}):
        how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False} | options
        assert torch.equal(model.generate(**given, **how), plain.generate(**given, **how))
    assert model.swapless.trace().num_documents == 3 and model.swapless.stats().prefetch_tokens > 0
