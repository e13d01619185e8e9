"""What we rely on of s6-overlay 3.2.3.0 and s6 2.15. On an engine this tries the real one, else what plays it here."""

from __future__ import annotations

import os
import pty
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import ON_ENGINE
from image import SUITE, s6_root
from sandbox import WRAPPER, wait_for, write_script

pytestmark = pytest.mark.overlay

FILES = "/run/s6/container_environment"
VALUES = {
    "EMPTY": "",
    "PLAIN": "a",
    "ONE": "a\n",
    "THREE": "b\n\n\n",
    "NEWLINE": "\n",
    "BLANKS": " \ta ",
    "EQUALS": "a=b==",
    "LONG": "x" * 122_880,
}
SERVICES = ("dashboard", "main-hermes", "s6rc-fdholder", "s6rc-oneshot-runner")


def script(tmp_path: Path, guest: str, text: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """Return the option that puts a script into a container."""
    write_script(tmp_path / "script", f"#!/bin/sh\n{text}\n")
    return {"mounts": ((str(tmp_path / "script"), guest),)}


def test_a_file_of_the_environment_is_the_value_and_one_newline(container):
    """And with-contenv takes that one off again."""
    box = container(environment=VALUES)
    box.start("sleep", "infinity")
    for name, value in VALUES.items():
        assert box.path(f"{FILES}/{name}").read_bytes() == value.encode() + b"\n", name
    done = box.exec("env", "-i", "PATH=/command:/usr/bin:/bin", "OTHER=x", "/command/with-contenv", "env", "-0")
    seen = dict(pair.split("=", 1) for pair in done.stdout.split("\0")[:-1])
    assert {name: seen.get(name) for name in VALUES} == VALUES and "OTHER" not in seen
    assert (seen["HERMES_HOME"], seen["HOME"], seen["PATH"]) == ("/opt/data", "/root", box.environment["PATH"])
    assert "HOSTNAME" in seen and "PWD" in seen


def test_with_contenv_takes_one_newline_off_and_an_empty_file_is_no_variable(container):
    """As s6-envdir -Lf; names that begin with a dot are no variables."""
    box = container()
    box.start("sleep", "infinity")
    for name, content in (("NONE", ""), ("BARE", "a"), ("NUL", "a\0b\n"), (".DOT", "x\n")):
        box.path(f"{FILES}/{name}").write_text(content)
    lines = box.exec("env", "UNSET=1", "NONE=1", "/command/with-contenv", "env").stdout.splitlines()
    found = [line for line in lines if line.partition("=")[0] in ("NONE", "BARE", "NUL", ".DOT")]
    assert sorted(found) == ["BARE=a", "NUL=a"] and "b" in lines  # a NUL becomes a newline


def test_names_that_are_no_identifiers_are_lost_and_kept_environments_are_whole(container):
    """The first shell drops them; with S6_KEEP_ENV=1 there is no folder."""
    given = {"my.dotted": "x", "a-b": "x", "kept_1": "x"}
    done = container(environment=given).run("ls", FILES)
    assert set(done.stdout.decode().split()) & given.keys() == {"kept_1"}
    done = container(environment=given | {"S6_KEEP_ENV": "1"}).run(
        "sh", "-c", f"ls -d {FILES}; with-contenv sh -c 'echo $kept_1 $S6_KEEP_ENV'"
    )
    assert done.stdout == b"x 1\n" and b"No such file" in done.stderr


@pytest.mark.sandbox
def test_bytes_that_are_no_text_arrive(container):
    """An engine's own configuration is text, and cannot carry them."""
    box = container(environment={"BYTES": "\udcff\udcfe"})
    assert b"\xff\xfe\n" in box.run("cat", f"{FILES}/BYTES").stdout


def test_a_boot_script_has_a_scrubbed_environment_and_is_not_below_rc_init(container, tmp_path):
    """It has the container's stdin, the folder of s6-rc's oneshot runner, and no arguments."""
    look = """
        cat /proc/self/environ | tr '\\0' '\\n' | cut -d= -f1 | sort; echo "$RC_NAME $# $PWD"; umask
        echo "stdin $(cat)"
        pid=$PPID; while [ $pid -gt 1 ]; do cat /proc/$pid/comm; pid=$(cut -d' ' -f4 /proc/$pid/stat); done
    """
    options = script(tmp_path, "/etc/cont-init.d/00-look", f"{{ {look}\n}} >/run/seen")
    done = container(environment={"MARK": "x"}, **options).run("sh", "-c", "cat /run/seen; cat", input=b"words\n")
    *names, environment, folder, mask, stdin, one, two, three, four = done.stdout.decode().splitlines()
    assert [*names, environment] == ["PATH", "PWD", "RC_NAME"]
    assert re.fullmatch(r"legacy-cont-init 0 /run/s6-rc:s6-rc-init:\w{6,}/servicedirs/s6rc-oneshot-runner", folder)
    assert (mask, stdin) == ("0022", "stdin words")
    assert [one, two, four] == ["cont-init", "s6-sudod", "s6-supervise"] and three == "s6-ipcserverd"


def test_the_process_tree(container):
    """PID 1 is s6-svscan, with /dev/null to read; rc.init is its child, in a session of its own with the command."""
    box = container()
    box.start("sleep", "infinity")
    script = "cat /proc/1/comm; tr '\\0' ' ' </proc/1/cmdline; echo; readlink /proc/1/fd/0; ps axo pid,ppid,sid,args"
    comm, first, stdin, _, *lines = box.exec("sh", "-c", script).stdout.splitlines()
    assert (comm, stdin) == ("s6-svscan", "/dev/null") and re.search(r"/s6-svscan -d4 -- /run/service $", first)
    processes = [line.split(None, 3) for line in lines]
    (pid, parent, session, _) = next(found for found in processes if " top " in found[3])
    words = f"/bin/sh -e /run/s6/basedir/scripts/rc.init top {WRAPPER} sleep infinity"
    assert [found[3] for found in processes if found[0] == pid] == [words] and (parent, session) == ("1", pid)
    assert ["sleep infinity" in found[3] and found[2] == pid for found in processes if found[1] == pid] == [True]
    supervised = {found[3].split()[1] for found in processes if found[3].startswith("s6-supervise ")}
    assert supervised == {*SERVICES, "s6-linux-init-shutdownd", "gateway-default", "gateway-default/log"}
    environment = box.path(f"/proc/{pid}/environ").read_bytes()
    assert [pair.split(b"=")[0] for pair in environment.split(b"\0")[:-1]] == [b"PATH"]


def test_owners_and_modes_are_s6_overlays(container, tmp_path):
    """Before our boot, which hands some of it to hermes: seen from the first boot script."""
    box = container(**script(tmp_path, "/etc/cont-init.d/00-look", "find /run -printf '%M %u %p\\n' >/tmp/seen"))
    lines = box.run("cat", "/tmp/seen").stdout.decode().splitlines()
    mode = {path: (text, user) for text, user, path in (line.split(None, 2) for line in lines)}
    (live,) = (path for path in mode if re.fullmatch(r"/run/s6-rc:s6-rc-init:\w{6,}", path))
    for name in SERVICES:
        folder = f"{live}/servicedirs/{name}"
        assert mode[f"/run/service/{name}"][0] == "lrwxrwxrwx"
        expected = {"": "drwxr-xr-x", "/event": "drwx-ws--T", "/supervise": "drwx------", "/run": "-rwxr-xr-x"}
        expected |= {"/supervise/control": "prw-------", "/supervise/status": "-rw-r--r--"}
        assert {part: mode[folder + part] for part in expected} == {
            part: (text, "root") for part, text in expected.items()
        }
        assert f"{folder}/type" not in mode
    for path in ("/run", "/run/s6", FILES, "/run/service", "/run/service/.s6-svscan", "/run/s6/basedir/scripts", live):
        assert mode[path] == ("drwxr-xr-x", "root"), path
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "finish", "crash"):
        assert mode[f"/run/service/.s6-svscan/{name}"] == ("-rwxr-xr-x", "root")
    fifo = "/run/service/s6-linux-init-shutdownd/fifo"
    assert mode["/run/service/.s6-svscan/control"] == mode[fifo] == ("prw-------", "root")
    assert mode["/run/s6-rc"][0] == "lrwxrwxrwx" and mode["/run/s6/workdir"] == ("-rw-r--r--", "root")


