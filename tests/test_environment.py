"""What `docker run -e` gives reaches every program byte for byte: the command, what the boot runs, a gateway, `hermes`
in a login shell, below s6-overlay and below another PID 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sandbox import ENTRYPOINT, wait_for

PLACES = pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])
GIVEN = {
    "GIVEN_EMPTY": "",
    "GIVEN_NEWLINE": "a\n",
    "GIVEN_NEWLINES": "b\n\n\n",
    "GIVEN_NEWLINE_ALONE": "\n",
    "GIVEN_LONG": "x" * 120_000,
    "GIVEN_EQUALS": "=a=b==",
    "GIVEN_SPACES": "  x \t ",
    "GIVEN_QUOTES": "'\"$HOME`id`\\",
    "GIVEN_ACCENTS": "ä€",
    "TERM": "screen-256color",
    "TZ": "Asia/Tokyo",
}
BYTES = {"GIVEN_BYTES": "\udcff\udcfe ä\udc80\n"}  # podman's and Docker's own config is JSON, which has no such value
DUMP = """#!/bin/sh
env -0 >$HERMES_HOME/dumps/$1$2$3
case $* in *--replace) exec sleep infinity ;; esac
"""


def seen(data: bytes) -> dict[str, str]:
    """Return what `env -0` has printed, as far as it was given."""
    pairs = dict(os.fsdecode(pair).split("=", 1) for pair in data.split(b"\0")[:-1])
    return {name: value for name, value in pairs.items() if name in GIVEN | BYTES}


@pytest.fixture
def dumping(container, tmp_path):
    """Make a container whose agent leaves its environment on the volume; the boot has something to migrate."""

    def make(**options):
        volume, metadata = tmp_path / "volume", tmp_path / "metadata"
        (volume / "dumps").mkdir(parents=True)
        (volume / "dumps").chmod(0o777)
        (volume / "config.yaml").write_text("a: 1\n")
        (volume / "gateway_state.json").write_text('{"desired_state": "running"}')
        metadata.mkdir()
        site = "/opt/hermes/.venv/lib/python3.99/site-packages/hermes_agent-99.0.dist-info"
        box = container(mounts=((str(metadata), site),), **options)
        box.put_agent(DUMP)
        return box

    return make


def dumped(volume: Path, name: str) -> dict[str, str]:
    """Return what the agent has left of one call, once it is there."""
    path = volume / "dumps" / name
    assert wait_for(lambda: path.exists() and path.stat().st_size > 0, 20), os.listdir(volume / "dumps")
    return seen(path.read_bytes())


@PLACES
def test_every_program_sees_what_was_given(dumping, tmp_path, entrypoint):
    """Empty values, newlines at the end, 120 KB, equals signs: nothing is lost or added."""
    box, volume = dumping(entrypoint=entrypoint, environment=GIVEN), tmp_path / "volume"
    box.start("sh", "-c", "env -0 >dumps/command; exec sleep infinity")
    assert dumped(volume, "command") == GIVEN
    assert dumped(volume, "-pdefaultconfig") == GIVEN
    assert dumped(volume, "gatewayrun--replace") == GIVEN
    done = box.exec("env", "-i", "HOME=/opt/data", "bash", "-lc", "hermes login shell")
    assert done.returncode == 0, done.stderr
    assert dumped(volume, "loginshell") == GIVEN


@PLACES
@pytest.mark.sandbox
def test_bytes_that_are_no_text_too(dumping, tmp_path, entrypoint):
    """Invalid UTF-8, where whoever starts /init can give it."""
    box, volume = dumping(entrypoint=entrypoint, environment=BYTES), tmp_path / "volume"
    box.start("sh", "-c", "env -0 >dumps/command; exec sleep infinity")
    for name in ("command", "-pdefaultconfig", "gatewayrun--replace"):
        assert dumped(volume, name) == BYTES


RAW = f"export GIVEN_BYTES=$(printf '\\377\\376q\\n.'); exec {' '.join(ENTRYPOINT)} \"$@\""


def test_bytes_reach_the_command_by_s6_overlay(container):
    """From a shell that is PID 1 and becomes /init: an engine of its own would spoil them."""
    done = container(first=("/bin/sh", "-c", RAW, "sh")).run("env", "-0")
    assert seen(done.stdout)["GIVEN_BYTES"] == "\udcff\udcfeq\n.", done.stderr.decode()


@PLACES
def test_with_keep_env_too(container, entrypoint):
    """S6_KEEP_ENV=1: there is no folder then, and nothing to spoil a value."""
    box = container(entrypoint=entrypoint, environment=GIVEN | {"S6_KEEP_ENV": "1"})
    assert seen(box.run("env", "-0").stdout) == GIVEN


@PLACES
def test_a_scandir_that_nobody_watches_ends_no_boot(container, entrypoint):
    """Where the services see the container's environment, hermes-gateways is asked to tell s6-svscan of that folder."""
    given = {"S6_KEEP_ENV": "1", "S6_PROFILE_GATEWAY_SCANDIR": "/tmp/slots", "S6_BEHAVIOUR_IF_STAGE2_FAILS": "2"}
    done = container(entrypoint=entrypoint, environment=given).run("ls", "/tmp/slots")
    assert done.returncode == 0 and b"gateway-default\n" in done.stdout and b"s6-svscanctl" not in done.stderr, done


def test_programs_that_live_by_their_variables_work(container):
    """A terminal's kind, a time zone, PATH's last folder."""
    box = container(environment=GIVEN)
    done = box.run("sh", "-c", "echo $TZ; s6-svstat -o up /run/service/gateway-default")
    assert (done.returncode, done.stdout) == (0, b"Asia/Tokyo\nfalse\n"), done


@pytest.mark.parametrize("given, expected", [({}, "hermes hermes"), ({"USER": "me", "LOGNAME": ""}, "me ")])
@PLACES
def test_a_name_for_who_has_none(container, tmp_path, entrypoint, given, expected):
    """OpenShift's UIDs are in no /etc/passwd; getpass.getuser() takes the variables. What was given stays."""
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 0)
    (tmp_path / "volume").chmod(0o2775)
    box = container(user=1000650000, gid=0, entrypoint=entrypoint, environment=given)
    done = box.run("sh", "-c", 'echo "$USER $LOGNAME"; python3 -c "import getpass; print(getpass.getuser())"')
    assert done.stdout.decode().split("\n")[0] == expected, done.stderr.decode()
    assert (done.returncode, done.stdout.decode().split("\n")[1]) == (0, expected.split()[0])
