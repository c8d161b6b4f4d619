"""What a wheel holds, read from the file: nothing of it is unpacked to disk, imported or run.

The native module is an ELF file. Its section .nv_fatbin holds one fat binary for each CUDA source:
a header, then the code for each architecture under a header of its own (read off what nvcc 13
writes; the tests compare with what nvcc was asked for).
"""

import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MODULE_BYTES = 2 << 30  # most that is read of one module
FATBIN_MAGIC = 0xBA55ED50
KIND_PTX, KIND_CODE = 1, 2
FLAG_ONE_ARCHITECTURE, FLAG_FAMILY = 0x100000, 0x200000  # 90a, 100f
UNWANTED_LIBRARY = re.compile(r"lib(torch|c10|cuda|cudart|nvidia)[_.\-]")
# Names of torch (mangled), of the driver and of the CUDA runtime, which is to be inside.
UNWANTED_SYMBOL = re.compile(r"_Z(T[ISV])?NK?(3c10|2at|5torch)|THP|_*cu(da)?[A-Z]")


@dataclass(frozen=True)
class Module:
    """One native module: architectures of CUDA code ("90a", or "120 PTX"), the libraries that
    loading it needs, and what it takes from torch or the driver (libraries or symbols)."""

    name: str
    size: int
    architectures: tuple[str, ...]
    libraries: tuple[str, ...]
    unwanted: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.name}, {self.size / 2**20:.1f} MiB",
                f"  cuda code for     {', '.join(self.architectures) or 'nothing'}",
                f"  needs when loaded {', '.join(self.libraries) or 'nothing'}",
                f"  of torch or the driver: {', '.join(self.unwanted) or 'nothing'}",
            ]
        )


def modules(wheel: str | Path) -> list[Module]:
    """The native modules of a wheel.

    Raises:
        ValueError: not a wheel, or a module that is no ELF file or is cut short.
        OSError: the file cannot be read.
    """
    if not zipfile.is_zipfile(wheel):
        if not Path(wheel).is_file():
            raise ValueError(f"{wheel}: no such file")
        raise ValueError(f"{wheel}: expected a wheel, which is a zip file")
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if PurePosixPath(entry.filename).suffix == ".so":
                if entry.file_size > MODULE_BYTES:
                    raise ValueError(f"{wheel}: {entry.filename} is over {MODULE_BYTES >> 30} GiB")
                found.append(module(entry.filename, archive.read(entry)))
    return found


def module(name: str, data: bytes) -> Module:
    """One native module from its bytes; raises as `modules`."""
    try:
        sections = dict(_sections(data))
        libraries = tuple(_libraries(sections))
        symbols = set(_undefined_symbols(sections))
        architectures = set(_architectures(sections.get(".nv_fatbin", b"")))
    except (struct.error, ValueError) as error:
        raise ValueError(f"{name}: expected a whole 64-bit ELF file: {error}") from error
    unwanted = [x for x in libraries if UNWANTED_LIBRARY.match(x)]
    unwanted += sorted(x for x in symbols if UNWANTED_SYMBOL.match(x))
    by_number = sorted(architectures, key=lambda arch: (int(re.findall(r"\d+", arch)[0]), arch))
    return Module(name, len(data), tuple(by_number), libraries, tuple(unwanted))


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it does not begin as one")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = headers[names_at]
    for header in headers:
        offset, length = header[4:6]
        name = _text(data, names[4] + header[0])
        if header[1] != 8:  # SHT_NOBITS: nothing of it is in the file
            if offset + length > len(data):
                raise ValueError(f"{name} is cut short")
            yield name, data[offset : offset + length]


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _libraries(sections: dict[str, bytes]) -> Iterator[str]:
    for tag, value in struct.iter_unpack("<QQ", sections.get(".dynamic", b"")):
        if tag == 1:  # DT_NEEDED
            yield _text(sections[".dynstr"], value)


def _undefined_symbols(sections: dict[str, bytes]) -> Iterator[str]:
    for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", sections.get(".dynsym", b"")):
        if section == 0 and name:
            yield _text(sections[".dynstr"], name)


def _architectures(fatbins: bytes) -> Iterator[str]:
    at = 0
    while at + 16 <= len(fatbins):
        magic, _, header, size = struct.unpack_from("<IHHQ", fatbins, at)
        if magic != FATBIN_MAGIC:  # padding
            at += 8
            continue
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, header, size = struct.unpack_from("<HHIQ", fatbins, entry)
            (number,) = struct.unpack_from("<I", fatbins, entry + 28)
            (flags,) = struct.unpack_from("<Q", fatbins, entry + 40)
            suffix = "a" if flags & FLAG_ONE_ARCHITECTURE else "f" if flags & FLAG_FAMILY else ""
            if kind in (KIND_PTX, KIND_CODE):
                yield f"{number}{suffix}" + (" PTX" if kind == KIND_PTX else "")
            if header + size == 0:
                raise ValueError("a fat binary without an end")
            entry += header + size
