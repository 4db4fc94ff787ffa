"""Checks the sources as text: no file over 500 lines, no absolute path of somebody's machine, nothing left for later.

Exit status 1 with one line per violation.
"""

import re
import sys
from pathlib import Path

MAX_LINES = 500
LIMITED = {".c", ".h", ".cu", ".cuh", ".py"}
TEXT = LIMITED | {".md", ".txt", ".toml", ".in", ".sh", ".yml", ".yaml", ""}
SKIPPED = {".git", "build", "dist", "__pycache__"}
MACHINE_PATH = re.compile(r"(?<![\w./$}*])/(?:home|root|work|opt|tmp|Users)/[\w.]")
LEFT = re.compile(r"\b(?:TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b")


def files(root):
    """Every text file of the tree, build products and tool caches left out."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if SKIPPED.intersection(parts) or any(part.startswith(".") and part != ".ci" for part in parts[:-1]):
            continue
        if path.is_file() and path.suffix in TEXT:
            yield path


def violations(root):
    """Yields "file:line: what is wrong"."""
    for path in files(root):
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # a corpus file of a fuzz target
        name = path.relative_to(root).as_posix()
        if path.suffix in LIMITED and len(lines) > MAX_LINES:
            yield f"{name}: {len(lines)} lines, expected at most {MAX_LINES}"
        for number, line in enumerate(lines, 1):
            if MACHINE_PATH.search(line):
                yield f"{name}:{number}: a path of one machine: {line.strip()}"
            if LEFT.search(line):
                yield f"{name}:{number}: left for later: {line.strip()}"


def main():
    root = Path(__file__).resolve().parent.parent
    found = list(violations(root))
    print("\n".join(found) or f"tree: {sum(1 for _ in files(root))} files, none over {MAX_LINES} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
