"""Checks that a shared library exports what its headers declare, the entry point for torch, and nothing else.

Usage: check_symbols.py LIBRARY HEADER... Exit status 1 with one line per missing or extra symbol.
"""

import re
import sys
from pathlib import Path

from elf import exported_symbols

TORCH_ENTRY = {"bnb_torch_register", "bnb_torch_forget", "bnb_torch_ready"}


def declared(header):
    """The functions that the header marks BNB_API."""
    text = re.sub(r"/\*.*?\*/", "", Path(header).read_text(), flags=re.S)
    return set(re.findall(r"^BNB_API\b[^;()]*?\b(\w+)\s*\(", text, flags=re.M))


def main(library, *headers):
    wanted = TORCH_ENTRY.union(*map(declared, headers))
    found = set(exported_symbols(library))
    for name in sorted(wanted - found):
        print(f"{library}: {name} is declared in a header but not exported")
    for name in sorted(found - wanted):
        print(f"{library}: {name} is exported but not declared in {' or '.join(map(str, headers))}")
    if wanted != found:
        return 1
    print(f"symbols: {len(found)} exported, all declared")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
