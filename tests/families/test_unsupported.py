"""Families that do not come through the door: each is refused by name, with what it would need, and never loaded in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import swapless
from swapless.errors import UnsupportedFamilyError
from swapless.runtime.families import NEEDS

TYPES = ["llama4", "llama4_text", "dbrx", "jetmoe", "longcat_flash", "step3p7", "switch_transformers", "nllb-moe", "doge"]


def checkpoint(folder: Path, model_type: str) -> Path:
    """A folder whose configuration is of ``model_type`` and whose weights never get looked at."""
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[model_type]().save_pretrained(folder)
    save_file({"some.weight": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("model_type", TYPES)
def test_a_family_without_a_door_says_what_it_would_need(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError) as caught:
        swapless.load(checkpoint(tmp_path, model_type), resident=1.0)
    assert repr(model_type) in str(caught.value)
    assert NEEDS[model_type] in str(caught.value)


def test_a_dense_model_is_never_loaded_in_full(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"No experts module.*'llama'.*transformers itself"):
        swapless.load(checkpoint(tmp_path, "llama"), resident=1.0)


def test_a_model_without_a_language_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFamilyError, match="no language model class for 'vit'"):
        swapless.load(checkpoint(tmp_path, "vit"), resident=1.0)


def test_experts_that_cannot_be_cut_out_one_by_one(tmp_path: Path) -> None:
    from tests.families.tiny import Family, tiny_model

    tiny_model(Family(name="ernie4_5_vl_moe", flags="")).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamilyError, match="cannot be cut out"):
        swapless.load(tmp_path, resident=0.5)
