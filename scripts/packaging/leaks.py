"""Finds what looks like a secret in files: private keys, tokens, connection strings with a password or key.

Run with file names, it prints file, line and kind, never the secret, and fails if there is any.
"""

import re
import sys

# What stands for a secret where none is: in the documentation's examples, in tests, and of a container that lives for
# one job of CI. Compared whole; shorter ones than four characters are nobody's password.
FAKES = {b"password", b"hunter2", b"hunter3", b"Only-for-this-job-1"}
# Of tests about reserved characters in URLs.
FAKES |= {b"p%40%2F%3F%23%25w%20%C3%BC", b"1?hunter2=x", b"hunter2#"}

KINDS = {
    "private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\s\\rn\"']*[A-Za-z0-9+/]{16}",
    "password in a URL": rb"://[^\s:/@\"'`?]{0,64}:(?P<secret>[^\s/@\"'`{}<>\[\]]{4,})@",
    "password in a connection string": rb"(?i:password|pwd)=(?!\.\.\.|\|)(?P<secret>[^\s;\"'`&,)\\{}<>\x7f-\xff]{4,})",
    "key in a connection string": rb"(?i:key|signature|secret)=(?P<secret>[A-Za-z0-9+/%_~.-]{20,}=*)",
    "key of an Azure service": rb"(?<=[A-Za-z0-9_/+-]{33})(?:AzFu|AzCa|AzSe|ACDb|\+ASt)[A-Za-z0-9_/+-]{4,6}={0,2}",
    "secret of an Entra application": rb"[78]Q~[A-Za-z0-9_~.-]{31,34}",
    "token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22,}|AKIA[A-Z0-9]{16}|npm_[A-Za-z0-9]{36})\b",
    "signed token (JWT)": rb"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
}
KINDS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}


def find(data):
    """Yields line number and kind of each."""
    if b"\0" in data:  # a program: its texts, each on a line
        data = b"\n".join(re.findall(rb"[\t\n\r -~]{8,}", data))
    for kind, pattern in KINDS.items():
        for match in pattern.finditer(data):
            secret = match.groupdict().get("secret")
            if secret is None or secret not in FAKES:
                yield data.count(b"\n", 0, match.start()) + 1, kind


def main(names):
    found = []
    for name in names:
        with open(name, "rb") as file:
            found += [f"{name}:{line}: {kind}" for line, kind in find(file.read())]
    print("\n".join(found) or f"no secrets in {len(names)} files")
    return 1 if found or not names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