FAILED = "/run/s6/basedir/scripts/rc.init: warning: "  # whose line it is: the words are s6-overlay's own
STOPPING = "/run/s6/basedir/scripts/rc.init: fatal: "
NONZERO = "cont-init: warning: "
UNABLE = ESSENTIAL = "s6-rc: warning: "
SAID = [
    ("0", "2", 1, [FAILED, STOPPING]),
    ("1", "2", 1, [NONZERO, UNABLE, FAILED, STOPPING, ESSENTIAL]),
    ("0", "1", 0, []),
    ("1", "1", 0, [NONZERO, ESSENTIAL]),
    ("1", "0", 0, [ESSENTIAL]),
]


@pytest.mark.parametrize("verbosity, behaviour, code, said", SAID)
def test_what_is_said_of_a_boot_that_failed(container, verbosity, behaviour, code, said):
    """Whatever the verbosity, that the container is stopped; the command does not run then."""
    environment = {"S6_VERBOSITY": verbosity, "S6_BEHAVIOUR_IF_STAGE2_FAILS": behaviour, "HERMES_UID": "x"}
    done = container(environment=environment).run("echo", "ran")
    assert (done.returncode, done.stdout) == (code, b"" if code else b"ran\n")
    lines = [
        line for line in done.stderr.decode().splitlines() if line.startswith(("/run/s6/", "s6-rc: ", "cont-init: "))
    ]
    assert [line[: len(text)] for line, text in zip(lines, said, strict=True)] == said


