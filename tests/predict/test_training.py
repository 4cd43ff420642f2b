"""Training of the learned predictor: resumed equals uninterrupted, bit for bit; other checkpoints are refused."""

from __future__ import annotations

import numpy as np
import pytest

from swapless.errors import PredictorError, PredictorMismatchError, TraceValueError, UsageError
from swapless.predict.transformer import Transformer
from tests.predict.made import made_trace

SMALL = {"width": 32, "hidden": 16, "step_hidden": 16, "window": 8, "heads": 2, "buckets": 64}
RECIPE = {"sizes": SMALL, "epochs": 4, "batch_tokens": 64, "held_out": 0.2}


class StoppedError(Exception):
    """Stands for Ctrl-C."""


def test_a_resumed_training_gives_the_same_bits(tmp_path):
    trace, place = made_trace(), tmp_path / "checkpoint"
    whole = Transformer(**RECIPE).fit(trace)

    def stop(stage, done):
        if done >= 0.6:
            raise StoppedError

    with pytest.raises(StoppedError):
        Transformer(**RECIPE, checkpoint=place).fit(trace, progress=stop)
    assert place.exists()
    resumed = Transformer(**RECIPE, checkpoint=place).fit(trace)
    assert resumed.course_.losses == whole.course_.losses
    assert resumed.course_.recalls == whole.course_.recalls
    assert np.array_equal(resumed.scores_batch(trace, 1), whole.scores_batch(trace, 1))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    place = tmp_path / "checkpoint"
    Transformer(**{**RECIPE, "epochs": 1}, checkpoint=place).fit(made_trace())
    for other in ({**RECIPE, "epochs": 1, "seed": 1}, {**RECIPE, "epochs": 2}):
        with pytest.raises(PredictorMismatchError, match="another training"):
            Transformer(**other, checkpoint=place).fit(made_trace())
    with pytest.raises(PredictorMismatchError, match="another training"):
        Transformer(**{**RECIPE, "epochs": 1}, checkpoint=place).fit(made_trace(seed=3))
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(PredictorError, match="cannot be read"):
        Transformer(**{**RECIPE, "epochs": 1}, checkpoint=place).fit(made_trace())


def test_one_document_is_too_few():
    with pytest.raises(TraceValueError, match="Too few documents"):
        Transformer(**RECIPE).fit(made_trace(lengths=(40,)))


def test_minutes_choose_the_epochs():
    made = Transformer(**{**RECIPE, "minutes": 0.02, "patience": 99}).fit(made_trace())
    assert 1 <= made.course_.epochs == len(made.course_.recalls)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"dropout": 1.0}, {"seed": -1}, {"batch_tokens": 1.5}, {"held_out": "x"}])
def test_a_recipe_that_cannot_be(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Transformer(**wrong)
