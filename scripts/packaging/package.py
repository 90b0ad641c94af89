"""Checks a handler and packs it with the host's files: the part of scripts/package that comes after the build.

The package holds exactly host.json, each function folder's function.json, and the handler, executable, under the name
that host.json gives it. The same input makes the same bytes, wherever and by whomever it is packed.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import zipfile

import elf
import leaks
import trial

# The oldest moment that a zip file can name: the real times would make each package another one.
MOMENT = (1980, 1, 1, 0, 0, 0)


def main():
    options = arguments()
    root = pathlib.Path(__file__).resolve().parents[2]
    binary = pathlib.Path(options.binary)
    try:
        handler = binary.read_bytes()
        files = contents(root, handler)
        for name, (data, _) in files.items():
            for line, secret in leaks.find(data):
                raise Refused(f"{name} has a secret in line {line}: {secret}")
        kind = elf.check(handler, options.arch, tuple(int(part) for part in options.glibc.split(".")))
        ran = "not run: made for another machine"
        if trial.possible(options.arch):
            ran = trial.run(binary)
    except (elf.Refused, Refused, trial.Failed, OSError) as reason:
        sys.exit(f"{binary} is not packed: {reason}")

    suffix = "" if options.arch == "x86_64" else f"-{options.arch}"
    target = pathlib.Path(options.to) / f"handler{suffix}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, files)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{binary}: {len(handler) / 1e6:.1f} MB, {options.arch}, {kind}; {ran}")
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


class Refused(Exception):
    """The reason, for a person."""


def contents(root, handler):
    """Name → bytes and mode of everything in the package, in its order."""
    host = json.loads((root / "host.json").read_text("utf-8"))
    name = host["customHandler"]["description"]["defaultExecutablePath"]
    # Core Tools and the host compare it with the entry's name, character by character.
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", name):
        raise Refused(f"host.json's defaultExecutablePath '{name}' is no plain name")
    functions = sorted(path.relative_to(root).as_posix() for path in root.glob("*/function.json"))
    if not functions:
        raise Refused("there is no function folder")
    # With the line ends of the repository, whatever Git made of them on this machine.
    files = {path: ((root / path).read_bytes().replace(b"\r\n", b"\n"), 0o644) for path in ["host.json", *functions]}
    return files | {name: (handler, 0o755)}


def write(target, files):
    """Beside the target first: whoever reads it finds the old package or the new one."""
    descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as package:
            for name, (data, mode) in files.items():
                entry = zipfile.ZipInfo(name, MOMENT)
                entry.create_system = 3  # Unix: its modes are in external_attr, on Windows too
                entry.external_attr = (0o100000 | mode) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                package.writestr(entry, data, compresslevel=5)  # 6: twice the time for 1 % less
        os.chmod(beside, 0o644)
        os.replace(beside, target)
    except BaseException:
        os.unlink(beside)
        raise


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/package")
    parser.add_argument("--binary", required=True)
    parser.add_argument("--arch", choices=sorted(elf.MACHINES), required=True)
    parser.add_argument("--glibc", required=True)
    parser.add_argument("--to", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
