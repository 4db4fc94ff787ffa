"""The one native file: what it asks the system for, what it exports, and that the installed package holds it.

The dynamic section is read by tools/elf.py, so no binutils are needed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"libc.so.6", "libm.so.6", "libdl.so.2", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def tool(name):
    """A module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


elf = tool("elf")


@pytest.fixture(scope="module")
def library():
    """The path of the library under test: the installed one, or the one that BNB_LIBRARY names."""
    package = Path(importlib.util.find_spec("bitsandbytes").origin).parent
    return Path(os.environ.get("BNB_LIBRARY") or package / "libbitsandbytes.so")


def test_needs_nothing_but_libc_libm_libdl(library):
    needed = elf.dynamic_entries(library, {elf.DT_NEEDED})
    assert "libc.so.6" in needed
    assert set(needed) <= ALLOWED


def test_has_no_search_path(library):
    assert elf.dynamic_entries(library, {elf.DT_RPATH, elf.DT_RUNPATH}) == []


def test_exports_the_header_and_the_entry_for_torch(library, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "tools")
    headers = ROOT / "include" / "bitsandbytes.h", ROOT / "src" / "clients" / "ctypes.h"
    status = tool("check_symbols").main(library, *headers)
    assert status == 0, capsys.readouterr().out


def test_the_reader_sees_other_libraries():
    """Against a reader that finds nothing: some module of this interpreter or of torch asks for more than libc."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    needed = {name for path in folder.glob("libtorch*.so") for name in elf.dynamic_entries(path, {elf.DT_NEEDED})}
    assert needed - ALLOWED


def test_the_reader_refuses_what_is_not_elf(tmp_path):
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(ValueError, match=r"text\.so: expected a 64-bit little-endian ELF file"):
        elf.sections(path)


def test_import_loads_no_second_openmp():
    """The library starts no thread and brings no runtime: importing the package maps no libgomp that torch has not."""
    code = (
        "import re, torch\n"
        "maps = lambda: set(re.findall(r'\\S+/lib(?:gomp|omp|iomp5)\\S*', open('/proc/self/maps').read()))\n"
        "before = maps()\n"
        "import bitsandbytes\n"
        "print(sorted(maps() - before))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == "[]", out.stderr
