"""What an image's files allow: nobody but root changes what root runs."""

from __future__ import annotations

import pytest
from conftest import ON_ENGINE

pytestmark = pytest.mark.skipif(not ON_ENGINE, reason="needs a real image: make test-engine")
ELSEWHERE = "-path /opt/data -o -path /tmp -o -path /run -o -path /proc -o -path /sys -o -path /dev"
OF_OTHERS = r"\( -perm -002 -o -perm -020 -gid 0 -o -user hermes -o -group hermes \)"


def test_nothing_of_the_image_is_group_0s_or_hermess_to_write(container):
    """A platform that runs any UID with GID 0 could else change what a setuid program runs as root at the next
    start."""
    done = container().run("sh", "-c", rf"find / -xdev \( {ELSEWHERE} \) -prune -o ! -type l {OF_OTHERS} -print")
    assert done.stdout == b"", done
    for user, gid in ((12345, 0), (10000, 10000)):
        script = rf"find / -xdev \( {ELSEWHERE} \) -prune -o ! -type l -writable -print"
        argv = ["sh", "-c", script]
        done = container(user=user, gid=gid, options=("--entrypoint", "")).run(*argv)
        assert done.stdout == b"" and b"Permission denied" in done.stderr, done  # it has looked


def test_no_program_is_setuid(container):
    """Not s6-overlay's either: PID 1, which with --user is hermes's, could run anything as root by it. /run, which it
    would give to that user, is hermes's in the image, and root's where root starts."""
    done = container().run("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert done.stdout == b"", done
    for user, owner in ((None, b"root root 755"), (10000, b"hermes hermes 755")):
        done = container(user=user).run("stat", "-c", "%U %G %a", "/run")
        assert done.stdout.strip() == owner, done
