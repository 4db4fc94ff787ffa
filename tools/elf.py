"""The little of ELF that the checks need: which libraries a shared object asks for, and which symbols it exports.

Reads 64-bit little-endian files (x86-64, aarch64) through their section headers. Source: the ELF-64 object file format.
"""

import struct
from pathlib import Path
from typing import NamedTuple

SHT_STRTAB, SHT_DYNAMIC, SHT_DYNSYM = 3, 6, 11
DT_NULL, DT_NEEDED, DT_RPATH, DT_RUNPATH = 0, 1, 15, 29
STB_LOCAL, SHN_UNDEF = 0, 0


class Section(NamedTuple):
    """One row of the section header table; data are the section's bytes."""

    kind: int
    link: int
    data: bytes


def sections(path):
    """All sections of the file, in the order of the table. ValueError if it is no 64-bit little-endian ELF file."""
    image = Path(path).read_bytes()
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path}: expected a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    found = []
    for i in range(count):
        _, kind, _, _, offset, length, link, _, _, _ = struct.unpack_from("<IIQQQQIIQQ", image, table + i * size)
        found.append(Section(kind, link, image[offset : offset + length]))
    return found


def _string(data, offset):
    return data[offset : data.index(b"\0", offset)].decode()


def dynamic_entries(path, tags):
    """The strings of the dynamic section under any of `tags` (DT_NEEDED, DT_RUNPATH ...), in file order."""
    table = sections(path)
    strings = []
    for section in table:
        if section.kind != SHT_DYNAMIC:
            continue
        for tag, value in struct.iter_unpack("<qQ", section.data):
            if tag == DT_NULL:
                break
            if tag in tags:
                strings.append(_string(table[section.link].data, value))
    return strings


def exported_symbols(path):
    """The names of all defined global and weak symbols of the dynamic symbol table, sorted."""
    table = sections(path)
    names = set()
    for section in table:
        if section.kind != SHT_DYNSYM:
            continue
        for name, info, _, index, _, _ in struct.iter_unpack("<IBBHQQ", section.data):
            if info >> 4 != STB_LOCAL and index != SHN_UNDEF:
                names.add(_string(table[section.link].data, name))
    return sorted(names)