def test_a_chatty_boot_names_every_script_and_service(container):
    """S6_VERBOSITY=2, which is s6-overlay's own default."""
    lines = container(environment={"S6_VERBOSITY": "2"}).run("true").stderr.decode().splitlines()

    def said(program: str, name: str) -> list[int]:
        """Return the numbers of a program's lines about something: at the start before and after, so at the end."""
        return [at for at, line in enumerate(lines) if line.startswith(f"{program}: info: ") and name in line]

    boot, dashboard = said("s6-rc", "legacy-cont-init"), said("s6-rc", "dashboard")
    assert len(boot) == len(dashboard) == len(said("s6-rc", "main-hermes")) == 4
    assert boot[1] < dashboard[0] and dashboard[3] < boot[2]
    assert len(said("cont-init", "/etc/cont-init.d/01-hermes-setup")) == 2
    assert len(said("cont-finish", "/etc/cont-finish.d/10-hermes-shutdown")) == 1
    assert len([line for line in lines if line.startswith(ESSENTIAL)]) == 1


def test_a_boot_that_takes_too_long_ends_the_container(container, tmp_path):
    """S6_CMD_WAIT_FOR_SERVICES_MAXTIME, in ms; 0 has no end."""
    slow = script(tmp_path, "/etc/cont-init.d/00-slow", "sleep 4")
    done = container(environment={"S6_CMD_WAIT_FOR_SERVICES_MAXTIME": "1000"}, **slow).run("true")
    assert done.returncode == 2 and b"s6-rc: fatal: " in done.stderr and STOPPING.encode() in done.stderr


