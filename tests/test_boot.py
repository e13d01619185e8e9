"""The whole boot on real s6: what it leaves behind, the static services, the command's say, and a restart."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from conftest import busy
from sandbox import AGENT_VERSION, PROJECT, wait_for

GOLDEN_VOLUME = """\
drwxr-xr-x hermes hermes .
-rw------- hermes hermes .env
-rw-r--r-- hermes hermes SOUL.md
drwxr-xr-x hermes hermes backups
-rw-r----- hermes hermes config.yaml
drwxr-xr-x hermes hermes cron
drwxr-xr-x hermes hermes home
drwxr-xr-x hermes hermes hooks
drwxr-xr-x hermes hermes lazy-packages
drwxr-xr-x hermes hermes logs
-rw-r--r-- hermes hermes logs/container-boot.log
drwxr-xr-x hermes hermes logs/gateways
drwxr-xr-x hermes hermes logs/gateways/default
-rw-r--r-- hermes hermes logs/gateways/default/current
-rw-r--r-- hermes hermes logs/gateways/default/lock
-rw-r--r-- hermes hermes logs/gateways/default/state
drwxr-xr-x hermes hermes memories
drwxr-xr-x hermes hermes pairing
drwxr-xr-x hermes hermes plans
drwxr-xr-x hermes hermes platforms
drwxr-xr-x hermes hermes platforms/pairing
drwxr-xr-x hermes hermes profiles
drwxr-xr-x hermes hermes sessions
drwxr-xr-x hermes hermes skills
drwxr-xr-x hermes hermes skins
drwxr-xr-x hermes hermes workspace
"""
GOLDEN_SCANDIR = """\
drwxrwxr-t root hermes .
drwxr-xr-x root root .s6-svscan
prw--w---- root hermes .s6-svscan/control
drwxr-xr-x hermes hermes gateway-default
prw------- hermes hermes gateway-default/back-off
-rw-r--r-- hermes hermes gateway-default/down
drwx-ws--T hermes hermes gateway-default/event
-rwxr-xr-x hermes hermes gateway-default/finish
drwxr-xr-x hermes hermes gateway-default/log
drwx-ws--T hermes hermes gateway-default/log/event
-rwxr-xr-x hermes hermes gateway-default/log/run
drwxr-xr-x hermes hermes gateway-default/log/supervise
prw-rw---- hermes hermes gateway-default/log/supervise/control
-rw-r--r-- root root gateway-default/log/supervise/death_tally
drwx-ws--T hermes hermes gateway-default/log/supervise/event
-rw-r--r-- root root gateway-default/log/supervise/lock
-rw-r--r-- root root gateway-default/log/supervise/status
-rwxr-xr-x hermes hermes gateway-default/run
drwxr-xr-x hermes hermes gateway-default/supervise
prw-rw---- hermes hermes gateway-default/supervise/control
-rw-r--r-- root root gateway-default/supervise/death_tally
drwx-ws--T hermes hermes gateway-default/supervise/event
-rw-r--r-- root root gateway-default/supervise/lock
-rw-r--r-- root root gateway-default/supervise/status
-rw-r--r-- hermes hermes gateway-default/timeout-finish
-rw-r--r-- hermes hermes gateway-default/timeout-kill
-rw-r--r-- hermes hermes gateway-default/type
lrwxrwxrwx root root dashboard
lrwxrwxrwx root root main-hermes
lrwxrwxrwx root root s6rc-fdholder
lrwxrwxrwx root root s6rc-oneshot-runner
"""


def listing(box, folder: str) -> list[str]:
    """Return mode, owner, group and path of everything below a folder of the container."""
    found = box.exec("find", folder, "-printf", "%M %u %g %P\n").stdout.splitlines()
    return sorted(line + "." if line.endswith(" ") else line for line in found)


@pytest.mark.overlay
@pytest.mark.sandbox
def test_the_tree_after_a_boot_is_the_golden_one(container):
    """Owner, mode and kind of everything on the volume and in the scandir; what is s6-svscan's own aside."""
    box = container()
    box.start("sleep", "infinity")
    assert wait_for(lambda: box.exec("test", "-e", "/opt/data/logs/gateways/default/state").returncode == 0)
    assert listing(box, "/opt/data") == sorted(GOLDEN_VOLUME.splitlines())
    of_svscan = re.compile(r"\.s6-svscan/(lock|finish|crash|SIG[A-Z0-9]+)$| s6-linux-init-shutdownd")
    assert [line for line in listing(box, "/run/service") if not of_svscan.search(line)] == sorted(
        GOLDEN_SCANDIR.splitlines()
    )


