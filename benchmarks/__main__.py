"""Run the benchmarks one after the other, never two at a time.

    python -m benchmarks                          # all that need nothing from outside the repository
    python -m benchmarks --data DIR               # those on the handed traces too
    python -m benchmarks offload timeline         # only those named

Each is a script of its own, whose first lines say what it measures; each stores its result under ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ALONE = ("offload", "exactness", "lookahead", "timeline", "locality", "expert_kernels", "direct_reads", "pack")
ON_DATA = ("replay", "policies")


def main() -> int:
    """Run what was named, or all; the exit code is that of the first that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run the benchmarks one after the other.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALONE + ON_DATA))
    parser.add_argument("--data", type=Path, help=f"folder of the handed data, for {' and '.join(ON_DATA)}")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {*ALONE, *ON_DATA}:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}. There are: {', '.join(ALONE + ON_DATA)}.")
    names = asked.names or [*ALONE, *(ON_DATA if asked.data else ())]
    if asked.data is None and set(names) & set(ON_DATA):
        parser.error(f"{', '.join(sorted(set(names) & set(ON_DATA)))}: --data DIR is needed.")
    codes = []
    for name in names:
        print(f"== {name}", file=sys.stderr)
        command = [sys.executable, str(FOLDER / f"{name}.py")] + (["--data", str(asked.data)] if name in ON_DATA else [])
        codes.append(subprocess.run(command, stdout=subprocess.DEVNULL).returncode)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
