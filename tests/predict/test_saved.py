"""Files of predictors: what was changed, does not fit or cannot be is refused before anything is made of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from swapless.errors import PredictorError
from swapless.predict import make_predictor
from swapless.predict.features import TokenMemory
from swapless.predict.network import Network
from swapless.predict.network_shape import NetworkShape, sizes_of
from swapless.predict.paper import Paper
from swapless.predict.paper import sizes_of as paper_sizes
from swapless.predict.predictor import Fitted
from swapless.predict.saved import HEADER_KEY, load_predictor, read_header, save_predictor
from swapless.predict.transformer import Transformer
from swapless.predict.vocabulary import Vocabulary
from tests.predict.made import made_trace

SHAPE = {"num_moe_layers": 4, "num_experts": 8, "top_k": 2, "words": 3, "buckets": 16, "width": 8, "heads": 2}
SHAPE |= {"attention_layers": 1, "window": 4, "hidden": 4, "step_hidden": 4, "near": 2}
PLAIN = {
    "popularity": {},
    "previous_token": {},
    "token_prior": {},
    "eam": {"capacity": 4},
    "expert_map": {"capacity": 5},
    "linear": {"epochs": 1},
    "paper": {"width": 8, "depth": 1, "heads": 2, "epochs": 1},
}


def untrained() -> Transformer:
    """A learned predictor that was never trained: its file is as any."""
    trace, made, rng = made_trace(), Transformer(), np.random.default_rng(0)
    made.fitted_, made.shape_ = Fitted.of(trace, vocabulary="token"), NetworkShape(**SHAPE)
    made.memory_ = TokenMemory.of(trace, Vocabulary.of(trace, "token"))
    made.weights_ = {name: rng.normal(size=sizes).astype(np.float16) for name, sizes in sizes_of(made.shape_).items()}
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("predictors")
    for name, options in PLAIN.items():
        save_predictor(folder / name, make_predictor(name, **options).fit(made_trace()))
    save_predictor(folder / "transformer", untrained())
    return folder


def unsealed(path):
    """Header and tensors, as version 1 had them: without a checksum, so that all else is looked at."""
    header = dict(read_header(path))
    header.pop("checksum", None)
    return {**header, "format_version": 1}, load_file(path)


def written(path, header, arrays):
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, {HEADER_KEY: json.dumps(header)})
    return path


@pytest.mark.parametrize("kind", [*PLAIN, "transformer"])
def test_a_file_of_version_1_says_the_same(files, tmp_path, kind):
    old = load_predictor(written(tmp_path / "old", *unsealed(files / kind)))
    save_predictor(tmp_path / "new", old)
    assert (tmp_path / "new").read_bytes() == (files / kind).read_bytes()


def test_a_byte_that_changed_is_found(files, tmp_path):
    raw = bytearray((files / "eam").read_bytes())
    for place in (-1, -100):
        changed = bytearray(raw)
        changed[place] ^= 1
        (tmp_path / "p").write_bytes(changed)
        with pytest.raises(PredictorError, match="checksum"):
            load_predictor(tmp_path / "p")
    header, arrays = dict(read_header(files / "eam")), load_file(files / "eam")
    for wrong in ({"model_id": "made/other"}, {"settings": {"neighbours": 2, "capacity": 4}}, {"checksum": "0" * 64}):
        with pytest.raises(PredictorError, match="checksum"):
            load_predictor(written(tmp_path / "p", header | wrong, arrays))


HEADERS = [
    {"num_experts": 0}, {"num_experts": 40000}, {"num_experts": "8"}, {"num_experts": 8.0}, {"num_experts": True},
    {"num_experts": 10**9, "num_moe_layers": 10**9}, {"num_experts": 16}, {"num_moe_layers": -1}, {"num_moe_layers": 5},
    {"top_k": 9}, {"top_k": 0}, {"model_id": 7}, {"model_id": ["x"]}, {"vocabulary": "words"}, {"vocabulary": 3},
    {"vocabulary": None}, {"vocabulary": "token_id"}, {"leads": 3}, {"leads": ["soon"]}, {"leads": [0]}, {"leads": [1, 1]},
    {"leads": [5]}, {"leads": [True]}, {"leads": [1.0]}, {"leads": [[1]]}, {"settings": None}, {"settings": []},
    {"settings": {"fade": 0.4}}, {"mystery": 1}, {"predictor": 7}, {"format_version": 3}, {"format_version": "1"},
    {"format_version": None},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["token_prior", "linear"])
def test_a_header_that_cannot_be_is_refused(files, tmp_path, kind):
    header, arrays = unsealed(files / kind)
    for wrong in HEADERS:
        with pytest.raises(PredictorError):
            load_predictor(written(tmp_path / "p", header | wrong, arrays))
    for missing in header:
        with pytest.raises(PredictorError):
            load_predictor(written(tmp_path / "p", {key: value for key, value in header.items() if key != missing}, arrays))


SETTINGS = {
    "previous_token": [{"fade": 2}, {"fade": "x"}, {"fade": None}],
    "eam": [{"neighbours": 0}, {"neighbours": 5}, {"neighbours": 1.5}, {"capacity": "4"}, {"mystery": 1}],
    "expert_map": [{"over": "all"}, {"over": 3}, {"over": "gate_weights"}, {"capacity": 0}, {"seed": -1}, {"offered": None}],
    "paper": [{name: 0} for name in ("width", "depth", "batch_tokens")]
    + [{"width": 16}, {"heads": 3}, {"depth": 2}, {"depth": 10**6}, {"learning_rate": "x"}],
    "transformer": [
        {"network": SHAPE | wrong} for wrong in ({"words": 4}, {"width": 9}, {"heads": 3}, {"heads": 1}, {"near": 0})
    ]
    + [{"network": SHAPE | wrong} for wrong in ({"num_experts": 9}, {"attention_layers": 10**7}, {"window": 10**7}, {"new": 1})]
    + [{"network": wrong} for wrong in (None, [], {})],
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_that_cannot_be_are_refused(files, tmp_path, kind):
    header, arrays = unsealed(files / kind)
    for wrong in SETTINGS[kind]:
        with pytest.raises(PredictorError):
            load_predictor(written(tmp_path / "p", header | {"settings": header["settings"] | wrong}, arrays))


def changed(name, array):
    """An array empty, cut short, longer, of another type, not finite, negative or gone; not what may as well be right."""
    found = [array[:0], array[:-1], np.concatenate([array, array[:1]]), array.astype(np.float64), array[None], None]
    if array.dtype.kind == "f":
        found += [np.full_like(array, value) for value in (np.nan, np.inf)]
    elif array.dtype.kind == "i":
        found += [np.full_like(array, -7), array[::-1] if len(array) > 1 else array - 9]
    free = name in ("matrices", "maps", "texts", "vocabulary.ids")  # any number of rows
    for change in found:
        as_well = free and change is not None and change.dtype == array.dtype and change.shape[1:] == array.shape[1:]
        if change is None or not (np.array_equal(change, array) or (as_well and len(change) and np.isfinite(change).all())):
            yield change


@pytest.mark.parametrize("kind", [*PLAIN, "transformer"])
def test_tensors_that_do_not_fit_are_refused(files, tmp_path, kind):
    header, arrays = unsealed(files / kind)
    for name, array in arrays.items():
        rest = {key: value for key, value in arrays.items() if key != name}
        for change in changed(name, array):
            written(tmp_path / "p", header, rest if change is None else {**rest, name: change})
            with pytest.raises(PredictorError):
                load_predictor(tmp_path / "p")
                pytest.fail(f"{name} was accepted as {None if change is None else (change.dtype, change.shape)}")
    with pytest.raises(PredictorError, match="unknown mystery"):
        load_predictor(written(tmp_path / "p", header, {**arrays, "mystery": np.zeros(3)}))


def test_the_schema_names_the_arrays_of_the_networks(files):
    import torch

    shape = NetworkShape(**SHAPE)
    network = Network(shape, torch.zeros(4, 8))
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == sizes_of(shape)
    paper = load_predictor(files / "paper")
    assert isinstance(paper, Paper)
    held = {name: tuple(value.shape) for name, value in paper._network().state_dict().items()}
    assert held == paper_sizes(len(paper.vocabulary_), 4, 8, 8, 1)