def test_hermes_can_control_slots_and_static_services(container):
    """Without privilege: start, stop and ask, and publish a slot of its own making; main-hermes it can only see."""
    box = container()
    box.start("sleep", "infinity")
    for service in ("main-hermes", "dashboard", "gateway-default"):
        assert box.exec("s6-svstat", f"/run/service/{service}", user="hermes").returncode == 0
        if service != "main-hermes":
            for words in (["-wD", "-T5000", "-d"], ["-wu", "-T5000", "-u"]):
                done = box.exec("s6-svc", *words, f"/run/service/{service}", user="hermes")
                assert done.returncode == 0, service
    assert box.exec("s6-svc", "-d", "/run/service/main-hermes", user="hermes").returncode == 111
    assert box.exec("s6-svscanctl", "-a", "/run/service", user="hermes").returncode == 0
    assert box.exec("mkdir", "/run/service/.mine", user="hermes").returncode == 0


def hermes_that_sleeps(box) -> None:
    """Put a program in the agent's place that shows how it was called and then runs until it is told to end."""
    box.put_agent(
        '#!/bin/sh\necho "hermes: $* as $(id -un) in $PWD with $HOME, ${API_SERVER_PORT:-no port}"\n'
        "exec sleep infinity\n"
    )


def wanted_up(box) -> dict[str, bool]:
    """Return every gateway slot with s6's word on whether it is up."""
    names = [path.name for path in box.path("/run/service").iterdir() if path.name.startswith("gateway-")]
    ask = 'for name do echo "$name $(s6-svstat -o up "/run/service/$name")"; done'
    lines = box.exec("sh", "-c", ask, "sh", *sorted(names)).stdout.splitlines()
    return {name: up == "true" for name, up in (line.split(" ") for line in lines)}


def test_a_restart_brings_back_what_ran(container, tmp_path):
    """Three profiles, two running, one stopped: after `docker restart` the same two run and the third is registered
    down."""
    for name, state in (("a", "running"), ("b", "stopped"), ("c", "draining")):
        folder = tmp_path / "volume/profiles" / name
        folder.mkdir(parents=True)
        (folder / "SOUL.md").write_text("soul")
        (folder / "gateway_state.json").write_text(f'{{"gateway_state": "{state}"}}')
        (folder / "gateway.pid").write_text("1")
    box = container()
    hermes_that_sleeps(box)
    expected = {"gateway-a": True, "gateway-b": False, "gateway-c": True, "gateway-default": False}
    box.start("sleep", "infinity")
    assert wait_for(lambda: wanted_up(box) == expected), box.log()
    box.restart()
    assert wait_for(lambda: wanted_up(box) == expected), box.log()
    log = (tmp_path / "volume/logs/container-boot.log").read_text()
    assert [re.sub(r"^\S+ | prior_exit=unclean$| prior_exit=clean$", "", line) for line in log.splitlines()] == 2 * [
        "profile=default prior_state=none action=registered",
        "profile=a prior_state=running action=started",
        "profile=b prior_state=stopped action=registered",
        "profile=c prior_state=running action=started",
    ]
    assert not list((tmp_path / "volume").rglob("gateway.pid"))


def test_a_gateway_runs_as_hermes_and_its_lines_reach_both_logs(container, tmp_path):
    """In the root home; the API server's variables are the default gateway's alone."""
    for name in ("", "profiles/a"):
        folder = tmp_path / "volume" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "SOUL.md").write_text("soul")
        (folder / "gateway_state.json").write_text('{"desired_state": "running"}')
    box = container(environment={"API_SERVER_PORT": "8642"})
    hermes_that_sleeps(box)
    box.start("sleep", "infinity")
    lines = {
        "a": "hermes: -p a gateway run --replace as hermes in /opt/data with /opt/data, no port",
        "default": "hermes: gateway run --replace as hermes in /opt/data with /opt/data, 8642",
    }
    for name, line in lines.items():
        assert wait_for(lambda: line in box.log()), box.log()
        current = tmp_path / "volume/logs/gateways" / name / "current"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+  ?" + re.escape(line) + "\n", current.read_text())
        assert current.stat().st_uid == 10000


@pytest.mark.parametrize("switch", ["1", "True", "YES", "on"])
def test_the_dashboard_is_a_service_that_a_variable_switches_on(container, switch):
    """As hermes, on the address and port asked for; without the variable it is a sleep."""
    box = container(environment={"HERMES_DASHBOARD": switch, "HERMES_DASHBOARD_PORT": "9200"})
    hermes_that_sleeps(box)
    box.start("sleep", "infinity")
    assert wait_for(
        lambda: "hermes: dashboard --host 127.0.0.1 --port 9200 --no-open as hermes in /opt/data" in box.log()
    ), box.log()


def test_the_dashboard_and_main_hermes_sleep_by_default(container):
    """Both are supervised; a static service is a folder and an entry, as the source tree has them."""
    box = container(environment={"HERMES_DASHBOARD": "0"})
    box.start("sleep", "infinity")
    for service in ("dashboard", "main-hermes"):
        assert wait_for(lambda: box.exec("s6-svstat", "-o", "up", f"/run/service/{service}").stdout == "true\n")
        folder = PROJECT / "s6-rc.d" / service
        assert (folder / "type").read_text() == "longrun\n" and (folder / "dependencies.d/base").exists()
        assert (PROJECT / "s6-rc.d/user/contents.d" / service).exists()
    assert not any("dashboard --host" in line for line in box.processes().values())


