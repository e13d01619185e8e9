"""What people see on a terminal: it fits, a command is never broken, and what takes long says what it waits for."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import termios
import time

import pytest
from conftest import MANAGER, RUN, Gateways, busy
from sandbox import wait_for

import hermes_boot

STUBBORN = "trap '' TERM\nwhile :; do sleep 0.1; done\n"
LONG = "no API key found for this provider, and this line goes on and on until no terminal can hold it"
PROFILES = {
    "a-profile-with-a-rather-long-name": RUN,
    "crashing": f"echo '{LONG}' >&2\necho '│  a banner  │'\nexit 1\n",
    "parked": "echo 'bad token'\necho '--- *** ---'\nexit 78\n",
    "talking": f"echo '{LONG}'\nexec sleep infinity\n",
}


def terminal(host: Gateways, *words: str, width: int = 80, **environment: str) -> str:
    """Return what a program writes to a terminal, both its outputs."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    argv = host.box.exec_command(list(words), None, environment)
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            parts.append(os.read(ours, 65536))
        except OSError:  # EIO: the last one who had the terminal has ended
            break
    process.wait(30)
    os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


def bare(text: str) -> str:
    """Return a text without its colours."""
    return re.sub(r"\033\[\d*m", "", text)


@pytest.fixture
def host(gateways) -> Gateways:
    """Gateways that are well and not well."""
    host = gateways(PROFILES, "running")
    assert wait_for(lambda: host.box.log().count("died too often") > 0, 30)
    assert wait_for(lambda: host.up("talking"), 30)
    (host.folder("Not A Profile")).mkdir()
    (host.folder("parked") / ".env").touch(0o644)
    return host


@pytest.mark.sandbox
def test_a_long_failure_leaves_room_for_the_rest(host):
    """As Telegram's: on a terminal it is cut, and elsewhere whole."""
    failure = "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running"
    platforms = {"telegram": {"state": "fatal", "error_message": failure}}
    state = host.state("talking") | {"pid": int(host.pid("talking")), "platforms": platforms}
    (host.folder("talking") / "gateway_state.json").write_text(json.dumps(state))
    text = bare(terminal(host, MANAGER, "status", width=120))
    assert "telegram: Conflict: " in text and "SINCE" in text and "NEXT BOOT" in text, text
    assert f"telegram: {failure} " in host.box.exec(MANAGER, "status").stdout


@pytest.mark.sandbox
def test_a_terminals_width_is_kept(host):
    """WANTED and RESTARTS go first; a last line is cut, and below a gateway that is not well it has a line of its own.
    A pipe gets all of it, a line each."""
    for width in (80, 100, 140):
        lines = bare(terminal(host, MANAGER, "status", width=width)).splitlines()
        assert max(map(len, lines)) <= width, width
        header = lines[0]
        assert ("WANTED" in header) <= ("RESTARTS" in header) <= ("STATE" in header)
        assert ("WANTED" in header) == (width >= 140)
        below = "\n".join(line for line in lines if line.startswith("    "))
        assert "no API key found" in below or "next start at" in below
        assert width > 80 or any(line.endswith("…") for line in lines)
        assert "    bad token" in lines
    (piped,) = [line for line in host.box.exec(MANAGER, "status").stdout.splitlines() if line.startswith("talking")]
    assert piped.endswith(LONG)


def test_what_there_is_to_know_of_a_gateway(host):
    """Memory, restarts since the boot, platforms by its own word while it runs, and until when a crash loop waits; at
    the end a line that sums up. The image's services have rows, and none in JSON."""
    state = host.state("talking")
    platforms = {"telegram": {"state": "connected"}, "discord": {"state": "retrying"}, "x": 3}
    state |= {"pid": int(host.pid("talking")), "platforms": platforms}
    (host.folder("talking") / "gateway_state.json").write_text(json.dumps(state))
    (host.folder("parked") / "gateway_state.json").write_text(json.dumps(state | {"pid": 1}))
    rows = {row["name"]: row for row in json.loads(host.box.exec(MANAGER, "status", "--json").stdout)}
    assert set(rows) == {"default", *PROFILES}
    states = {name: platform["state"] for name, platform in rows["talking"]["platforms"].items()}
    assert states == {"telegram": "connected", "discord": "retrying"}
    assert rows["parked"]["platforms"] is None and rows["parked"]["last_line"] == "bad token"
    status = host.box.exec("sh", "-c", f"grep VmRSS /proc/{host.pid('talking')}/status").stdout
    assert abs(rows["talking"]["memory"] - int(status.split()[1]) * 1024) < 1 << 20
    assert rows["parked"]["memory"] is None
    assert rows["crashing"]["restarts_since_boot"] >= 4 and rows["talking"]["restarts_since_boot"] == 0
    assert wait_for(lambda: waiting(host) is not None, 20)
    assert time.time() - 1 < waiting(host) < time.time() + 61
    text = host.box.exec(MANAGER, "status").stdout
    assert re.search(rf"^crashing .*next start at \d\d:\d\d:\d\d: {LONG}$", text, re.M), text
    assert re.search(r"^talking +up, discord: retrying .* telegram ", text, re.M)
    assert re.search(r"^dashboard +off .* down .* service", text, re.M)
    assert re.search(r"\n\n5 gateways: 3 up, .*1 parked", text)


def waiting(host: Gateways) -> float | None:
    """Return when the crash loop's next start is, None while it runs."""
    (row,) = json.loads(host.box.exec(MANAGER, "status", "-p", "crashing", "--json").stdout)
    return row["waits_until"]


