"""What the package shows of itself: its names, its help, the command as a module, completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NAMES = {"load", "plan", "pack", "record", "read_trace", "write_trace", "Trace", "TraceHeader", "errors", "SwaplessError"}


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_names_and_their_help_come_without_torch():
    code = "import pydoc, sys, swapless; text = pydoc.plain(pydoc.render_doc(swapless)); print(dir(swapless)); print(text)"
    shown = _python(code + "; print([name for name in ('torch', 'transformers') if name in sys.modules])")
    names, help_text = shown.split("\n", 1)
    assert set(eval(names)) >= NAMES and not {"Any", "annotations", "import_module"} & set(eval(names))
    for name in NAMES:
        assert name in help_text
    assert "load(checkpoint, memory=None, **options)" in help_text and "plan(checkpoint, memory)" in help_text
    assert shown.splitlines()[-1] == "[]"


def test_the_functions_are_those_that_the_help_names(tmp_path):
    import swapless
    from swapless import embedded, errors
    from swapless.plan.whole import plan

    assert callable(swapless.plan) and swapless.plan.__name__ == "swapless.plan" and callable(plan)
    with pytest.raises(errors.UnitError):
        swapless.plan(embedded.path(), "8G")
    with pytest.raises(errors.CheckpointMissingError):
        swapless.load(tmp_path / "nowhere", resident=0.5)
    with pytest.raises(errors.UsageError):
        swapless.pack(embedded.path(), tmp_path / "packed", bits=3)
    with pytest.raises(errors.TraceMissingError):
        swapless.read_trace(tmp_path / "none")
    with swapless.load(embedded.path(), resident=1.0, context=64) as model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(embedded.path())
        rows = swapless.record(model, tokenizer, ["Once upon a time"], tmp_path / "t.parquet")
    trace = swapless.read_trace(tmp_path / "t.parquet")
    assert len(trace) == rows and isinstance(trace, swapless.Trace)
    swapless.write_trace(tmp_path / "again.parquet", trace)
    assert swapless.read_trace(tmp_path / "again.parquet").header == trace.header


def test_what_plug_ins_need_is_where_the_pages_say():
    import swapless.cache
    import swapless.predict

    assert {"Policy", "Residency", "may_go", "rules", "POLICIES"} <= set(dir(swapless.cache))
    assert {"Predictor", "Fitted", "known_layers", "quiet", "load_predictor", "save_predictor"} <= set(dir(swapless.predict))
    for package in (swapless.cache, swapless.predict):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError):
            package.no_such_name  # noqa: B018


def test_the_command_as_a_module():
    from swapless import __version__

    done = subprocess.run([sys.executable, "-m", "swapless", "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"swapless {__version__}\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "swapless", "info", "./nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("shell", "words", "number", "wanted"),
    [("bash", "swapless r", "1", {"run", "record"}), ("bash", "swapless run x --policy l", "4", {"lru", "lfu"})],
)
def test_the_shell_completes(shell, words, number, wanted):
    environment = os.environ | {"_SWAPLESS_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": number}
    code = "import sys; sys.argv[0] = 'swapless'; from swapless.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert wanted <= set(done.stdout.split()), (done.stdout, done.stderr)


def test_the_script_of_completion_can_be_shown():
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = "import sys; sys.argv[0] = 'swapless'; from swapless.cli.main import main; main()"
    command = [sys.executable, "-c", code, "--show-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0 and "_SWAPLESS_COMPLETE" in done.stdout, done.stderr