COMMANDS = {
    "dashboard": (["hermes", "dashboard", "--no-open"], {}, None),
    "dashboard without hermes": (["dashboard"], {}, None),
    "gateway run": (["gateway", "run"], {}, "profile=default prior_state=running action=started"),
    "hermes gateway run": (
        ["hermes", "gateway", "run", "-v"],
        {},
        "profile=default prior_state=running action=started",
    ),
    "of a profile": (["-p", "a", "gateway", "run"], {}, "profile=a prior_state=running action=started"),
    "not supervised": (["gateway", "run", "--no-supervise"], {}, "profile=default prior_state=none action=registered"),
    "not supervised, by variable": (
        ["gateway", "run"],
        {"HERMES_GATEWAY_NO_SUPERVISE": "1"},
        "profile=default prior_state=none action=registered",
    ),
    "gateway status": (["gateway", "status"], {}, "profile=default prior_state=none action=registered"),
}


@pytest.mark.parametrize("words, environment, line", COMMANDS.values(), ids=COMMANDS)
def test_the_command_line_has_a_say(container, tmp_path, words, environment, line):
    """The dashboard's container publishes no slots; `gateway run` from before there was a supervisor counts as
    running."""
    folder = tmp_path / "volume/profiles/a"
    folder.mkdir(parents=True)
    (folder / "SOUL.md").touch()
    box = container(environment=environment)
    hermes_that_sleeps(box)
    box.start(*words)
    if line is None:
        assert "this one's command is the dashboard" in box.log() and "profile=" not in box.log()
        assert not [path for path in box.path("/run/service").iterdir() if "gateway" in path.name]
    else:
        assert line in box.log()


def test_a_stopped_gateway_stays_stopped_with_gateway_run(container, tmp_path):
    """Once there is a state file, the command has no say."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/gateway_state.json").write_text('{"desired_state": "stopped"}')
    box = container()
    hermes_that_sleeps(box)
    box.start("gateway", "run")
    assert "profile=default prior_state=stopped action=registered" in box.log()
    assert wait_for(
        lambda: "info: default was stopped and stays so; start it with `hermes -p default gateway start`" in box.log()
    )
    sleeping = lambda: [line for line in box.processes().values() if line.endswith("sleep infinity")]  # noqa: E731
    assert wait_for(lambda: len(sleeping()) == 3), sleeping()  # static services and the command
    assert wanted_up(box) == {"gateway-default": False}


def test_the_old_entrypoint_says_that_it_is_old(container):
    """One line, then the setup."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec("/opt/hermes/docker/entrypoint.sh")
    assert (
        done.returncode == 0
        and "entrypoint.sh: warning: docker/entrypoint.sh is deprecated" in done.stderr.splitlines()[0]
    )
    assert "run as 10000:10000" in done.stderr and done.stdout == ""


@pytest.mark.long
@pytest.mark.sandbox
def test_more_profiles_than_s6_supervises(container, tmp_path):
    """s6-svscan would take any 500 of them. Those that run have a gateway, then the first in name order; each of the
    others a line."""
    for name in (*(f"p{number:03}" for number in range(520)), "running"):
        folder = tmp_path / f"volume/profiles/{name}"
        folder.mkdir(parents=True)
        (folder / "SOUL.md").touch()
    (folder / "gateway_state.json").write_text('{"desired_state": "running"}')
    box = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    hermes_that_sleeps(box)
    box.start("sleep", "infinity")
    for name in ("default", "running"):
        assert wait_for(lambda: box.exec("s6-svstat", "-o", "up", f"/run/service/gateway-{name}").stdout == "true\n")
    assert box.log().count("action=registered") == 488 and "too many services" not in box.log()
    assert 'profile=p488 prior_state=none action=skipped reason="s6-svscan takes no more than 490 gateways' in box.log()


def make(*arguments: str) -> subprocess.CompletedProcess:
    """Run a make target as people do where there is no engine."""
    return subprocess.run(
        ["make", "--no-print-directory", "-C", PROJECT, "ENGINE=", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_make_run_prints_the_agents_version_alone_on_stdout(live):
    """The real Hermes Agent, through boot, wrapper and drop."""
    done = make("run", "ARGS=--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith(f"Hermes Agent v{AGENT_VERSION}")
    assert "run as 10000:10000" in done.stderr and "run as" not in done.stdout


def test_make_run_reports_the_programs_code(live):
    """make itself ends with 2 for any failure, and names the code."""
    done = make("run", "ARGS=sh -c 'exit 42'")
    assert done.returncode == 2 and "Error 42" in done.stderr


def test_make_lists_its_targets():
    """A bare `make` is the help."""
    done = make()
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        "help",
        "run",
        "image",
        "test",
        "lint",
        "test-engine",
        "bench",
        "clean",
    ]


def test_nothing_waits_for_long(container):
    """`docker run --rm IMAGE true`, start to end, in a second on an idle machine; three are allowed on a busy one."""
    box = container()
    box.run("true")
    started = time.monotonic()
    assert box.run("true").returncode == 0
    assert time.monotonic() - started < 3 * busy()
