"""Foreign traces: found by content, read in full, refused where something is missing."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import pytest

from swapless.errors import TraceFormatError, TraceMismatchError, TraceMissingError, TraceValueError, UnknownNameError
from swapless.notation import Phase
from swapless.testing import random_trace
from swapless.trace.importers import load_trace
from swapless.trace.importers.routed_experts import from_routed_experts


def write_csv(path, ids, *, first_layer=1, drop=(), tokens=None):
    """One prompt of MoE-Beyond: layer after layer, ids [T, L, K] as text."""
    tokens = tokens or [f"t{i}" for i in range(len(ids))]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Layer ID", "Batch Number", "Token", "Activated Expert IDs"])
        for layer in range(ids.shape[1]):
            for row in range(len(ids)):
                if (layer, row) not in drop:
                    writer.writerow([layer + first_layer, 1, tokens[row], str(ids[row, layer].tolist())])


@pytest.fixture
def prompts(tmp_path):
    trace = random_trace(np.random.default_rng(0), num_moe_layers=3, num_experts=64, top_k=4, lengths=(5, 3, 2))
    folder = tmp_path / "csv"
    folder.mkdir()
    for number, piece in zip((2, 10, 11), trace.pieces(max_documents=1)):
        write_csv(folder / f"prompt_{number}.csv", piece.expert_ids)
    return folder, trace


def test_a_moe_beyond_folder(prompts):
    folder, trace = prompts
    read = load_trace(folder, model_id="x/y")
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.document.tolist() == trace.document.tolist()
    assert read.header.moe_blocks == (1, 2, 3)
    assert (read.header.model_id, read.num_experts) == ("x/y", 64)
    assert read.tokens[:5] == ["t0", "t1", "t2", "t3", "t4"]
    assert set(read.phase.tolist()) == {Phase.PREFILL}
    assert np.array_equal(load_trace(folder, importer="moe-beyond").expert_ids, trace.expert_ids)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda f, t: write_csv(f, t[:4], drop=[(1, 2)]), TraceValueError, "row is missing.*layer 2"),
        (lambda f, t: write_csv(f, t[:4], drop=[(1, r) for r in range(4)]), TraceValueError, r"layer is missing.*\[2\]"),
        (lambda f, t: write_csv(f, t[:4, :2]), TraceMismatchError, "differ in their MoE layers"),
        (lambda f, t: write_csv(f, t[:4, :, :3]), TraceMismatchError, "differ in their ids"),
        (lambda f, t: write_csv(f, np.where(t[:4] == t[0, 0, 0], 64, t[:4])), TraceValueError, "out of range.*Got: 64"),
        (lambda f, t: f.write_text("Layer ID,Batch Number,Token,Activated Expert IDs\n"), TraceValueError, "without tokens"),
        (lambda f, t: f.write_text("Layer ID,Token\n1,a\n"), TraceFormatError, "lacks columns.*Activated"),
        (lambda f, t: f.write_text('Layer ID,Token,Activated Expert IDs\n1,a,"[1, x]"\n'), TraceFormatError, "line 2"),
        (lambda f, t: f.write_text('Layer ID,Token,Activated Expert IDs\nq,a,"[1]"\n'), TraceFormatError, "no number"),
        (
            lambda f, t: f.write_text('Layer ID,Token,Activated Expert IDs\n1,a,"[1, 2]"\n1,b,"[1]"\n'),
            TraceValueError,
            "Ragged",
        ),
    ],
)
def test_a_broken_csv_is_never_skipped(prompts, change, error, said):
    folder, trace = prompts
    change(folder / "prompt_12.csv", trace.expert_ids)
    with pytest.raises(error, match=said):
        load_trace(folder)


def test_an_npz(tmp_path):
    trace = random_trace(np.random.default_rng(1), lengths=(5, 3))
    arrays = {"expert_ids": trace.expert_ids, "offsets": [0, 5, 8], "num_experts": 8}
    np.savez(tmp_path / "t.npz", **arrays, domain=["a", "b"], moe_blocks=[1, 4], phase="prefill")
    read = load_trace(tmp_path / "t.npz")
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.document.tolist() == trace.document.tolist()
    assert (read.header.moe_blocks, read.domains) == ((1, 4), ("a", "b"))
    for wrong, error, said in (
        ({"offsets": [0, 5, 5, 8]}, TraceValueError, "without tokens.*document 1"),
        ({"offsets": [0, 5]}, TraceValueError, "0 to T"),
        ({"offsets": [0, 6, 5, 8]}, TraceValueError, "offsets that fall"),
        ({"expert_ids": trace.expert_ids.reshape(8, -1)}, TraceFormatError, "shape"),
        ({"num_experts": 2}, TraceValueError, "out of range"),
        ({"mystery": 1}, TraceFormatError, "unknown mystery"),
    ):
        np.savez(tmp_path / "w.npz", **(arrays | wrong))
        with pytest.raises(error, match=said):
            load_trace(tmp_path / "w.npz")
    (tmp_path / "t.npz").write_bytes((tmp_path / "t.npz").read_bytes()[:-30])
    with pytest.raises(TraceFormatError):
        load_trace(tmp_path / "t.npz", importer="npz")
    np.savez(tmp_path / "p.npz", expert_ids=np.array([{}], object), num_experts=8)
    with pytest.raises(TraceFormatError, match="plain arrays"):
        load_trace(tmp_path / "p.npz")


def test_routed_experts_in_memory():
    trace = random_trace(np.random.default_rng(2), num_moe_layers=2, num_experts=8, top_k=2, lengths=(6, 4))
    answers = []
    for piece in trace.pieces(max_documents=1):
        blocks = np.zeros((len(piece), 3, 2), np.int32)
        blocks[:, 1:] = piece.expert_ids
        answers.append(blocks)
    read = from_routed_experts(answers, num_experts=8, prompt_tokens=[2, 4])
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.header.moe_blocks == (1, 2)
    assert read.phase.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    answers[1][3] = 0
    with pytest.raises(TraceValueError, match=r"twice.*row 9"):
        from_routed_experts(answers, num_experts=8)
    for wrong, error in (
        ([], TraceValueError),
        ([answers[0][0]], TraceValueError),
        ([answers[0], answers[0][:, :2]], TraceMismatchError),
        ([answers[0][:0]], TraceValueError),
    ):
        with pytest.raises(error):
            from_routed_experts(wrong, num_experts=8)
    with pytest.raises(TraceValueError, match="prompt_tokens"):
        from_routed_experts(answers[:1], num_experts=8, prompt_tokens=[7])


def test_routed_experts_on_disk(tmp_path):
    trace = random_trace(np.random.default_rng(3), lengths=(6, 4))
    one, two = (piece.expert_ids for piece in trace.pieces(max_documents=1))
    packed = base64.b64encode(two.astype("<i4").tobytes()).decode()
    shape = {"num_experts": 8, "top_k": 2, "num_blocks": 2, "model_id": "m/n"}
    lines = [shape, {"routed_experts": one.tolist(), "prompt_tokens": 5}, {"meta_info": {"routed_experts": packed}}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    read = load_trace(path)
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.header.model_id == "m/n"
    assert read.phase.tolist() == [0] * 5 + [1] + [0] * 4
    for wrong, said in (
        ({"routed_experts": packed[:-4]}, "line 4"),
        ({"routed_experts": "?"}, "base64"),
        ({"routed_experts": [[[1]]]}, "fit the shape"),
        ({"routed_experts": [[[1, 2], [1]]]}, "ragged"),
        ({}, "fit the shape"),
        ([], "an object"),
    ):
        path.write_text("\n".join(map(json.dumps, [*lines, wrong])))
        with pytest.raises(TraceFormatError, match=said):
            load_trace(path)


def test_nothing_known(tmp_path):
    with pytest.raises(TraceMissingError):
        load_trace(tmp_path / "none")
    with pytest.raises(TraceFormatError, match="moe-beyond"):
        load_trace(tmp_path)
    with pytest.raises(UnknownNameError, match="npz"):
        load_trace(tmp_path, importer="nzp")
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(TraceFormatError, match="a text that begins"):
        load_trace(tmp_path / "x.txt")


def server_answers():
    """Rows of two answers, the second with one generated token that ran."""
    trace = random_trace(np.random.default_rng(5), num_moe_layers=2, num_experts=8, top_k=2, lengths=(7, 4))
    one, two = (np.array(piece.expert_ids, np.int32) for piece in trace.pieces(max_documents=1))
    return trace, one, two


def saved_array(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def vllm_line(rows, prompt, generated, *, apart, form=lambda array: array.tolist(), **more):
    usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
    own = rows[prompt:] if apart else rows
    line = {"object": "chat.completion", "model": "m/n", "usage": usage, "choices": [{"index": 0, "routed_experts": form(own)}]}
    return line | ({"prompt_routed_experts": form(rows[:prompt])} if apart else {"prompt_routed_experts": None}) | more


def write_answers(folder, *lines, config=None, indent=None):
    folder.mkdir(exist_ok=True)
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2} if config is None else config
    (folder / "config.json").write_text(json.dumps(sizes))
    path = folder / "answers.json"
    path.write_text(json.dumps(lines, indent=indent) if indent else "\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("form", [lambda array: array.tolist(), saved_array, lambda a: saved_array(a.astype(np.uint8))])
def test_responses_of_vllm_as_they_came(tmp_path, form):
    """Prompt and generated rows apart (0.21) or together, lists or saved arrays, a file of lines or one document."""
    trace, one, two = server_answers()
    for indent in (None, 1):
        lines = [vllm_line(one, 4, 4, apart=True, form=form), vllm_line(two, 3, 2, apart=False, form=form)]
        read = load_trace(write_answers(tmp_path, *lines, indent=indent))
        assert np.array_equal(read.expert_ids, trace.expert_ids)
        assert read.phase.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1]
        assert (read.header.model_id, read.num_experts, read.document.tolist()) == ("m/n", 8, [0] * 7 + [1] * 4)
    read = load_trace(write_answers(tmp_path, vllm_line(two, 4, 1, apart=True)))  # one token, which never ran
    assert np.array_equal(read.expert_ids, two) and not read.phase.any()


def test_choices_are_documents(tmp_path):
    _, one, two = server_answers()
    line = vllm_line(one, 4, 6, apart=True)
    line["choices"].append({"index": 1, "routed_experts": two[:1].tolist()})
    read = load_trace(write_answers(tmp_path, line))
    assert read.document.tolist() == [0] * 7 + [1] * 5
    assert np.array_equal(read.expert_ids[7:], np.concatenate([one[:4], two[:1]]))


def test_responses_of_sglang_need_no_first_line(tmp_path):
    trace, one, two = server_answers()
    lines = [
        {"text": "a", "meta_info": {"routed_experts": base64.b64encode(rows.astype("<i4").tobytes()).decode(), **tokens}}
        for rows, tokens in (
            (one, {"prompt_tokens": 5, "completion_tokens": 3}),
            (two, {"prompt_tokens": 4, "completion_tokens": 1}),
        )
    ]
    read = load_trace(write_answers(tmp_path, *lines), model_id="m/n")
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.phase.tolist() == [0] * 5 + [1] * 2 + [0] * 4
    names = {"text_config": {"n_routed_experts": 8, "moe_top_k": 2, "n_layer": 2}}
    assert np.array_equal(load_trace(write_answers(tmp_path, lines, config=names)).expert_ids, trace.expert_ids)
    for config, said in (({}, "no number of experts"), ({"num_experts": 8}, "how many blocks"), ({"num_experts": -1}, "whole")):
        with pytest.raises(TraceFormatError, match=said):
            load_trace(write_answers(tmp_path, *lines, config=config))
    (tmp_path / "config.json").unlink()
    with pytest.raises(TraceFormatError, match=r"config.json beside"):
        load_trace(tmp_path / "answers.json")


def test_rows_are_held_against_the_tokens(tmp_path):
    _, one, _ = server_answers()
    apart, whole = vllm_line(one, 4, 4, apart=True), vllm_line(one, 4, 4, apart=False)
    generated = apart["choices"][0]["routed_experts"]
    flat = {"routed_experts": generated, "prompt_tokens": 4}
    for wrong, said in (
        (apart | {"prompt_routed_experts": None}, "lacks the prompt's rows"),
        (apart | {"prompt_routed_experts": one[:3].tolist()}, "than the prompt has tokens"),
        (apart | {"choices": [{"routed_experts": generated[:-1]}]}, "than tokens were generated"),
        (apart | {"choices": [{"routed_experts": one.tolist()}], "prompt_routed_experts": one[1:5].tolist()}, "were generated"),
        (whole | {"choices": [{"routed_experts": one[:5].tolist()}]}, "than there are tokens"),
        (flat | {"prompt_tokens": 5}, "prompt.s may be missing"),
        (flat | {"completion_tokens": 4}, "lacks the prompt's rows"),
        (
            apart | {"choices": apart["choices"] * 2, "usage": {"prompt_tokens": 4, "completion_tokens": 4}},
            "choices have other rows",
        ),
    ):
        with pytest.raises(TraceValueError, match=said):
            load_trace(write_answers(tmp_path, wrong))
    claimed = base64.b64encode(npy_claiming((10**12, 2, 2))).decode()
    for wrong, said in (
        (whole | {"usage": None}, "cannot be told"),
        (apart | {"choices": [{"routed_experts": None}]}, "no routed_experts"),
        (apart | {"choices": [{"routed_experts": claimed}]}, "its own header"),
        (apart | {"choices": []}, "choices"),
        (apart | {"choices": [{"routed_experts": one[4:, :1].tolist()}]}, "different shapes"),
        ({"choices": 3}, "choices"),
        ({"meta_info": {}}, "has none"),
        (flat | {"prompt_tokens": -1}, "whole number"),
        ({"routed_experts": [[[1.5, 2]]]}, "fit the shape"),
        ({"text": "routed_experts"}, "has none"),
    ):
        with pytest.raises(TraceFormatError, match=said):
            load_trace(write_answers(tmp_path, apart, wrong, config={"num_experts": 8}))
    with pytest.raises(TraceMismatchError, match="different models"):
        load_trace(write_answers(tmp_path, apart, whole | {"model": "other"}))


def npy_claiming(sizes):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": sizes})
    return file.getvalue() + b"\0" * 16


def test_prompts_apart_in_memory():
    trace, one, two = server_answers()
    read = from_routed_experts([one[4:], two[4:]], num_experts=8, prompts=[one[:4], two])
    assert np.array_equal(read.expert_ids, trace.expert_ids)
    assert read.phase.tolist() == [0] * 4 + [1] * 3 + [0] * 4
    for prompts, more in (([one[:4]], {}), ([one[:4], two[0]], {}), ([one[:4], two], {"prompt_tokens": [4, 3]})):
        with pytest.raises(TraceValueError, match="do not fit"):
            from_routed_experts([one[4:], two[4:]], num_experts=8, prompts=prompts, **more)
    with pytest.raises(TraceMismatchError):
        from_routed_experts([one[4:]], num_experts=8, prompts=[one[:4, :1]])
    with pytest.raises(TraceValueError, match=r"prompt_tokens do not fit.*prompts"):
        from_routed_experts([one[4:]], num_experts=8, prompt_tokens=[4])
