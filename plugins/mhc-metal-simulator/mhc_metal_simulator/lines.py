"""The source line of an address in a compiled kernel, from ELF sections and DWARF 5 line tables."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["line_of"]


def line_of(library: Path, address: int, file: str) -> int | None:
    """Return the line of ``file`` that holds ``address``, or None if it is not known.

    ``address`` is a return address, so the call is the instruction before it. Code inlined from
    other files (the shim) counts as the last line of ``file`` before it.
    """
    if address == 0:
        return None
    try:
        sections = _sections(library.read_bytes())
        table = sections[".debug_line"]
        names = sections.get(".debug_line_str", b"")
        rows = list(_rows(table, names, file))
    except (KeyError, ValueError, IndexError, struct.error):
        return None
    best: int | None = None
    for start, end, line in rows:
        if start <= address - 1 < end:
            best = line
    return best


def _sections(image: bytes) -> dict[str, bytes]:
    if image[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    table, size, count, names = (
        struct.unpack_from("<Q", image, 40)[0],
        *struct.unpack_from("<HHH", image, 58),
    )
    headers = [struct.unpack_from("<IIQQQQ", image, table + i * size) for i in range(count)]
    strings = image[headers[names][4] :]
    out: dict[str, bytes] = {}
    for name, _, _, _, offset, length in headers:
        out[_text(strings, name)] = image[offset : offset + length]
    return out


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


@dataclass
class _Reader:
    data: bytes
    at: int = 0

    def take(self, layout: str) -> int:
        value = struct.unpack_from("<" + layout, self.data, self.at)[0]
        self.at += struct.calcsize("<" + layout)
        return value

    def uleb(self) -> int:
        value = shift = 0
        while True:
            byte = self.take("B")
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def sleb(self) -> int:
        start = self.at
        value = self.uleb()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) & 1 else value


def _rows(table: bytes, names: bytes, file: str) -> Iterator[tuple[int, int, int]]:
    """Yield (start, end, line) for each stretch of code that comes from ``file``."""
    reader = _Reader(table)
    while reader.at < len(table):
        length = reader.take("I")
        end = reader.at + length
        unit = _Reader(table[:end], reader.at)
        if unit.take("H") == 5:
            yield from _unit_rows(unit, names, file)
        reader.at = end


@dataclass
class _Header:
    least: int
    base: int
    spread: int
    first_special: int
    lengths: list[int]
    files: list[str]


def _header(unit: _Reader, names: bytes) -> _Header:
    unit.at += 2  # sizes of addresses and segment selectors
    program = unit.take("I")
    program += unit.at
    least = unit.take("B")
    unit.at += 2  # operations per instruction, default of is_stmt
    base, spread, first_special = unit.take("b"), unit.take("B"), unit.take("B")
    lengths = [unit.take("B") for _ in range(first_special - 1)]
    _entries(unit, names)
    files = _entries(unit, names)
    unit.at = program
    return _Header(least, base, spread, first_special, lengths, files)


def _entries(unit: _Reader, names: bytes) -> list[str]:
    """Read a table of directories or files, of which only the paths matter."""
    formats = [(unit.uleb(), unit.uleb()) for _ in range(unit.take("B"))]
    return [_entry(unit, names, formats) for _ in range(unit.uleb())]


def _entry(unit: _Reader, names: bytes, formats: list[tuple[int, int]]) -> str:
    path = ""
    for content, form in formats:
        if form == 0x1F:  # DW_FORM_line_strp
            text = _text(names, unit.take("I"))
            path = text if content == 1 else path
        elif form == 0x0B:  # DW_FORM_udata is 0x0f, data1 0x0b, data16 0x1e
            unit.take("B")
        elif form == 0x0F:
            unit.uleb()
        elif form == 0x1E:
            unit.at += 16
        else:
            raise ValueError(f"form {form:#x} in a line table")
    return path


def _unit_rows(unit: _Reader, names: bytes, file: str) -> Iterator[tuple[int, int, int]]:
    header = _header(unit, names)
    address, index, line = 0, 1, 1
    last: tuple[int, int] | None = None  # where the current stretch starts, and its line
    while unit.at < len(unit.data):
        code = unit.take("B")
        row = ended = False
        if code >= header.first_special:
            step = code - header.first_special
            address += step // header.spread * header.least
            line += header.base + step % header.spread
            row = True
        elif code == 0:
            size = unit.uleb()
            after = unit.at + size
            operation = unit.take("B")
            if operation == 1:
                row = ended = True
            elif operation == 2:
                address = unit.take("Q")
            unit.at = after
        elif code == 1:
            row = True
        elif code == 2:
            address += unit.uleb() * header.least
        elif code == 3:
            line += unit.sleb()
        elif code == 4:
            index = unit.uleb()
        elif code == 8:
            address += (255 - header.first_special) // header.spread * header.least
        elif code == 9:
            address += unit.take("H")
        else:
            for _ in range(header.lengths[code - 1]):
                unit.uleb()
        if row:
            if last is not None and address > last[0]:
                yield last[0], address, last[1]
            ours = header.files[index].endswith(file) and line > 0
            last = (address, line) if ours else (address, last[1]) if last else None
            if ended:
                address, index, line, last = 0, 1, 1, None
