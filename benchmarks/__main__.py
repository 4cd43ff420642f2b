"""Run the benchmarks one after the other, never two at a time.

    python -m benchmarks              # all of them
    python -m benchmarks offload      # only those named

Each is a script of its own, whose first lines say what it measures; each stores its result under ``benchmarks/results/``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ALL = ("offload", "replay", "locality")


def main() -> int:
    """Run what was named, or all; the exit code is that of the first that failed."""
    present = [name for name in ALL if (FOLDER / f"{name}.py").exists()]
    wanted = sys.argv[1:] or present
    unknown = [name for name in wanted if name not in present]
    if unknown:
        print(f"No benchmark called {', '.join(unknown)}. There are: {', '.join(present)}.", file=sys.stderr)
        return 2
    codes = []
    for name in wanted:
        print(f"== {name}", file=sys.stderr)
        codes.append(subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], stdout=subprocess.DEVNULL).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
