"""Other processors, BLAS kernels and thread counts give the same bits: the same work in processes that compute in other ways.

A process takes other code paths by ``OPENBLAS_CORETYPE`` (numpy's products), ``NPY_DISABLE_CPU_FEATURES`` (its loops),
``GLIBC_TUNABLES`` (the C library's functions), ``NUMBA_CPU_NAME`` (our own compiled loops) and ``OMP_NUM_THREADS``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

from swapless.predict import make_predictor
from swapless.predict.saved import save_predictor
from tests.numeric.figures import BY_TORCH, OPTIONS, fit_and_score, measured, score, training_trace

ROOT = Path(__file__).resolve().parents[2]
WIDE = " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))
PLAIN_C = "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F,-FMA4"
MACHINES = {
    "haswell-1": {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "1"},
    "prescott-2": {
        "OPENBLAS_CORETYPE": "Prescott",
        "OMP_NUM_THREADS": "2",
        "NPY_DISABLE_CPU_FEATURES": WIDE,
        "GLIBC_TUNABLES": PLAIN_C,
    },
}
if __cpu_features__.get("AVX512F"):
    MACHINES["skylakex-1"] = {"OPENBLAS_CORETYPE": "SkylakeX", "OMP_NUM_THREADS": "1"}
SLOW = {
    "generic": {
        **MACHINES["prescott-2"],
        "OMP_NUM_THREADS": "1",
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
    "haswell-2": {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "avx2"},
}


def elsewhere(machine: dict[str, str], *arguments: object) -> dict[str, str]:
    """Figures of a process that computes as ``machine`` does."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-m", "tests.numeric.figures", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, **machine}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    return {**fit_and_score(folder), **measured()}


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_figure_is_the_same_on_another_machine(machine, here, tmp_path):
    there = elsewhere(MACHINES[machine], tmp_path)
    assert there.keys() == here.keys() and len(here) > 60
    assert not [name for name in here if there[name] != here[name]]


@pytest.mark.slow
@pytest.mark.parametrize("machine", [*MACHINES, *SLOW])
def test_a_predictor_trained_here_says_the_same_there(machine, here, tmp_path):
    expected = dict(here)
    for name in BY_TORCH:
        save_predictor(tmp_path / name, make_predictor(name, **OPTIONS.get(name, {})).fit(training_trace()))
    expected |= score(tmp_path, BY_TORCH)
    there = elsewhere({**MACHINES, **SLOW}[machine], tmp_path, tmp_path)
    assert not [name for name in expected if there[name] != expected[name]]
