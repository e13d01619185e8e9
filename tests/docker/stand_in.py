#!/usr/bin/env python3
"""Stand-ins for s6-overlay's tarballs, where its releases cannot be had: Debian's s6 and execline under the names of
s6-overlay.

stand_in.py FOLDER      writes them and prints the build arguments that make the Dockerfile take them

This is not s6-overlay. Its /init does what tests/sandbox.py does in its place, with the same text; the base image must
have Debian's packages s6 and execline. An image made of it is for these tests and for nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
VERSION = "3.2.3.0"
PROGRAMS = "execlineb s6-envdir s6-log s6-setuidgid s6-supervise s6-svc s6-svdt s6-svscan s6-svscanctl s6-svstat s6-svwait".split()
INIT = """#!/usr/bin/python3 -IBS
import sys
sys.path.insert(0, "/opt/stand-in")
import sandbox
sandbox.be_s6_overlay()
"""


def add(archive: tarfile.TarFile, name: str, content: str, mode: int) -> None:
    """Put a file into a tarball."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content.encode()), mode
    archive.addfile(entry, io.BytesIO(content.encode()))


def link(archive: tarfile.TarFile, name: str, target: str) -> None:
    """Put a link into a tarball."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


def make(folder: Path) -> list[str]:
    """Write the tarballs below a folder; return the build arguments."""
    sys.path.insert(0, str(TESTS))
    import sandbox

    target = folder / f"v{VERSION}"
    target.mkdir(parents=True, exist_ok=True)
    arguments = [f"S6_OVERLAY_BASE=file://{folder}"]
    names = {"noarch": "NOARCH", f"{os.uname().machine}": os.uname().machine.upper(), "symlinks-noarch": "SYMLINKS"}
    for name, argument in names.items():
        path = target / f"s6-overlay-{name}.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            if name == "noarch":
                add(archive, "init", INIT, 0o755)
                add(archive, "command/with-contenv", sandbox.WITH_CONTENV, 0o755)
                add(archive, "opt/stand-in/sandbox.py", (TESTS / "sandbox.py").read_text(), 0o644)
            elif name == "symlinks-noarch":
                for program in PROGRAMS:
                    link(archive, f"command/{program}", f"/usr/bin/{program}")
        arguments.append(f"S6_OVERLAY_SHA256_{argument}={hashlib.sha256(path.read_bytes()).hexdigest()}")
    return arguments


if __name__ == "__main__":
    print("\n".join(f"--build-arg={argument}" for argument in make(Path(sys.argv[1]).resolve())))
