"""HERMES_UID and HERMES_GID, PUID and PGID, and the groups a container is given."""

from __future__ import annotations

import os
import re
import socket

import pytest
from conftest import ours
from sandbox import GROUP, PASSWD

REMAPS = {
    "UID alone": ({"HERMES_UID": "1"}, "1:10000"),
    "GID alone, taken": ({"HERMES_GID": "100"}, "10000:100"),
    "Unraid": ({"PUID": "99", "PGID": "100"}, "99:100"),
    "HERMES_ wins": ({"HERMES_UID": "1001", "PUID": "99", "HERMES_GID": "1002", "PGID": "100"}, "1001:1002"),
    "empty HERMES_ does not win": ({"HERMES_UID": "", "PUID": "99"}, "99:10000"),
    "above 65535": ({"HERMES_UID": "65536", "HERMES_GID": "65536"}, "65536:65536"),
    "the largest": ({"HERMES_UID": "4294967294", "HERMES_GID": "4294967294"}, "4294967294:4294967294"),
    "unset": ({}, "10000:10000"),
    "empty": ({"HERMES_UID": "", "HERMES_GID": "", "PUID": "", "PGID": ""}, "10000:10000"),
    "what it is already": ({"HERMES_UID": "10000", "HERMES_GID": "10000"}, "10000:10000"),
}


@pytest.mark.parametrize("environment, expected", REMAPS.values(), ids=REMAPS)
@pytest.mark.sandbox
def test_remap(container, tmp_path, environment, expected):
    """The program runs as the IDs asked for, the volume belongs to them, they are logged, and a second boot changes
    nothing."""
    box = container(environment=environment)
    done = box.run("sh", "-c", "echo $(id -u):$(id -g); stat -c %u:%g /opt/data/config.yaml /opt/data")
    assert done.stdout.decode().split() == [expected] * 3
    assert f"run as {expected}\n" in done.stderr.decode()
    before = [(path.read_bytes(), path.stat()) for path in (box.upper / "etc/passwd", box.upper / "etc/group")]
    again = box.run("sh", "-c", "echo $(id -u):$(id -g)")
    assert again.stdout.decode().strip() == expected
    assert "remap" not in again.stderr.decode() and "give " not in again.stderr.decode()
    after = [(path.read_bytes(), path.stat()) for path in (box.upper / "etc/passwd", box.upper / "etc/group")]
    assert [(text, status.st_ino, status.st_mtime_ns) for text, status in before] == [
        (text, status.st_ino, status.st_mtime_ns) for text, status in after
    ]


WRONG = ["abc", "-1", "0", "4294967295", "1e3", " 1000 ", "1000 ", "+5", "٣", "0x10", "9" * 5000, "1000;id"]


EACH = """name=$1; shift
for value; do env S6_KEEP_ENV=1 "$name=$value" /etc/cont-init.d/01-hermes-setup; echo "$?"; done
"""


@pytest.mark.parametrize("name", ["HERMES_UID", "PGID"])
@pytest.mark.sandbox
def test_a_wrong_value_ends_the_boot(container, tmp_path, name):
    """One clear line with the variable and the value, code 1, no program run, nothing changed."""
    box = container(environment={name: WRONG[0]})
    done = box.run("echo", "ran")
    (line,) = ours(done.stderr)
    assert line.startswith(f"01-hermes-setup: fatal: {name}={WRONG[0]!r} is not a number from 1 to 4294967294; ")
    assert (done.returncode, done.stdout) == (1, b"")
    assert (box.upper / "etc/passwd").read_text() == PASSWD and list((tmp_path / "volume").iterdir()) == []
    box = container(first=("/bin/sh", "-c", EACH, "sh"))  # the setup alone, in one container
    done = box.run(name, *WRONG)
    for value, line in zip(WRONG, ours(done.stderr), strict=True):
        assert line.startswith(f"01-hermes-setup: fatal: {name}={value!r} is not a number from 1 to 4294967294; ")
    assert done.stdout.split() == [b"1"] * len(WRONG)
    assert (box.upper / "etc/passwd").read_text() == PASSWD and list((tmp_path / "volume").iterdir()) == []


