"""Checks who includes whom: the layers of docs/ARCHITECTURE.md, one row per folder.

A quoted include must start with one of the prefixes of its folder's row, or name a file of the same folder; angle
brackets are free on the host and forbidden in device code. Exit status 1 with one line per violation.
"""

import re
import sys
from pathlib import Path

PUBLIC = "bitsandbytes.h"
KERNEL = (
    "core/args.h",
    "core/half.h",
    "core/optim_plan.h",
    "core/plan_gemm4.h",
    "core/random.h",
    "core/rules.h",
    "core/scale.h",
)
SHARED = (*KERNEL, "core/internal.h", "core/plan_gemm8.h")

# The first row whose folder holds the file decides.
ROWS = (
    ("src/cpu/kernels", (*KERNEL, "cpu/kernels/")),
    ("src/cuda/kernels", (*KERNEL, "cuda/kernels/", "tables.cuh")),  # tables.cuh is made by the build
    ("src/cpu", (PUBLIC, *SHARED, "cpu/")),
    ("src/cuda", (PUBLIC, *SHARED, "cuda/")),
    ("src/torch", (PUBLIC, "torch/")),
    ("src/clients", (PUBLIC, "clients/")),
    ("src/cli", (PUBLIC, "cli/")),
    ("src/core", (PUBLIC, "core/")),
    ("tools", (PUBLIC, *SHARED, "cuda/kernels/cells.h")),
    ("examples", (PUBLIC,)),
    ("include", ()),
)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)


def violations(root):
    """Yields "file: what is wrong" for every include that its folder's row does not allow."""
    for folder, allowed in ROWS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in {".c", ".h", ".cu", ".cuh"}:
                continue
            name = path.relative_to(root).as_posix()
            if next(row for row, _ in ROWS if name.startswith(row + "/")) != folder:
                continue
            for bracket, target in INCLUDE.findall(path.read_text()):
                if bracket == "<":
                    if folder == "src/cuda/kernels":
                        yield f"{name}: <{target}>: device code includes no system header"
                elif not (path.parent / target).is_file() and not target.startswith(tuple(allowed)):
                    row = ", ".join(allowed) or "nothing"
                    yield f'{name}: "{target}": {folder} may include its own files and {row}'


def main():
    root = Path(__file__).resolve().parent.parent
    found = list(violations(root))
    print("\n".join(found) or "includes: every file stays within its layer")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
