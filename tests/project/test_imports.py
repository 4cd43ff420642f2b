"""What an import costs: the light half of the project never loads the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numba", "pyarrow", "plotly", "sklearn", "matplotlib")
CASES = {
    "import swapless": HEAVY,
    "from swapless.cli.main import app; app(['--help'], standalone_mode=False)": HEAVY,
    "from swapless.cli.main import app; app(['run', '--help'], standalone_mode=False)": HEAVY,
    "from swapless.cli.main import app; app(['--version'], standalone_mode=False)": HEAVY,
    "import swapless.trace, swapless.locality, swapless.cache": ("torch", "transformers"),
    "import swapless.embedded": HEAVY,
}


@pytest.mark.parametrize("statement", CASES)
def test_light_imports_stay_light(statement):
    listed = f"print('loaded:', *(name for name in {CASES[statement]!r} if name in sys.modules), file=sys.stderr)"
    probe = f"import sys\n{statement}\n{listed}"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].strip() == "loaded:"