@pytest.mark.sandbox
def test_doctors_commands_are_whole(host):
    """Filled for the terminal, in colour, yet each command stands in one line; NO_COLOR is honoured, and a pipe gets a
    line for each check."""
    text = terminal(host, MANAGER, "doctor")
    assert "\033[31mfail\033[0m" in text and "\033[33mwarn\033[0m" in text and "\033[32mpass\033[0m" in text
    lines = [line.strip() for line in bare(text).splitlines()]
    for command in (
        "`hermes -p crashing setup`, then `hermes -p crashing gateway start`",
        "hermes-boot doctor --fix",
        "/command/s6-setuidgid hermes mv '/opt/data/profiles/Not A Profile' '/opt/data/profiles/NEW-NAME'",
    ):
        assert command in lines, text
    long = [line for line in bare(text).splitlines() if len(line) > 80]
    assert all(" chown " in line or line.startswith("      /command/") for line in long), long  # a command is whole
    assert "\033" not in terminal(host, MANAGER, "doctor", NO_COLOR="1")
    piped = host.box.exec(MANAGER, "doctor").stdout
    assert re.search(r"^warn  parked: \.env can be read by everyone; hermes-boot doctor --fix$", piped, re.M)


def test_filling_breaks_no_command():
    """Words go to the next line, what is in backticks as one of them."""
    text = "it does not run; `docker logs` says why, then (see `a b c d e f g`)."
    assert hermes_boot.filled(text, 30).split("\n      ") == [
        "it does not run;",
        "`docker logs` says why,",
        "then (see",
        "`a b c d e f g`).",
    ]
    assert hermes_boot.filled("a `b", 30) == "a `b"


@pytest.mark.long
@pytest.mark.sandbox
def test_a_long_stop_says_what_it_waits_for(gateways):
    """After 2 s: in a pipe once every 10 s, on a terminal in one line that counts and is cleared at the end; a short
    one says nothing."""
    host = gateways({"a": STUBBORN, "b": RUN}, "running", environment={"HERMES_GATEWAY_STOP_TIMEOUT": "3"})
    assert wait_for(lambda: host.up("a") and host.up("b"), 20)
    line = "hermes-boot: info: waiting for 1 of 3 gateways to end: a"
    assert host.do("stop", "-p", "b").stderr == ""
    assert host.do("stop", "--all").stderr == line + "\n"
    assert host.do("start", "-p", "a").returncode == 0
    assert wait_for(lambda: host.up("a"), 20)
    text = terminal(host, MANAGER, "gateway", "stop", "--all")
    assert text.startswith(f"\r{line}\033[K") and f"\033[K\r\033[K{'a: stopped'}" in text


OFTEN = """
import sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
class Often(hermes_boot.Progress):
    def tell(self, text):
        self.due = 0
        super().tell(text)
hermes_boot.Progress = Often
sys.exit(hermes_boot.main(["hermes-boot", "gateway", "stop", "--all"]))
"""


def test_what_is_waited_for_is_never_nobody(gateways):
    """Whenever the line is due."""
    host = gateways({"a": f"trap 'sleep {busy()}; exit 0' TERM\nwhile :; do sleep 0.05; done\n"}, "running")
    assert wait_for(lambda: host.up("a"))
    done = host.box.exec("/usr/bin/python3", "-IBSc", OFTEN)
    assert done.returncode == 0 and "gateways to end" in done.stderr and "waiting for 0 " not in done.stderr, done


@pytest.mark.parametrize("folders", [3, 100], ids=["one process", "shared"])
def test_a_long_sweep_says_how_far_it_is(plain, capfd, folders):
    """What it does and how many entries of how many it has seen; in quiet boots nothing."""
    for number in range(folders):
        (plain.home / f"workspace/{number}/below").mkdir(parents=True)
    environment = {"HERMES_HOME": str(plain.home)}
    for quiet in (False, True):
        boot = hermes_boot.Boot(environment | {"HERMES_BOOT_QUIET": str(int(quiet))}, dry_run=True)
        boot.owner = (4321, 4321)
        sweep = hermes_boot.Sweep(boot)
        sweep.progress.due = min(sweep.progress.due, time.monotonic() if not quiet else float("inf"))
        with hermes_boot.Folder(str(plain.home)) as home:
            sweep.home = sweep.place(home.fd)
            sweep.volume(home, ["workspace"])
        said = capfd.readouterr().err
        if quiet:
            assert said == ""
        else:
            assert re.fullmatch(
                r".*: info: (giving|owners on) /\S+( to 4321:4321)?: \d+( of at most [\d,]+)? entries\n", said
            )
            assert sweep.checked == 2 * folders + 1


class Dying(hermes_boot.Sweep):
    """A sweep whose helping processes die, each at the first folder that it takes."""

    def tree(self, folder, first=None):
        if self.output >= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().tree(folder, first)


def test_a_sweep_does_the_work_of_processes_that_were_killed(plain, capfd):
    """No folder is passed over, and one line says what happened."""
    for number in range(100):
        (plain.home / f"workspace/{number}").mkdir(parents=True)
        (plain.home / f"workspace/{number}/file").touch()
    boot = hermes_boot.Boot({"HERMES_HOME": str(plain.home)}, dry_run=True)
    boot.owner = (4321, 4321)
    for kind in (Dying, hermes_boot.Sweep):
        sweep = kind(boot)
        with hermes_boot.Folder(str(plain.home)) as home:
            sweep.home = sweep.place(home.fd)
            sweep.volume(home, ["workspace"])
        assert sweep.checked == sweep.changed == 201
        assert (capfd.readouterr().err.count("its work is done again") == 1) is (kind is Dying)
