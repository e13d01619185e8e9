"""Every command of the handbook runs and prints what the handbook shows."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from conftest import Gateways
from sandbox import PROJECT, wait_for

import hermes_boot

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


@pytest.mark.long
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


@pytest.mark.parametrize("page, least", [("docs/SECURITY.md", 20), ("docs/design.md", 20)])
def test_every_test_that_a_page_names_is_there(page, least):
    """Its promises have one each."""
    words = set(re.findall(r"`(test_\w+)(?:\.py)?`", (PROJECT / page).read_text()))
    files = list((PROJECT / "tests").rglob("test_*.py"))
    found = {path.stem for path in files}
    for path in files:
        found |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    assert len(words) >= least and words - found == set()


def test_the_code_map_names_what_is_there():
    """Functions and constants of the two scripts, and files of tests."""
    page = (PROJECT / "docs/CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (?!to change|---)[^|]*\|([^|]*)\|([^|]*)\|$", page.partition("## Where to look")[2], re.M)
    scripts = "".join((PROJECT / name).read_text() for name in ("hermes_boot.py", "main_wrapper.py"))
    names = {name for row in rows for name in re.findall(r"`(?:\w+\.)?(\w+)`", row[0])}
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"^ *(?:def|class) {name}\b|^{name} = ", scripts, re.M)] == []
    files = {name for row in rows for name in re.findall(r"test_\w+\.py", row[1])}
    assert len(files) > 10 and [name for name in files if not (PROJECT / "tests" / name).exists()] == []


def test_every_link_of_a_page_leads_somewhere():
    """To a file of the repository, and to a heading of it."""
    for path in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            page = path.parent / target if target else path
            assert page.exists(), f"{path.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {
                re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
            }


def test_the_changelog_begins_with_this_version():
    """Its first heading is what --version prints."""
    assert re.search(r"^## (.*)$", (PROJECT / "docs/CHANGELOG.md").read_text(), re.M)[1] == hermes_boot.VERSION
