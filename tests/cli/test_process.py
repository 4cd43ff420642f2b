"""The command as a process: Ctrl-C, a closed pipe, a traceback only on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "from swapless.cli.main import main; main()"]


@pytest.fixture
def start(endless):
    processes = []

    def begin(*arguments):
        process = subprocess.Popen(
            [*COMMAND, "run", endless, "--resident", "25%", "--threads", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


_LONG = ("--prompt", "The", "--max-new-tokens", "900")


@pytest.mark.slow
def test_ctrl_c_while_generating_leaves_nothing_running(start):
    process = start(*_LONG)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
def test_a_closed_pipe_is_no_crash(start):
    process = start(*_LONG)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert b"Traceback" not in process.stderr.read()


def test_a_traceback_only_on_request():
    arguments = [*COMMAND, "info", "./nowhere"]
    plain = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert plain.returncode == 1 and plain.stderr.startswith("Error: ") and plain.stderr.count("\n") == 1
    debug = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ | {"SWAPLESS_DEBUG": "1"})
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "CheckpointMissingError" in debug.stderr


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_fits_and_scores_sleep_while_they_wait(given, policy, tmp_path):
    look = "import atexit, os, sys; atexit.register(lambda: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules))"
    command = [sys.executable, "-c", f"{look}; from swapless.cli.main import main; main()"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run(
        [*command, "predict", "eval", "frequency", str(tmp_path / "none.parquet")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode in (1, 2) and done.stdout.split() == [policy, "False"]
