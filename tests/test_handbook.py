"""Every command of the handbook runs and prints what the handbook shows."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from conftest import Gateways
from sandbox import PROJECT, wait_for

HANDBOOK = (PROJECT / "docs/handbook.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```$", HANDBOOK, re.M | re.S)
AGENT = """#!/bin/sh
profile=default
[ "$1" != -p ] || { profile=$2; shift 2; }
shift 3
echo "gateway of $profile${1:+ $1}"
exec sleep infinity
"""


def commands(block: str) -> list[tuple[str, str]]:
    """Return a block's commands, each with the output that is shown."""
    return [(command, shown) for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.M)]


def pattern(shown: str) -> str:
    """Return what an output must match; a line that is `…` alone stands for any number of lines."""
    return (
        re.escape(shown)
        .replace("…\\\n", "(?:.*\n)*")
        .replace("…", ".*")
        .replace("PROFILE\\ \\ \\ \\ STATE\\ \\ \\ \\ \\ ", "PROFILE\\ +STATE\\ +")
    )


@pytest.fixture
def hermes(container) -> Gateways:
    """The handbook's container: default and coder run, and its derived image's service is there."""
    box = container()
    (dockerfile,) = re.findall(r"^```dockerfile\nRUN (.*?)^```$", HANDBOOK, re.M | re.S)
    script = dockerfile.replace("/etc/s6-overlay", str(box.upper / "etc/s6-overlay"))
    subprocess.run(["sh", "-ec", script], check=True)
    host = Gateways(box, {"coder": ""}, "running", agent=AGENT)
    assert wait_for(lambda: (box.volume / "logs/gateways/coder/current").exists() and host.up("default"))
    return host


@pytest.mark.overlay
@pytest.mark.sandbox
def test_every_command_of_the_handbook(hermes):
    """In its order, one container for all of them."""
    assert len(BLOCKS) >= 8
    for command, shown in (pair for block in BLOCKS for pair in commands(block)):
        words = shlex.split(command)
        assert words[:2] == ["docker", "exec"], command
        user = words[3] if words[2] == "-u" else None
        program = words[words.index("hermes", 4 if user else 2) + 1 :]
        wait_for(lambda: hermes.box.exec("hermes-boot", "health").returncode == 0)
        done = hermes.box.exec(*program, user=user)
        out = done.stdout + done.stderr
        assert re.fullmatch(pattern(shown), out), f"{command}\n{out}\nand not\n{shown}"
        assert done.returncode == 0, command


def test_every_test_that_the_security_page_names_is_there():
    """Each of its sentences has one."""
    words = set(re.findall(r"`(test_\w+)(?:\.py)?`", (PROJECT / "docs/SECURITY.md").read_text()))
    files = list((PROJECT / "tests").rglob("test_*.py"))
    found = {path.stem for path in files}
    for path in files:
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    assert len(words) > 12 and words - found == set()
