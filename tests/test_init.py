"""Where the platform has a PID 1 of its own: s6-svscan runs below it, and the container behaves as it does under
s6-overlay."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest
from conftest import MANAGER, RUN, busy
from sandbox import WRAPPER, wait_for

INIT = ("/init", WRAPPER)
OLD = "/opt/hermes/docker/entrypoint.sh"
ENTRYPOINTS = {
    "init": INIT,
    "tini and init": ("/usr/bin/tini", "-g", "-vv", "-p", "SIGTERM", "--", *INIT),
    "tini and the old entrypoint": ("/usr/bin/tini", "-g", "--", OLD),
    "tini without options": ("/usr/bin/tini", WRAPPER),
}
COMMANDS = [
    (["true"], 0),
    (["sh", "-c", "exit 42"], 42),
    (["sh", "-c", "kill -9 $$"], 137),
    (["/no/such/program"], 127),
    (["/etc/passwd"], 126),
]


@pytest.mark.parametrize("entrypoint", ENTRYPOINTS.values(), ids=ENTRYPOINTS)
def test_the_code_is_the_commands_and_stdout_is_its_alone(container, entrypoint):
    """By any of the entrypoints that people have in their files, by an exit and by a signal; by the image's own, what
    cannot be run too. One line says that s6 is not PID 1."""
    box = container(entrypoint=entrypoint)
    for words, code in COMMANDS if entrypoint == INIT else COMMANDS[1:3]:
        done = box.run(*words)
        assert (done.returncode, done.stdout) == (code, b""), done.stderr.decode()
    assert done.stderr.count(b"info: s6-svscan runs as PID ") == 1
    done = box.run("sh", "-c", "id -un; echo $HOME $VIRTUAL_ENV; cat", input=b"words\n")
    assert done.stdout == b"hermes\n/opt/data /opt/hermes/.venv\nwords\n"


def test_gateways_are_supervised_all_the_same(gateways):
    """Killed, one comes back; stopped, it stays stopped over a restart; status, health, doctor and `hermes` answer."""
    host = gateways({"a": RUN, "b": RUN}, "running", entrypoint=INIT)
    assert wait_for(lambda: host.up("a") and host.up("b"))
    killed, started = host.pid("a"), time.monotonic()
    host.box.exec("sh", "-c", f"kill -9 {killed}")
    assert wait_for(lambda: host.up("a") and host.pid("a") != killed) and time.monotonic() - started < 2 * busy()
    done = host.box.exec("hermes", "-p", "b", "gateway", "stop", user="hermes")
    assert (done.returncode, done.stdout) == (0, "b: stopped\n")
    assert host.box.exec(MANAGER, "health").stdout == "healthy: 2 up, 1 not wanted\n"
    assert json.loads(host.box.exec(MANAGER, "status", "-p", "b", "--json").stdout)[0]["state"] == "down"
    done = host.box.exec(MANAGER, "doctor")
    assert (
        done.returncode == 0
        and "warn  supervisor: s6-svscan answers on /run/service, below another PID 1" in done.stdout
    )
    static = host.box.exec("/command/s6-svstat", "-o", "up", "/run/service/main-hermes", user="hermes")
    assert static.stdout == "true\n", static
    host.box.restart()
    assert wait_for(lambda: host.up("a")) and not host.up("b")


def test_the_end_is_graceful(gateways):
    """SIGTERM: a gateway gets the time it needs, the command ends with a code of its own, nothing is left behind."""
    host = gateways(
        {"a": "trap 'sleep 1; touch $folder/drained; exit 0' TERM\nwhile :; do sleep 0.05; done\n"},
        "running",
        entrypoint=INIT,
    )
    assert wait_for(lambda: host.up("a"))
    assert host.box.stop() == 143 and (host.folder("a") / "drained").exists()
    box = host.box
    box.start("sh", "-c", "trap 'exit 7' TERM; echo trapped; while :; do sleep 0.05; done")
    assert wait_for(lambda: "trapped" in box.log())
    assert box.stop() == 7


@pytest.mark.sandbox
def test_the_end_needs_no_other_process_to_tell_the_gateways(container, tmp_path):
    """Where s6-overlay's rc.shutdown cannot be run, as at a limit on processes."""
    box = container(entrypoint=INIT, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    drain = "trap 'sleep 1; touch $HERMES_HOME/drained; exit 0' TERM\ntouch $HERMES_HOME/up"
    box.put_agent(f"#!/bin/sh\n{drain}\nwhile :; do sleep 0.05; done\n")
    (box.upper / "package/admin/s6-overlay-3.2.3.0/etc/s6-linux-init/skel/rc.shutdown").chmod(0o644)
    box.start("sh", "-c", "trap 'exit 7' TERM; touch trapped; while :; do sleep 0.05; done")
    assert all(wait_for((tmp_path / "volume" / name).exists) for name in ("up", "trapped"))
    assert box.stop() == 7 and (tmp_path / "volume/drained").exists(), box.log()
    assert "warning: s6-overlay's end cannot be run (Permission denied)" in box.log()


def test_the_dashboard_waits_for_the_boot(container):
    """It runs as who hermes is after the remap, and writes to stderr: stdout is the command's."""
    box = container(entrypoint=INIT, environment={"HERMES_UID": "1234", "HERMES_DASHBOARD": "1"})
    box.put_agent("#!/bin/sh\necho dashboard of $(id -u)\nexec sleep infinity\n")
    done = box.run("sh", "-c", "s6-svwait -t 5000 -u /run/service/dashboard; sleep 0.5; echo mine")
    assert (done.returncode, done.stdout) == (0, b"mine\n") and b"dashboard of 1234\n" in done.stderr, done


@pytest.mark.parametrize(
    "instead", ["ln -s /etc/kept control", "mkfifo control; exec 3<>control; yes | dd of=control oflag=nonblock"]
)
def test_root_opens_no_control_file_of_hermess_at_the_end(container, instead):
    """It is hermes's by then: a link would be written through, a full FIFO waited for."""
    box = container(entrypoint=INIT)
    box.start("sleep", "infinity")
    box.exec("sh", "-c", "echo kept >/etc/kept")
    script = f"cd /run/service/.s6-svscan && mv control old && {{ {instead}; }} 2>/dev/null; exec sleep 300 <>control"
    holder = subprocess.Popen(
        box.exec_command(["sh", "-c", script], "hermes"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(0.5)
    kept, started = box.path("/etc/kept").open(), time.monotonic()
    assert box.stop(20) == 143 and time.monotonic() - started < 5 * busy()
    assert kept.read() == "kept\n"
    holder.kill()


def test_what_comes_late_gets_its_time_too(container, tmp_path):
    """A child of the command's child, which comes to us when its parent ends: SIGTERM, and the rest of the grace."""
    box = container(entrypoint=INIT, environment={"S6_KILL_GRACETIME": "1500"})
    inner = "trap 'sleep 0.3; touch /opt/data/ended; exit' TERM; touch /opt/data/ready; while :; do sleep 0.05; done"
    words = f'setsid sh -c "sh -c \\"{inner}\\" & wait" & until [ -e /opt/data/ready ]; do sleep 0.05; done'
    assert box.run("sh", "-c", words).returncode == 0 and (tmp_path / "volume/ended").exists()


def test_a_process_that_has_the_name_of_rc_init_does_not_change_the_code(container):
    """An orphan of the command's lives on below our init when the command has ended."""
    orphan = "exec -a rc.init sleep 300"
    box = container(entrypoint=INIT)
    done = box.run("bash", "-c", f"(setsid bash -c '{orphan}' &); sleep 0.5; exit 5")
    assert done.returncode == 5, done


def test_the_wait_for_the_command_has_no_end():
    """A container runs for months."""
    import inspect

    import hermes_boot

    assert inspect.signature(hermes_boot.Children.wait).parameters["timeout"].default == float("inf")


def test_the_command_gateway_run_is_s6s(gateways):
    """Its process is a placeholder, as it is under s6-overlay; --no-supervise keeps it in the foreground."""
    host = gateways({}, "", entrypoint=INIT)
    host.box.stop()
    (host.volume / "starts").unlink(missing_ok=True)
    host.box.start("gateway", "run")
    assert wait_for(lambda: host.starts("default") == 1) and host.up("default")
    assert wait_for(lambda: "default: started" in host.box.log())
    assert host.box.stop() == 143
    done = host.box.run("gateway", "run", "--no-supervise")
    assert (done.returncode, done.stdout) == (0, b"real hermes: gateway run --no-supervise\n")


def test_orphans_are_reaped_and_strangers_are_left_alone(container):
    """In a PID namespace that is shared, what is not below us is not ours to end."""
    script = (
        'sleep 300 & stranger=$!; /init /opt/hermes/docker/main-wrapper.sh "$@"; code=$?;'
        " kill -0 $stranger && echo alive; exit $code"
    )
    box = container(entrypoint=("/bin/sh", "-c", script, "sh"))
    orphans = (
        "(sh -c 'sleep 0.1 & echo $$ $! >/tmp/orphans; exec true' &); until [ -s /tmp/orphans ]; do sleep 0.1; done"
    )
    gone = "for pid in $(cat /tmp/orphans); do while [ -e /proc/$pid ]; do sleep 0.1; done; done; rm /tmp/orphans"
    done = box.run("timeout", "60", "sh", "-c", f"{orphans}; {gone}; (setsid sleep 200 &); exit 3")
    assert (done.returncode, done.stdout) == (3, b"alive\n"), done


@pytest.mark.sandbox
def test_another_containers_s6_as_pid_1_is_not_ours(gateways):
    """In a PID namespace that is shared with a container of this image, at a restart with the same /run too."""
    host = gateways({"a": RUN}, "running")
    look = "s6-svwait -t 5000 -u /run/service/gateway-default && hermes-boot health; hermes-boot doctor"
    script = f"""
        mount -t tmpfs -o mode=755 none /run
        mount -t tmpfs none /opt/data
        echo exec sleep 300 >/opt/data/does
        echo '{{"desired_state": "running"}}' >/opt/data/gateway_state.json
        for start in 1 2; do {" ".join(INIT)} sh -c '{look}'; done
    """
    done = host.box.exec("unshare", "-m", "sh", "-ec", script)
    assert done.stdout.count("healthy: 1 up, 0 not wanted\n") == 2, done
    assert done.stdout.count("s6-svscan answers on /run/service, below another PID 1") == 2, done
    assert "supervisors:" not in done.stdout  # the other container's are no strays of ours


def test_the_command_has_the_terminal(container):
    """It is in the foreground, so that ^C and job control are its own."""
    import pty

    box = container(entrypoint=INIT)
    ours, theirs = pty.openpty()
    words = (
        "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        " os.execvp(sys.argv[1], sys.argv[1:])"
    )
    argv = [
        "/usr/bin/python3",
        "-c",
        words,
        *box.command(["sh", "-c", "trap 'echo interrupted; exit 9' INT; echo ready; sleep 20 & wait"]),
    ]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(ours, 1000)
    os.write(ours, b"\x03")
    assert process.wait(20) == 9, process.stderr.read()
    assert b"interrupted" in os.read(ours, 1000)


def test_a_failing_setup_ends_the_container(container):
    """Code 1, before the command."""
    done = container(entrypoint=INIT, environment={"HERMES_UID": "x"}).run("echo", "no")
    assert (done.returncode, done.stdout) == (1, b"") and b"HERMES_UID='x' is not a number" in done.stderr


@pytest.mark.parametrize("entrypoint", [(), INIT], ids=["PID 1", "below another"])
def test_hermes_itself_needs_no_root(container, entrypoint, tmp_path):
    """--user 10000: full supervision, without the root-only steps, which one line says."""
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 10000)
    box = container(user=10000, entrypoint=entrypoint, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    done = box.run("sh", "-c", f"id -u; s6-svwait -t 5000 -u /run/service/gateway-default && {MANAGER} health")
    assert done.returncode == 0 and done.stdout == b"10000\nhealthy: 1 up, 0 not wanted\n", done.stderr.decode()
    assert done.stderr.count(b"info: started as hermes itself, so owners, groups and services stay as they are") == 1


@pytest.mark.parametrize(
    "mode, gid, code",
    [(0o2775, 0, 0), (0o2755, 0, 1), (0o2775, 1234, 1)],
    ids=["OpenShift", "not writable", "other GID"],
)
def test_any_uid_with_gid_0_on_a_volume_that_group_0_may_write(container, tmp_path, mode, gid, code):
    """OpenShift's way; everybody else is told the ways there are."""
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 0)
    (tmp_path / "volume").chmod(mode)
    box = container(user=1000650000, gid=gid, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    done = box.run("sh", "-c", f"id -u; s6-svwait -t 5000 -u /run/service/gateway-default && {MANAGER} health")
    assert done.returncode == code, done.stderr.decode()
    if code:
        assert b"on a volume that group 0 may write" in done.stderr or (
            b"cannot be written by hermes (1000650000:0)" in done.stderr and b"give it to group 0" in done.stderr
        )
    else:
        assert done.stdout == b"1000650000\nhealthy: 1 up, 0 not wanted\n"
        assert b"info: started as UID 1000650000 with GID 0, so owners" in done.stderr
