"""Says why a file would not run as the handler on the Functions host's Linux images, or nothing if it would.

It reads the file's own words (ELF) and needs no tool, so that it works where the package is made: Linux, macOS, Windows.
Run with a machine, the newest glibc that is allowed, and file names, it says for each what it is.
"""

import re
import struct
import sys

MACHINES = {"x86_64": 62, "aarch64": 183}
LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
# glibc's own family, and what every image has since .NET, on which the host stands, needs it.
LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1"}
LIBRARIES |= {loader.rsplit("/", 1)[1] for loader in LOADERS.values()}

EXECUTABLE, POSITION_INDEPENDENT = 2, 3  # e_type
LOAD, DYNAMIC, INTERPRETER = 1, 2, 3  # program headers
NEEDED, STRING_TABLE, RPATH, RUNPATH, VERSIONS, VERSION_COUNT = 1, 5, 15, 29, 0x6FFFFFFE, 0x6FFFFFFF  # dynamic entries


class Refused(Exception):
    """The reason, for a person."""


def check(data, arch, newest_glibc):
    """Returns what it is, in a few words; raises Refused. `newest_glibc` is a version, as in (2, 28)."""
    if data[:4] != b"\x7fELF":
        kinds = {b"#!": "a script", b"MZ": "a Windows program", b"\xcf\xfa\xed\xfe": "a macOS program"}
        kind = next((kind for start, kind in kinds.items() if data.startswith(start)), "no program")
        raise Refused(f"it is {kind}, not a Linux one (ELF)")
    try:
        return _check(data, arch, newest_glibc)
    except (struct.error, IndexError, ValueError):
        raise Refused("it is cut off or damaged") from None


def _check(data, arch, newest_glibc):
    if data[4:6] != b"\x02\x01":
        raise Refused("it is not a 64-bit little-endian program")
    kind, machine, _, entry, table = struct.unpack_from("<HHIQQ", data, 16)
    size, count = struct.unpack_from("<HH", data, 54)
    if machine != MACHINES[arch]:
        name = next((name for name, number in MACHINES.items() if number == machine), f"ELF machine {machine}")
        raise Refused(f"it is made for {name}, not for {arch}")
    if kind not in (EXECUTABLE, POSITION_INDEPENDENT) or entry == 0:
        raise Refused("it is a library or an object file, not a program")
    segments = [struct.unpack_from("<IIQQQQ", data, table + size * n) for n in range(count)]
    if any(offset + length > len(data) for _, _, offset, _, _, length in segments) or not segments:
        raise Refused("it is cut off or damaged")

    loads = [segment for segment in segments if segment[0] == LOAD]
    part = {segment[0]: data[segment[2] : segment[2] + segment[5]] for segment in segments}
    entries = list(struct.iter_unpack("<QQ", part.get(DYNAMIC, b"")))
    single = dict(reversed(entries))  # the first of each

    def place(address):
        start = next((s for s in loads if s[3] <= address < s[3] + s[5]), None)
        if start is None:
            raise ValueError(address)
        return address - start[3] + start[2]

    def text(offset):
        start = place(single[STRING_TABLE]) + offset
        return data[start : data.index(b"\0", start)].decode("ascii")

    needed = [text(value) for tag, value in entries if tag == NEEDED]
    loader = part.get(INTERPRETER, b"").rstrip(b"\0").decode("ascii")
    if not loader and not needed:
        return "static"

    if loader != LOADERS[arch]:
        raise Refused(f"its loader is '{loader}', not glibc's {LOADERS[arch]}")
    foreign = sorted(set(needed) - LIBRARIES)
    if foreign:
        raise Refused(f"it needs libraries that the images may not have: {', '.join(foreign)}")
    if RPATH in single or RUNPATH in single:
        raise Refused("it looks for libraries in folders of its own (RPATH)")
    highest = (0,)
    for name in _versions(data, single, place, text):
        if not name.startswith("GLIBC_"):
            continue  # GCC_…: of libgcc_s, the same since 2002
        number = name.removeprefix("GLIBC_")
        # GLIBC_PRIVATE and GLIBC_ABI_… are no numbers: promises of one build, or of new versions only.
        if not re.fullmatch(r"\d+(\.\d+)+", number) or _version(number) > newest_glibc:
            raise Refused(f"it needs {name}, and may need no newer glibc than {'.'.join(map(str, newest_glibc))}")
        highest = max(highest, _version(number))
    return f"needs glibc {'.'.join(map(str, highest))} or newer"


def _versions(data, single, place, text):
    """The names of all symbol versions that it asks of its libraries."""
    if VERSIONS not in single:
        return
    library = place(single[VERSIONS])
    for _ in range(single[VERSION_COUNT]):
        _, count, _, first, following = struct.unpack_from("<HHIII", data, library)
        symbol = library + first
        for _ in range(count):
            _, _, _, name, step = struct.unpack_from("<IHHII", data, symbol)
            yield text(name)
            symbol += step
        library += following


def _version(text):
    return tuple(int(number) for number in text.split("."))


def main(arch, glibc, names):
    refused = False
    for name in names:
        with open(name, "rb") as file:
            try:
                print(f"{name}: {check(file.read(), arch, _version(glibc))}")
            except Refused as reason:
                refused = True
                print(f"{name}: {reason}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
