"""What holds for every process of hermes's alike, whoever starts it: umask, folders, groups, the supervisor's word."""

from __future__ import annotations

import os
import stat

import pytest
from conftest import ON_ENGINE
from sandbox import wait_for

REPORT = """#!/bin/sh
cd /opt/data
case "$*" in *gateway*) file=gateway;; dashboard*) file=dashboard;; *) file=hermes;; esac
{ umask; echo "$XDG_RUNTIME_DIR"; echo "$PYTHONUSERBASE"; echo "${HERMES_WRITE_SAFE_ROOT-unset}"; } > $file.tmp
env | grep ^HERMES_ | sort > $file.env
mv $file.tmp $file
[ "$file" = hermes ] || exec sleep infinity
"""
DASHBOARD = {"HERMES_DASHBOARD": "1", "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}


def reports(container, volume, **environment: str) -> dict[str, list[str]]:
    """Return what each of the four kinds of hermes's processes finds: container command, gateway, dashboard, `docker
    exec`."""
    box = container(environment=DASHBOARD | environment)
    box.put_agent(REPORT)
    box.start("sh", "-c", "hermes chat; mv hermes command; exec sleep infinity")
    assert wait_for(lambda: all((volume / name).exists() for name in ("command", "gateway", "dashboard"))), box.log()
    assert box.exec("hermes", "chat").returncode == 0
    return {name: (volume / name).read_text().splitlines() for name in ("command", "gateway", "dashboard", "hermes")}


def test_the_same_settings_hold_for_all(container, tmp_path):
    """A runtime folder of hermes's own, a place for its packages on the volume, no write limit unless one is given."""
    found = reports(container, tmp_path / "volume")
    assert set(map(tuple, found.values())) == {("0022", "/tmp/hermes-runtime", "/opt/data/.local", "unset")}


def test_what_the_container_was_given_wins(container, tmp_path):
    """For all of them."""
    given = {
        "UMASK": "027",
        "XDG_RUNTIME_DIR": "/run/user/1000",
        "PYTHONUSERBASE": "/opt/data/py",
        "HERMES_WRITE_SAFE_ROOT": "/opt/data/workspace",
    }
    found = reports(container, tmp_path / "volume", **given)
    assert set(map(tuple, found.values())) == {("0027", *list(given.values())[1:])}


def test_a_gateway_knows_that_it_is_supervised(container, tmp_path):
    """By the name that 0.19.0 reads, and by the one that newer agents read."""
    reports(container, tmp_path / "volume")
    lines = (tmp_path / "volume/gateway.env").read_text().splitlines()
    assert "HERMES_S6_SUPERVISED_CHILD=1" in lines and "HERMES_SUPERVISED_CHILD=1" in lines


def test_the_runtime_folder_is_hermess_alone(container):
    """Whatever the umask; one that was left by an earlier start is taken over."""
    box = container(environment={"UMASK": "002"})
    box.start("sleep", "infinity")
    assert box.exec("stat", "-c", "%U %a", "/tmp/hermes-runtime").stdout == "hermes 700\n"
    assert box.exec("chmod", "755", "/tmp/hermes-runtime").returncode == 0
    assert box.exec("hermes-boot", "setup").returncode == 0
    assert box.exec("stat", "-c", "%U %a", "/tmp/hermes-runtime").stdout == "hermes 700\n"


@pytest.mark.parametrize("sealed", ["", "1"])
def test_a_setup_by_hand_has_nothing_to_warn_of(container, sealed):
    """Nor as hermes: what root has closed, the environment or the slots, is not its to close."""
    box = container(environment={"HERMES_SEALED": sealed})
    box.start("sleep", "infinity")
    for user in ("hermes", None):
        done = box.exec("hermes-boot", "setup", user=user)
        assert done.returncode == 0 and "warning" not in done.stderr, done


@pytest.mark.parametrize("umask", ["002", "027", "77", "0022"])
def test_new_folders_and_seeds_follow_the_umask_and_secrets_do_not(container, tmp_path, umask):
    """As LinuxServer's images have it; a gateway's log included."""
    box = container(environment={"UMASK": umask, "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\necho ready\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    log = tmp_path / "volume/logs/gateways/default/current"
    assert wait_for(log.exists)
    assert box.exec("mkdir", "/opt/data/profiles/late", user="hermes").returncode == 0
    assert box.exec("touch", "/opt/data/profiles/late/SOUL.md", user="hermes").returncode == 0
    assert box.exec("hermes-boot", "gateway", "register", "-p", "late").returncode == 0
    mask = int(umask, 8)
    wanted = {
        "workspace": 0o777,
        "logs/gateways/default": 0o777,
        "logs/gateways/late": 0o777,
        "SOUL.md": 0o666,
        "gateway_state.json": 0o666,
        "config.yaml": 0o660,
        "logs/gateways/default/current": 0o666,
    }
    found = {name: stat.S_IMODE((tmp_path / "volume" / name).stat().st_mode) & 0o777 for name in wanted}
    assert found == {name: mode & ~mask for name, mode in wanted.items()}
    assert stat.S_IMODE((tmp_path / "volume/.env").stat().st_mode) == 0o600
    assert box.exec("hermes-boot", "health").returncode == 0  # hermes and s6 still reach the slot


def test_the_strictest_umask_and_sealed_slots_go_together(container, tmp_path):
    """The umask is hermes's: what root publishes stays readable for hermes."""
    found = reports(container, tmp_path / "volume", UMASK="077", HERMES_SEALED="1")
    assert {lines[0] for lines in found.values()} == {"0077"}


def test_who_is_neither_root_nor_hermes_is_told_so(container):
    """Where the agent has closed the volume."""
    box = container()
    box.start("sleep", "infinity")
    box.exec("chmod", "700", "/opt/data")
    done = box.exec("hermes-boot", "status", user="www-data")
    assert done.stderr == "hermes-boot: fatal: UID 33 cannot read /opt/data; run this as hermes or root\n"
    assert done.returncode == 1


@pytest.mark.sandbox
def test_the_migration_has_the_umask_too_and_is_hermess(container, tmp_path):
    """The agent's own part of it, and the backup's folder."""
    home = tmp_path / "volume"
    home.mkdir()
    (home / ".hermes-agent-version").write_text("0.1\n")
    (home / "config.yaml").touch()
    box = container(environment={"UMASK": "027"})
    (box.upper / "opt/hermes/.venv/lib/python3.11/site-packages/hermes_agent-0.19.0.dist-info").mkdir(parents=True)
    box.put_agent("#!/bin/sh\n{ umask; id -un; } >>/opt/data/found\n")
    box.start("sleep", "infinity")
    assert (home / "found").read_text() == "0027\nhermes\n", box.log()
    assert stat.S_IMODE((home / "backups").stat().st_mode) == 0o750
    assert box.exec("hermes-boot", "migrate").returncode == 0  # by root, by hand
    assert (home / "found").read_text() == "0027\nhermes\n" * 2


@pytest.mark.parametrize("umask", ["9", "abc", "777", "00022", "0o22", "-1"])
def test_a_umask_that_is_none_is_said_once_and_not_taken(container, umask):
    """In one line; the boot goes on."""
    done = container(environment={"UMASK": umask}).run("sh", "-c", "umask")
    lines = [line for line in done.stderr.decode().splitlines() if "UMASK" in line]
    assert (done.returncode, done.stdout) == (0, b"0022\n"), done.stderr.decode()
    assert len(lines) == 1 and f"UMASK={umask!r} is not an octal number from 0 to 77; using 022" in lines[0]


def test_a_time_that_is_none_is_said_once_and_not_taken(container):
    """At the boot, whether it is for a stop or for the end; no command says it again."""
    box = container(environment={"HERMES_GATEWAY_STOP_TIMEOUT": "1m", "HERMES_SHUTDOWN_TIMEOUT": "-1"})
    done = box.run("sh", "-c", "hermes-boot gateway status; cat /run/service/gateway-default/timeout-kill")
    lines = [line for line in done.stderr.decode().splitlines() if "TIMEOUT" in line]
    assert done.stdout.endswith(b"\n30000\n") and len(lines) == 2, lines
    assert lines[0].endswith("HERMES_GATEWAY_STOP_TIMEOUT='1m' is not a number of seconds from 1 to 86400; using 30")
    assert lines[1].endswith("HERMES_SHUTDOWN_TIMEOUT='-1' is not a number of seconds from 0 to 86400; using 8")


@pytest.mark.skipif(not ON_ENGINE, reason="the sandbox has the machine's own /dev")
def test_render_nodes_groups_reach_the_program(container, tmp_path):
    """As the Docker socket's does; another kind of file there gives no group."""
    dri = tmp_path / "dri"
    dri.mkdir()
    os.mknod(dri / "renderD128", 0o660 | stat.S_IFCHR, os.makedev(226, 128))
    os.mknod(dri / "renderD129", 0o660 | stat.S_IFCHR, os.makedev(226, 129))
    (dri / "renderD130").touch()
    for name, group in (("renderD128", 992), ("renderD129", 0), ("renderD130", 993)):
        os.chown(dri / name, 0, group)
    done = container(mounts=((str(dri), "/dev/dri"),)).run("id", "-G")
    assert done.stdout.split() == [b"10000", b"992"], done.stderr.decode()


def test_update_names_the_image_that_the_container_was_made_from(container):
    """On stderr, before what the agent says, and for exactly that command."""
    box = container()
    box.put_agent('#!/bin/sh\necho "agent: $*"\n')
    box.start("sleep", "infinity")
    for words in (["update"], ["update", "--check"], ["-p", "coder", "update"]):
        done = box.exec("hermes", *words)
        assert done.stdout == f"agent: {' '.join(words)}\n"
        assert "hermes: info: the agent is part of this container's image" in done.stderr
    for words in (["update", "--help"], ["chat", "update"]):
        assert box.exec("hermes", *words).stderr == ""


def test_start_with_force_is_the_agents_to_answer(container):
    """Whichever of its versions knows it: what we do not know goes to it untouched."""
    box = container()
    box.put_agent('#!/bin/sh\necho "agent: $*"\n')
    box.start("sleep", "infinity")
    for words in (["gateway", "start", "--force"], ["-p", "coder", "gateway", "start", "--force"]):
        assert box.exec("hermes", *words).stdout == f"agent: {' '.join(words)}\n"


def test_fetched_packages_of_another_python_are_named(container, tmp_path):
    """In one line, in place of an import error in some gateway's log; those of this Python in none."""
    box = container()
    packages = tmp_path / "volume/lazy-packages"
    (packages / "discord_py-2.7.1.dist-info").mkdir(parents=True)
    (packages / "aiohttp-3.14.1.dist-info").mkdir()
    (packages / ".python-abi").write_text("3.9:.cpython-39-x86_64-linux-gnu.so")
    done = box.run(
        "python3",
        "-c",
        "import sys, sysconfig as c; print('%d.%d:' % sys.version_info[:2] + c.get_config_var('EXT_SUFFIX'), end='')",
    )
    lines = [line for line in done.stderr.decode().splitlines() if "lazy-packages" in line]
    assert len(lines) == 1 and "aiohttp-3.14.1 discord_py-2.7.1" in lines[0] and "3.9:" in lines[0], (
        done.stderr.decode()
    )
    (packages / ".python-abi").write_bytes(done.stdout)
    assert b"lazy-packages" not in box.run("true").stderr


@pytest.mark.parametrize(
    "zone, known", [("Europe/Berln", False), ("Europe/Berlin", True), ("CET-1CEST", True), ("", True)]
)
def test_a_wrong_time_zone_is_named(container, zone, known):
    """A name that is no time zone counts as UTC with every program: one line says so."""
    lines = [
        line for line in container(environment={"TZ": zone}).run("true").stderr.decode().splitlines() if "TZ=" in line
    ]
    text = f"01-hermes-setup: warning: TZ={zone!r} is not a time zone of this image, so it is UTC"
    assert lines == [] if known else len(lines) == 1 and lines[0].startswith(text)
