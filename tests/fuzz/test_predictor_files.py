"""Files of predictors made wrong: each ends in an error of ours, or in likelihoods that are the same twice.

With its checksum a file is what was written or refused. Files of version 1 have none, so that only the schema stands between a
number and the loops that walk the tensors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from swapless.predict import make_predictor
from swapless.predict.saved import HEADER_KEY, save_predictor
from tests.fuzz.figures import count
from tests.fuzz.mutations import Mutation, bounded, byte_mutations, json_mutations
from tests.fuzz.readers import predictor_asked
from tests.predict.made import made_trace
from tests.predict.test_saved import PLAIN, unsealed, untrained

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("SWAPLESS_FUZZ_SEED", "0"))
MORE = int(os.environ.get("SWAPLESS_FUZZ_TIMES", "1"))


@pytest.fixture(scope="module", params=[*PLAIN, "transformer"])
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file."""
    path = tmp_path_factory.mktemp("fuzz") / request.param
    made = (
        untrained()
        if request.param == "transformer"
        else make_predictor(request.param, **PLAIN[request.param]).fit(made_trace())
    )
    save_predictor(path, made)
    return path


def held(form: str, mutations: list[Mutation], path: Path, right: object = None) -> None:
    """Ask each variant; one that answers must say ``right``, where that is given."""
    wrong = []
    for mutation in mutations:
        changed = path.with_name("changed")
        changed.write_bytes(mutation.raw)
        outcome = bounded(predictor_asked, str(changed))
        kind = {"typed": "refused by name", "value": "asked, likelihoods"}.get(outcome.kind, outcome.kind)
        count(form, kind, outcome)
        likely = outcome.kind != "value" or (outcome.value[1] and right in (None, outcome.value))
        if not (outcome.held and likely):
            wrong.append(f"{mutation.name}: {outcome.kind}, {outcome.detail[-700:]}")
    assert not wrong, f"{len(wrong)} wrong\n" + "\n".join(wrong)


def test_bytes_under_the_checksum(predictor: Path) -> None:
    good = bounded(predictor_asked, str(predictor), seconds=120)
    assert good.kind == "value" and good.value[1], good.detail
    held("predictors, bytes", byte_mutations(predictor.read_bytes(), 20 * MORE, seed=SEED + 40), predictor, good.value)


def test_without_a_checksum(predictor: Path) -> None:
    header, arrays = unsealed(predictor)
    mutations, old = [], predictor.with_name("old")
    for mutation in json_mutations(header, 45 * MORE, seed=SEED + 41):
        save_file(arrays, old, {HEADER_KEY: mutation.raw.decode("utf-8", "replace")})
        mutations.append(Mutation(mutation.name, old.read_bytes()))
    held("predictors, header", mutations, predictor)
    save_file(arrays, old, {HEADER_KEY: json.dumps(header)})
    raw = old.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    tensors = byte_mutations(raw, 25 * MORE, seed=SEED + 42, first=begin) + byte_mutations(
        raw, 10 * MORE, seed=SEED + 43, last=begin
    )
    held("predictors, tensors", tensors, predictor)
