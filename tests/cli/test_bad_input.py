"""Bad input: each kind has its own typed error that says what, where and what next; no traceback, no text taken for whole.

Every case runs twice: in the library, for the type of the error, and on the command line, for its exit code and message.
"""

from __future__ import annotations

import json
import os
import struct

import pytest

from swapless import errors, load

RUN = ("--prompt", "Once upon a time", "--threads", 1, "--max-new-tokens", 40)


@pytest.fixture
def refused(swapless):
    """Load and run what cannot work; check the type, the exit code, and that nothing but the message comes out."""

    def check(folder, kind: type, *words: str, arguments=("--resident", "25%")):
        named = {"memory" if option == "--memory" else "resident": value for option, value in [arguments]}
        with pytest.raises(kind) as caught:
            load(folder, **named)
        assert type(caught.value) is kind
        done = swapless("run", folder, *arguments, *RUN)
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr
        for word in words:
            assert word in done.stderr, done.stderr
        return done

    return check


def _rewrite_header(path, change) -> None:
    """Change the JSON header of a safetensors file and leave its data as they are."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.slow
def test_a_sharded_checkpoint_works_to_begin_with(sharded, checkpoint, swapless):
    whole, parts = (swapless("run", path, "--resident", "25%", *RUN, "-q") for path in (checkpoint, sharded))
    assert parts.exit_code == 0, parts.stderr
    assert parts.stdout == whole.stdout


def test_a_missing_shard(sharded, refused):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, errors.CheckpointMissingError, "model-00002-of-00003.safetensors", "model.safetensors.index.json")


def test_an_index_that_names_a_file_that_never_was(sharded, refused):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "elsewhere.safetensors"
    index.write_text(json.dumps(content))
    refused(sharded, errors.CheckpointMissingError, "elsewhere.safetensors")


def test_an_index_that_is_no_json(sharded, refused):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {')
    refused(sharded, errors.CheckpointCorruptError, "model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 4, 300, 0.5, -1])
def test_a_truncated_shard(copy, refused, keep):
    shard = copy / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, int(size * keep) if isinstance(keep, float) else keep if keep >= 0 else size + keep)
    refused(copy, errors.CheckpointCorruptError, "model.safetensors", "again")


def test_a_shard_with_a_mad_header_length(copy, refused):
    shard = copy / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[:8] = struct.pack("<Q", 2**63)
    shard.write_bytes(raw)
    refused(copy, errors.CheckpointCorruptError, "model.safetensors")


def test_experts_of_a_wrong_dtype(copy, refused):
    def as_int16(header):
        for key, entry in header.items():
            if ".experts." in key:
                entry["dtype"] = "I16"

    _rewrite_header(copy / "model.safetensors", as_int16)
    refused(copy, errors.CheckpointCorruptError, "I16")


def test_a_dtype_that_does_not_fit_the_bytes(copy, refused):
    def as_f32(header):
        next(entry for key, entry in header.items() if ".experts." in key)["dtype"] = "F32"

    _rewrite_header(copy / "model.safetensors", as_f32)
    refused(copy, errors.CheckpointCorruptError, "F32")


def test_an_expert_that_is_not_there(copy, refused):
    def without_one(header):
        del header[next(key for key in header if ".experts." in key)]

    _rewrite_header(copy / "model.safetensors", without_one)
    done = refused(copy, errors.CheckpointCorruptError)
    assert "expert" in done.stderr


def test_a_weight_that_is_not_there(copy, refused):
    from safetensors.torch import load_file, save_file

    tensors = {key: value.clone() for key, value in load_file(copy / "model.safetensors").items()}
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, errors.CheckpointCorruptError, "model.norm.weight")


def test_a_shard_with_a_hole(copy, refused):
    _rewrite_header(copy / "model.safetensors", lambda header: header.pop("model.norm.weight"))
    refused(copy, errors.CheckpointCorruptError, "model")


def test_a_budget_that_is_too_small(checkpoint, refused):
    refused(checkpoint, errors.BudgetError, "at least", "--memory", arguments=("--memory", "64MiB"))


def test_a_folder_that_is_not_there(tmp_path, refused):
    refused(tmp_path / "nowhere", errors.CheckpointMissingError, "nowhere")


def test_a_folder_without_weights(copy, refused):
    (copy / "model.safetensors").unlink()
    refused(copy, errors.CheckpointMissingError, "model.safetensors")


def test_a_folder_without_a_configuration(copy, refused):
    (copy / "config.json").unlink()
    refused(copy, errors.CheckpointMissingError, "config.json")


def test_a_file_in_place_of_a_folder(copy, refused):
    refused(copy / "config.json", errors.CheckpointMissingError, "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind: root reads everything")
def test_a_folder_that_may_not_be_read(copy, refused):
    copy.chmod(0)
    try:
        refused(copy, errors.CheckpointMissingError, "ermission")
    finally:
        copy.chmod(0o755)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_cannot_be_opened(copy, refused, name):
    (copy / name).unlink()
    (copy / name).symlink_to(name)  # a loop, which not even root can open
    refused(copy, errors.CheckpointMissingError, name)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": 3}', "\x00"])
def test_a_configuration_that_makes_no_sense(copy, text, swapless):
    (copy / "config.json").write_text(text)
    with pytest.raises((errors.CheckpointError, errors.UnsupportedFamilyError)):
        load(copy, resident=0.25)
    done = swapless("info", copy)
    assert done.exit_code == 1 and done.stderr.startswith("Error: ")


def test_a_dense_model(copy, refused):
    settings = json.loads((copy / "config.json").read_text()) | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (copy / "config.json").write_text(json.dumps(settings))
    refused(copy, errors.UnsupportedFamilyError, "qwen3")


def test_a_quantised_checkpoint(copy, refused):
    settings = json.loads((copy / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (copy / "config.json").write_text(json.dumps(settings))
    refused(copy, errors.UnsupportedCheckpointError, "gptq")


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin"])
def test_weights_in_another_format(copy, refused, name):
    (copy / "model.safetensors").rename(copy / name)
    refused(copy, errors.UnsupportedCheckpointError, name.rpartition(".")[2])


def test_a_checkpoint_without_a_tokenizer(copy, swapless):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    done = swapless("run", copy, "--resident", "25%", *RUN)
    assert done.exit_code == 1 and "tokenizer" in done.stderr and done.stdout == ""


def test_an_unknown_policy(checkpoint):
    with pytest.raises(errors.UnknownNameError, match="Did you mean 'lru'"):
        load(checkpoint, resident=0.25, policy="lur")


def test_a_prompt_longer_than_the_context(checkpoint, swapless):
    done = swapless("run", checkpoint, "--resident", "25%", "--context", 4, *RUN[2:], "--prompt", "one two three four five six")
    assert done.exit_code == 1 and done.stdout == ""
    assert "context" in done.stderr and "4 tokens" in done.stderr


def test_a_context_longer_than_the_model_can_hold(checkpoint, swapless):
    done = swapless("run", checkpoint, "--resident", "25%", "--context", 10**7, *RUN)
    assert done.exit_code == 2 and "context" in done.stderr


@pytest.fixture
def disturbed(endless, tmp_path, monkeypatch, swapless):
    """Run with something happening to the shard after the tenth token."""
    import shutil

    from swapless.cli import session, stream

    folder = tmp_path / "model"
    shutil.copytree(endless, folder)

    def call(change, *arguments):
        class Disturbed(stream.TextStream):
            def put(self, value):
                super().put(value)
                if len(self.new_ids) == 10:
                    change(folder / "model.safetensors")

        monkeypatch.setattr(session, "TextStream", Disturbed)
        return swapless("run", folder, "--resident", "2%", *RUN, *arguments)

    return call


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shard: os.truncate(shard, 4096), "truncated"),
        (lambda shard: shard.unlink(), "unlinked"),
        (lambda shard: os.replace(shard.with_name("config.json"), shard), "replaced"),
    ],
    ids=["truncated", "unlinked", "replaced"],
)
def test_a_shard_that_changes_while_generating(disturbed, change, words):
    done = disturbed(change)
    assert done.exit_code == 1
    assert words in done.stderr and "Restore the file" in done.stderr
    assert "Traceback" not in done.stderr and "tok/s" not in done.stderr


def test_no_partial_document_when_a_read_fails(disturbed):
    done = disturbed(lambda shard: os.truncate(shard, 4096), "--json")
    assert done.exit_code == 1 and done.stdout == ""
    assert "truncated" in done.stderr
