#!/usr/bin/env python3
"""Stand-ins for s6-overlay's tarballs, where its releases cannot be had: the scripts in stand-in, and Debian's s6.

    stand_in.py FOLDER      writes them and prints the build arguments that make the Dockerfile take them

This is not s6-overlay; ../sandbox.py says how it differs. The programs are those of this machine's architecture, and
need a base image with glibc 2.34. An image made of it is for these tests and for nothing else.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from image import dockerfile, put_s6_overlay

# what each tarball has, by the first part of a path
PARTS = {"noarch": ("init", "package"), os.uname().machine: ("command", "usr/lib"), "symlinks-noarch": ("usr/bin",)}


def version() -> str:
    """Return the release that the Dockerfile names."""
    (text,) = (found.text for found in dockerfile() if found.text.startswith("S6_OVERLAY_VERSION="))
    return text.partition("=")[2]


def make(folder: Path) -> list[str]:
    """Write the tarballs below a folder; return the build arguments."""
    target = folder / f"v{version()}"
    target.mkdir(parents=True, exist_ok=True)
    arguments = [f"S6_OVERLAY_BASE=file://{folder}"]
    with tempfile.TemporaryDirectory() as layer:
        put_s6_overlay(Path(layer))
        for name, parts in PARTS.items():
            path = target / f"s6-overlay-{name}.tar.xz"
            with tarfile.open(path, "w:xz") as archive:
                for part in parts:
                    archive.add(f"{layer}/{part}", part, filter=owned_by_root)
            sum_of = hashlib.sha256(path.read_bytes()).hexdigest()
            arguments.append(f"S6_OVERLAY_SHA256_{name.removesuffix('-noarch').upper()}={sum_of}")
    return arguments


def owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry of a tarball as root's."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


if __name__ == "__main__":
    print("\n".join(f"--build-arg={argument}" for argument in make(Path(sys.argv[1]).resolve())))
