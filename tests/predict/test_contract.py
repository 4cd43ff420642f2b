"""What every registered predictor must do; a new one is enrolled by being registered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from swapless.errors import (
    NotFittedError,
    PredictorError,
    PredictorMismatchError,
    TraceValueError,
    UnknownNameError,
    UsageError,
)
from swapless.predict import PREDICTORS, make_predictor
from swapless.predict.evaluate import check_cut, evaluate
from swapless.predict.predictor import Predictor, history, known_layers
from swapless.predict.saved import load_predictor, save_predictor
from swapless.trace import Trace
from tests.predict.made import made_trace

NAMES = PREDICTORS.names()
LEADS = (1, 3, 4, "token")
SMALL = {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}
OPTIONS = {
    "transformer": {"sizes": SMALL, "epochs": 3, "batch_tokens": 64, "held_out": 0.2},
    "linear": {"leads": (1, 3, 4, "token"), "batch_tokens": 64},
    "paper": {"epochs": 4, "width": 16, "heads": 2, "depth": 1, "batch_tokens": 64, "learning_rate": 0.01},
}


def fitted(name: str, trace: Trace | None = None) -> Predictor:
    made = make_predictor(name, **OPTIONS.get(name, {}))
    assert made.fit(made_trace() if trace is None else trace) is made
    return made


@pytest.fixture(scope="module", params=NAMES)
def predictor(request):
    return fitted(request.param)


@pytest.fixture(scope="module")
def fresh():
    return made_trace(lengths=(21, 1, 34), seed=5)


def perturbed(document: Trace, row: int, known: int, seed: int) -> Trace:
    """The document with everything beyond the cut changed: later layers of the row, all of the rows after it."""
    rng = np.random.default_rng(seed)
    ids = document.expert_ids.copy()
    for t in range(row, len(document)):
        for layer in range(known if t == row else 0, ids.shape[1]):
            ids[t, layer] = rng.permutation(document.num_experts)[: ids.shape[2]]
    words = document.tokens
    words = words[: row + 1] + [words[place] for place in rng.permutation(len(words))][: len(words) - row - 1]
    scores = document.router_scores.copy()
    scores[row + 1 :] = 9
    scores[row, known:] = 9
    return Trace.from_arrays(document.header, expert_ids=ids, token=words, router_scores=scores, document=document.document)


@pytest.mark.parametrize("lead", LEADS)
def test_nothing_beyond_the_cut_moves_a_score(predictor, fresh, lead):
    document = fresh.rows(fresh.document == 2)
    before = predictor.scores_batch(document, lead)
    assert before.shape == (34, 4, 8) and before.dtype == np.float32
    assert before.min() >= 0 and before.max() <= 1
    moved = 0.0
    for row, layer in ((0, 0), (0, 3), (9, 0), (9, 2), (20, 3), (32, 1)):
        known = known_layers(layer, lead)
        after = predictor.scores_batch(perturbed(document, row, known, row), lead)
        moved = max(moved, float(np.abs(after[row, layer] - before[row, layer]).max()))
    if predictor.causal:
        assert moved <= 1e-5
    else:
        assert moved > 1e-3, "it declares that it is not causal, and looks it"


@pytest.mark.parametrize("lead", LEADS)
def test_the_batch_form_says_what_the_single_form_says(predictor, fresh, lead):
    document = fresh.rows(fresh.document == 0)
    batch = predictor.scores_batch(fresh, lead)
    for row, layer in ((0, 0), (0, 3), (7, 1), (20, 3)):
        seen = history(document, row, known_layers(layer, lead))
        assert len(seen) == row + 1 and (seen.expert_ids[row, known_layers(layer, lead) :] == -1).all()
        apart = np.abs(predictor.scores(seen, layer, lead) - batch[row, layer]).max()
        assert apart <= 1e-5 if predictor.causal else True
    if predictor.causal:
        check_cut(predictor, fresh, lead, points=8)


def test_saved_and_loaded_it_says_the_same_bits(predictor, fresh, tmp_path):
    path = tmp_path / "predictor.safetensors"
    save_predictor(path, predictor)
    again = load_predictor(path)
    assert type(again) is type(predictor) and again.fitted_ == predictor.fitted_
    for lead in (1, "token"):
        assert np.array_equal(again.scores_batch(fresh, lead), predictor.scores_batch(fresh, lead))
    first = path.read_bytes()
    save_predictor(path, again)
    assert path.read_bytes() == first


def test_it_learns_the_same_bits_twice(predictor, fresh):
    again = fitted(predictor.name)
    assert np.array_equal(again.scores_batch(fresh, 1), predictor.scores_batch(fresh, 1))


def test_it_beats_chance(predictor, fresh):
    rows = evaluate(predictor, fresh, (1,), widths=(2, 8))
    model = [row for row in rows if row["moe_layer"] is None]
    assert model[0]["recall"] > 2 / 8 and model[1]["recall"] == 1 and model[1]["precision"] == pytest.approx(2 / 8)
    assert model[0]["tokens"] == len(fresh)
    if predictor.name == "transformer":
        simple = evaluate(fitted("popularity"), fresh, (1,))[0]
        assert model[0]["recall"] > simple["recall"] + 0.1


def test_before_fit_it_says_so(predictor, fresh, tmp_path):
    bare = make_predictor(predictor.name, **OPTIONS.get(predictor.name, {}))
    for call in (lambda: bare.scores_batch(fresh, 1), lambda: evaluate(bare, fresh, (1,))):
        with pytest.raises(NotFittedError, match="not fitted"):
            call()
    with pytest.raises(NotFittedError):
        save_predictor(tmp_path / "p", bare)
    assert not (tmp_path / "p").exists()


def test_another_model_is_refused(predictor):
    for other in (made_trace(model_id="made/other"), made_trace(layers=3), made_trace(top_k=3), made_trace(experts=9)):
        with pytest.raises(PredictorMismatchError):
            evaluate(predictor, other, (1,))


def test_a_trace_without_a_model_is_taken_with_one_warning(predictor):
    said = []
    trace = made_trace(model_id=None)
    rows = evaluate(predictor, trace, (1,), warn=said.append)
    assert rows and len(said) == 1 and "made/moe" in said[0]
    wide = replace(trace, expert_ids=np.where(trace.expert_ids == 0, 9, trace.expert_ids).astype(np.int16))
    with pytest.raises(PredictorMismatchError, match="ids below 8"):
        evaluate(predictor, wide, (1,))


def test_without_tokens(predictor, fresh):
    bare = replace(fresh, token=None)
    if not predictor.reads_tokens:
        assert evaluate(predictor, bare, ("token",))
        return
    with pytest.raises(PredictorMismatchError, match="tokens"):
        evaluate(predictor, bare, (1,))
    with pytest.raises(PredictorMismatchError, match="tokens"):
        fitted(predictor.name, bare)
    ids = replace(made_trace(), token=None, token_id=np.arange(len(made_trace()), dtype=np.int32) % 11)
    by_id = fitted(predictor.name, ids)
    assert by_id.fitted_.vocabulary == "token_id"
    assert evaluate(by_id, ids, (1,))
    with pytest.raises(PredictorMismatchError, match="token_id"):
        evaluate(by_id, fresh, (1,))


def test_nothing_to_learn_from(predictor):
    empty = made_trace().rows(slice(0, 0))
    with pytest.raises(TraceValueError, match="empty"):
        fitted(predictor.name, empty)


@pytest.mark.parametrize("lead", (0, -1, 5, 1.5, True, "soon"))
def test_a_lead_that_cannot_be(predictor, fresh, lead):
    with pytest.raises(UsageError, match=r"1 to 4 \(L\)"):
        evaluate(predictor, fresh, (lead,))


def test_an_unknown_kind_and_an_unknown_option():
    with pytest.raises(UnknownNameError, match="Did you mean 'linear'"):
        make_predictor("linaer")
    for name in NAMES:
        with pytest.raises(UsageError):
            make_predictor(name, colour="blue")


class Peeking(Predictor):
    """Looks one layer further than it may."""

    name = "peeking"

    def fit(self, trace, *, progress=None):
        from swapless.predict.predictor import Fitted

        self.fitted_ = Fitted.of(trace)
        return self

    def scores_batch(self, trace, lead):
        scores = np.zeros((len(trace), trace.num_moe_layers, trace.num_experts), np.float32)
        for place in range(trace.top_k):
            ids = trace.expert_ids[:, :, place]
            np.put_along_axis(scores, np.maximum(ids, 0)[:, :, None].astype(np.int64), (ids >= 0)[:, :, None], 2)
        return scores

    def state(self):
        return {}, {}

    @classmethod
    def restore(cls, fitted, arrays, settings):
        return cls()


def test_evaluation_catches_one_that_looks_beyond_the_cut(fresh):
    with pytest.raises(PredictorError, match="looks beyond the cut"):
        evaluate(Peeking().fit(fresh), fresh, (1,))
