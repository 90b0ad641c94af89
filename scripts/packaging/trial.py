"""Runs a packed handler once, with nothing beside it but what it names itself, and says how that went.

In an empty root where this machine lets us (root, or user namespaces); that nothing is missing is then shown, not
inferred. Otherwise in an empty folder, and it says so.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request

PATIENCE_S = 20  # until it must have answered; it takes milliseconds


class Failed(Exception):
    """What went wrong, with what the handler wrote."""


def run(binary):
    """Starts it, asks for a product of the embedded catalogue, stops it. Returns a sentence; raises Failed."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        shutil.copyfile(binary, root / "handler")
        (root / "handler").chmod(0o755)
        enter = _enter()
        if enter is not None:
            for library in _libraries(root / "handler"):
                copy = root / library.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(library, copy)
                copy.chmod(0o755)
        command = [str(root / "handler")] if enter is None else [*enter, str(root), "/handler"]
        # No other variable: what it must have, it brings.
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=root, env={"HTTP_PORT": "0"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        guard = threading.Timer(PATIENCE_S, process.kill)
        guard.start()
        try:
            address = _address(process)
            _get(address)
            took = time.monotonic() - started
            product = _get(f"{address}/api/GetProductById?productid=680")
            if b'"productID":680,' not in product:
                raise Failed(f"it answered {product[:200]!r}")
        finally:
            guard.cancel()
            process.kill()
            process.communicate()
    place = "in an empty root" if enter is not None else "in an empty folder (an empty root needs root or user namespaces)"
    return f"it runs {place}; its first answer came after {took * 1000:.0f} ms"


def possible(arch):
    """Whether this machine runs such programs."""
    return os.uname().sysname == "Linux" and os.uname().machine == arch if hasattr(os, "uname") else False


def _enter():
    """The command that runs another in a root of its own, or None where that is not allowed."""
    chroot = shutil.which("chroot") or shutil.which("chroot", path="/usr/sbin:/sbin")
    if chroot is None:
        return None
    command = [chroot] if os.geteuid() == 0 else ["unshare", "--map-root-user", chroot]
    try:
        allowed = subprocess.run([*command, "/", "/bin/true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    return command if allowed else None


def _libraries(binary):
    """What the dynamic loader needs: nothing for a static program."""
    output = subprocess.run(["ldd", str(binary)], capture_output=True, text=True).stdout
    return [pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", output)]


def _address(process):
    text = ""
    for line in process.stdout:
        text += line
        if found := re.search(r"listening +(http://\S+)", line):
            return found[1]
    raise Failed(f"it ended before it listened: {text.strip() or 'it wrote nothing'}")


def _get(url):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=PATIENCE_S) as answer:
            return answer.read()
    except OSError as error:
        raise Failed(f"{url}: {error}") from None