def test_a_finish_script_is_cut_short_by_its_limit_alone(container, tmp_path):
    """S6_KILL_FINISH_MAXTIME, in ms; without it there is none."""
    slow = script(tmp_path, "/etc/cont-finish.d/00-slow", "sleep 1\necho ended >&2")
    for limit, ended in (("500", False), ("0", True), ("", True)):
        box = container(environment={"S6_KILL_FINISH_MAXTIME": limit}, **slow)
        assert (b"ended\n" in box.run("true").stderr) is ended, limit


@pytest.mark.sandbox
def test_a_stop_without_our_finish_script_is_code_0(container):
    """rc.init dies with the command, so that nobody leaves word of a code."""
    box = container()
    (box.upper / "etc/cont-finish.d/10-hermes-shutdown").unlink()
    box.start("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert wait_for(lambda: "ready" in box.log())
    assert box.stop() == 0


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 111), (signal.SIGUSR1, 111), (signal.SIGUSR2, None)])
def test_other_signals_to_pid_1(container, number, code):
    """INT would reboot and USR1 power off, which a container may not; USR2 halts, as TERM does."""
    box = container()
    box.start("sleep", "infinity")
    box.exec("kill", f"-{int(number)}", "1")
    assert box.process.wait(60) == (143 if code is None else code)


def test_halt_is_roots(container):
    """hermes cannot end the container by it."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec("/run/s6/basedir/bin/halt", user="hermes")
    assert done.returncode == 100 and "s6-linux-init-hpr: fatal: " in done.stderr
    assert box.process.poll() is None
    assert box.exec("/run/s6/basedir/bin/halt").returncode == 0
    assert box.process.wait(60) == 143


def test_the_grace_is_a_fixed_wait_and_can_be_none(container):
    """S6_KILL_GRACETIME in ms."""
    took = {}
    for grace in ("0", "2000"):
        box = container(environment={"S6_KILL_GRACETIME": grace})
        box.start("sh", "-c", "read _ </run/s6/workdir; sleep 1.5; exit 7")
        started = time.monotonic()
        assert box.process.wait(60) == 7
        took[grace] = time.monotonic() - started
    assert took["2000"] - took["0"] > 1


@pytest.mark.skipif(ON_ENGINE, reason="the engine's own pty is not ours to look at")
def test_the_command_has_the_terminal_to_itself(container):
    """It can open /dev/tty, is in the foreground, and PID 1 is in another session."""
    box = container()
    argv = box.command(
        ["sh", "-c", "tty; ps -o tpgid=,sid= -p $PPID; ps -o tty= -p 1; echo seen >/dev/tty; echo $TERM"]
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(argv[0], argv)
    text = b""
    while part := read(terminal):
        text += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert re.search(rb"/dev/pts/\d+\r\n +(\d+) +\1\r\n\?\r\nseen\r\nxterm", text), text


def read(terminal: int) -> bytes:
    """Read from a terminal, nothing at its end."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


CODES = [
    ("s6-svc -u /run/no", 111),
    ("s6-svc -u /run/service/.s6-svscan", 102),
    ("s6-svstat /run/no", 1),
    ("s6-svwait -t 1000 -D /run/service/main-hermes", 99),
    ("s6-svok /run/service/main-hermes", 0),
    ("s6-svscanctl -a /tmp", 100),
    ("s6-setuidgid nobody-at-all true", 1),
    ("s6-envdir -Lf /run/no true", 111),
    ("s6-svstat -o up,normallyup,wantedup /run/service/main-hermes | grep -x 'true true true'", 0),
    ("s6-svdt /run/service/main-hermes", 0),
]


def test_the_exit_codes_of_s6(container):
    """Those that we look at; the words differ between releases."""
    if not ON_ENGINE and SUITE not in s6_root().name:
        pytest.skip(f"not with the s6 of Debian {SUITE}: another release's codes differ")
    box = container()
    box.start("sleep", "infinity")
    found = [(command, box.exec("sh", "-c", f"PATH=$PATH:/command; {command}").returncode) for command, _ in CODES]
    assert found == CODES