def test_the_name_that_does_not_win_is_said(container):
    """With two values, of which one is ignored."""
    given = {"HERMES_UID": "1001", "PUID": "99", "HERMES_GID": "100", "PGID": "100"}
    lines = ours(container(environment=given).run("true").stderr)
    assert [line for line in lines if "ignored" in line] == [
        "01-hermes-setup: warning: PUID is ignored, since HERMES_UID='1001' is set"
    ]


def test_root_is_told_whose_ids_to_give(container):
    """`id -u` would be 0 once more."""
    (line,) = ours(container(environment={"PUID": "0"}).run("true").stderr)
    assert line.endswith(
        "0 is root, as which the agent never runs; unset it, or give the folder's owner (ls -ldn FOLDER)"
    )


def test_a_taken_uid_ends_the_boot(container):
    """Two users of one UID would share files and processes; the message names the other."""
    done = container(environment={"HERMES_UID": "33"}).run("echo", "ran")
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = ours(done.stderr)
    assert line.endswith("UID 33 belongs to the user www-data in this image; give another HERMES_UID or PUID")


@pytest.mark.sandbox
def test_account_files_keep_everything_else(container):
    """Comments, unknown lines, invalid UTF-8, order, mode and owner survive."""
    passwd = "# a comment\n" + PASSWD + "+::::::\nodd line\nmüller:x:1:1\n"
    box = container(
        passwd=passwd,
        group="# groups\n" + GROUP + "last:x:77:",
        environment={"HERMES_UID": "1234", "HERMES_GID": "1235"},
    )
    (box.upper / "etc/passwd").write_bytes(passwd.encode("latin-1"))
    (box.upper / "etc/passwd").chmod(0o640)
    assert box.run("true").returncode == 0
    written = (box.upper / "etc/passwd").read_bytes()
    assert written == passwd.replace("hermes:x:10000:10000", "hermes:x:1234:1235").encode("latin-1")
    assert (box.upper / "etc/passwd").stat().st_mode & 0o7777 == 0o640
    assert (box.upper / "etc/group").read_text() == "# groups\n" + GROUP.replace(
        "hermes:x:10000", "hermes:x:1235"
    ) + "last:x:77:"
    assert not (box.upper / "etc/passwd+").exists()


@pytest.mark.sandbox
def test_given_groups_reach_the_program(container, tmp_path):
    """`--group-add` and a mounted Docker socket: s6-setuidgid would lose both."""
    sock = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        os.chown(sock, 0, 998)
        box = container(groups=(0, 100, 4242), mounts=((str(sock), "/run/docker.sock"),))
        for _ in range(2):
            assert set(box.run("id", "-G").stdout.split()) == {b"10000", b"100", b"4242", b"998"}
    text = (box.upper / "etc/group").read_text()
    assert re.search(r"^users:x:100:hermes$", text, re.M) and text.count("hermes-4242") == 1


def test_another_uid_is_told_the_way_out(container, tmp_path):
    """`--user 1234` is not hermes."""
    done = container(user=1234).run("true")
    assert done.returncode == 1
    assert (
        "started as UID 1234, which is not hermes's; drop `--user` and set HERMES_UID=1234 HERMES_GID=1234"
        in done.stderr.decode()
    )


def test_hermes_itself_boots_without_the_root_steps(container, tmp_path):
    """`--user 10000` on a volume of its own."""
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 10000)
    box = container(user=10000)
    done = box.run("sh", "-c", "ls /run/service; cat config.yaml")
    assert done.returncode == 0 and b"gateway-default" in done.stdout and b"# Configuration" in done.stdout
    assert b"started as hermes itself" in done.stderr
    refused = container(user=10000, environment={"HERMES_UID": "1000"}).run("true")
    assert refused.returncode == 1 and b"drop `--user` or the HERMES_UID" in refused.stderr
