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


def test_the_only_setuid_program_is_s6_overlays(container):
    """Which --user needs: it gives /run to that user at the start."""
    done = container().run("find", "/", "-xdev", "-type", "f", "-perm", "/6000")
    assert [line.rpartition("/")[2] for line in done.stdout.decode().split()] == ["s6-overlay-suexec"]
