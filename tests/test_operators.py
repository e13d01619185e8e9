"""What operators see: status, doctor, health and logs, each state and each pitfall produced for real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import MANAGER, RUN, Gateways, accounts
from sandbox import wait_for

STUBBORN = "trap '' TERM\nwhile :; do sleep 0.1; done\n"
ONCE = '[ "$(wc -l < "$folder/starts")" -gt 1 ] || kill -9 $$\nexec sleep infinity\n'
STATES = {
    "up": RUN,
    "killed": ONCE,
    "crashing": "echo 'no API key found' >&2\nexit 1\n",
    "parked": "echo 'bad token'\nexit 78\n",
    "stopped": RUN,
    "stopping": STUBBORN,
    "starting": RUN,
    "no-slot": RUN,
    "no-supervisor": RUN,
}


def status(host: Gateways, *words: str, user: str | None = None) -> dict[str, dict]:
    """Return the rows of `status --json` by name."""
    done = host.box.exec(MANAGER, "status", "--json", *words, user=user)
    assert done.returncode == 0, done
    return {row["name"]: row for row in json.loads(done.stdout)}


def tell_all_states(host: Gateways) -> None:
    """Bring every gateway of STATES into its state."""
    assert wait_for(lambda: host.box.log().count("died too often") > 0, 20)
    assert host.do("stop", "-p", "stopped").returncode == 0
    slot = host.box.path("/run/service/gateway-no-slot")
    assert host.do("unregister", "-p", "no-slot").returncode == 0 and not slot.exists()
    slot = host.box.path("/run/service/gateway-no-supervisor")
    slot.rename(slot.with_name(".hidden"))
    host.box.exec("/command/s6-svscanctl", "-an", "/run/service")
    assert host.box.exec("mkdir", "/run/service/gateway-no-supervisor", user="hermes").returncode == 0
    host.box.exec("/command/s6-svc", "-d", "/run/service/gateway-stopping")
    host.box.exec("/command/s6-svc", "-r", "/run/service/gateway-starting")
    assert wait_for(lambda: host.starts("starting") == 2)
    state = {"desired_state": "running", "gateway_state": "starting", "pid": int(host.pid("starting"))}  # its own word
    (host.folder("starting") / "gateway_state.json").write_text(json.dumps(state))


def test_every_state_is_shown(gateways):
    """In the table and as JSON, the same for root and for hermes, with pid, last exit, and what the next boot does."""
    host = gateways(STATES, "running", environment={"HERMES_GATEWAY_STOP_TIMEOUT": "60"})
    (host.folder("never") / "x").parent.mkdir()
    (host.folder("never") / "SOUL.md").touch()
    assert host.do("register", "-p", "never").returncode == 0
    tell_all_states(host)
    rows = status(host)
    expected = {
        "default": ("up", True, None, True, "running"),
        "up": ("up", True, None, True, "running"),
        "killed": ("up", True, "SIGKILL", True, "running"),
        "crashing": ("crash loop", True, "code 1", True, "running"),
        "parked": ("parked", False, "code 78", True, "running"),
        "stopped": ("down", False, "SIGTERM", False, "stopped"),
        "stopping": ("stopping", False, None, True, "running"),
        "starting": ("starting", True, "SIGTERM", True, "running"),
        "no-slot": ("no slot", None, None, True, "running"),
        "no-supervisor": ("no supervisor", None, None, True, "running"),
        "never": ("down", False, None, False, "never started"),
    }
    shown = {
        name: (row["state"], row["wanted"], row["last_exit"], row["autostart"], row["why"])
        for name, row in rows.items()
    }
    assert shown == expected
    assert next(iter(rows)) == "default" and list(rows)[1:] == sorted(list(rows)[1:])
    assert rows["crashing"]["restarts"] >= 5 and rows["killed"]["restarts"] == 1 and rows["stopped"]["restarts"] == 0
    assert rows["crashing"]["last_line"] == "no API key found" or "waiting" in rows["crashing"]["last_line"]
    assert str(rows["up"]["pid"]) == host.pid("up") and rows["parked"]["pid"] is None
    as_hermes = status(host, user="hermes")
    assert {name: row["state"] for name, row in as_hermes.items()} == {name: row["state"] for name, row in rows.items()}
    table = host.box.exec(MANAGER, "status").stdout.splitlines()
    assert table[0].split("  ")[0] == "PROFILE" and "\033" not in "".join(table)
    start = table[0].index("STATE")
    shown = {line[:start].strip(): line[start:].split("  ")[0] for line in table[1 : table.index("")]}
    states = {name: row["state"] for name, row in rows.items()}
    assert shown == states | {"dashboard": "off"}
    ill = host.box.exec(MANAGER, "health")
    assert ill.returncode == 1
    reasons = "crashing: crash loop; no-supervisor: no supervisor; parked: parked after code 78; no-slot: no slot"
    assert ill.stdout == f"unhealthy: {reasons}\n"


def test_our_reading_of_s6s_files_is_s6s_own(gateways):
    """Straight from supervise/status, and by s6-svstat: the same, in every state."""
    host = gateways(
        {"up": RUN, "killed": ONCE, "crashing": "exit 1\n", "parked": "exit 78\n", "stopping": STUBBORN}, "running"
    )
    assert wait_for(lambda: host.box.log().count("died too often") > 0, 20)
    host.box.exec("/command/s6-svc", "-d", "/run/service/gateway-stopping")
    script = """
import subprocess, sys, time
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
def s6(program, *words):
    return subprocess.run(["/command/" + program, *words], capture_output=True, text=True, check=True).stdout
def fields(status):
    return [status.up, status.pid if status.up else 0, status.wanted, None if status.up else status.ended]
for name in sys.argv[1:]:
    slot = "/run/service/gateway-" + name
    read = hermes_boot.slot_status(slot)
    words = s6("s6-svstat", "-o", "up,pid,wantedup,updownfor,exitcode,signum", slot).split()
    up, pid, wanted, ago, code, signal = [word == "true" if word in ("true", "false") else int(word) for word in words]
    ended = None if up else signal if signal > 0 else max(0, code) << 8
    assert fields(read) == [up, pid if up else 0, wanted, ended] and abs(time.time() - read.since - ago) < 2, name
    times = [int(line.split()[0][9:17], 16) for line in s6("s6-svdt", slot).splitlines()]
    ours = [int(moment) for moment, _ in hermes_boot.deaths(slot)]
    gaps, our_gaps = ([b - a for a, b in zip(row, row[1:])] for row in (times, ours))
    assert len(times) == len(ours) and gaps == our_gaps, name
"""
    done = host.box.exec(
        "/usr/bin/python3", "-IBSc", script, "default", "up", "killed", "crashing", "parked", "stopping"
    )
    assert done.returncode == 0, done.stderr
    assert abs(status(host)["default"]["since"] - time.time()) < 30


def test_status_of_a_hundred_gateways_costs_well_under_a_second(gateways):
    """Each with two supervisors and a logger. CPU time, which other work on this machine does not make longer."""
    profiles = {f"p{number}": RUN for number in range(100)}
    host = gateways(profiles, "running")
    assert wait_for(lambda: sum(row["state"] in ("up", "starting") for row in status(host).values()) == 101, 60)
    for user in (None, "hermes"):
        before = sum(os.times()[2:4])
        assert len(status(host, user=user)) == 101
        assert 0 < sum(os.times()[2:4]) - before < 0.5


def on_terminal(host: Gateways, *words: str, environment: dict[str, str] | None = None) -> str:
    """Return what a program writes to a terminal 100 columns wide."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run(
        host.box.exec_command(list(words), None, environment), stdin=theirs, stdout=theirs, check=True, timeout=30
    )
    os.close(theirs)
    return os.read(ours, 100_000).decode()


@pytest.mark.sandbox
def test_colour_is_for_terminals_only_and_no_color_is_honoured(gateways):
    """And a terminal's width is kept."""
    host = gateways({"a": "echo " + "x" * 300 + "\nexit 78\n"}, "running")
    assert wait_for(lambda: status(host)["a"]["state"] == "parked")
    coloured = on_terminal(host, MANAGER, "status")
    assert "\033[31mparked\033[0m" in coloured
    plain = on_terminal(host, MANAGER, "status", environment={"NO_COLOR": "1"})
    assert "\033" not in plain and max(map(len, plain.splitlines())) == 100


def test_watch_goes_on(gateways):
    """Every second, until it is interrupted."""
    host = gateways({}, "running")
    words = ["sh", "-c", f"echo $$; exec {MANAGER} status --watch 1"]
    watching = subprocess.Popen(host.box.exec_command(words), stdout=subprocess.PIPE)
    pid = watching.stdout.readline().decode().strip()
    for _ in range(2):
        assert any(line.startswith(b"PROFILE") for line in watching.stdout)
    assert host.box.exec("sh", "-c", f"kill -INT {pid}").returncode == 0
    assert watching.wait(20) == 130


@pytest.mark.parametrize(
    "words, environment",
    [(["dashboard"], {}), (["sleep", "infinity"], {"HERMES_RECONCILE": "0"})],
    ids=["dashboard", "off"],
)
def test_a_container_without_gateways_is_healthy(container, tmp_path, words, environment):
    """The gateways on its volume are another container's, so nobody misses them; for root and for hermes."""
    (tmp_path / "volume/profiles/a").mkdir(parents=True)
    (tmp_path / "volume/profiles/a/SOUL.md").touch()
    box = container(environment=environment)
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    box.start(*words)
    assert box.exec("s6-svc", "-r", "/run/service/dashboard", user="hermes").returncode == 0
    assert box.exec("s6-svc", "-r", "/run/service/main-hermes", user="hermes").returncode == 111
    assert (
        box.exec("stat", "-L", "-c", "%U", "/run/service", "/run/service/main-hermes/supervise").stdout
        == "root\nroot\n"
    )
    for user in (None, "hermes"):
        done = box.exec(MANAGER, "health", user=user)
        assert (done.returncode, done.stdout) == (0, "healthy: 0 up, 0 not wanted\n"), done
        done = box.exec(MANAGER, "doctor", user=user)
        assert done.returncode == 0 and "pass  gateways: none here, since " in done.stdout, done
        done = box.exec(MANAGER, "gateway", "register", "-p", "a", user=user)
        assert done.returncode == 1 and "error: this container has no gateways, since " in done.stderr, done


# doctor


def diagnosis(host: Gateways, *words: str, user: str | None = None, **options) -> tuple[int, dict[str, list[dict]]]:
    """Return doctor's code and its checks by what they are about."""
    done = host.box.exec(MANAGER, "doctor", "--json", *words, user=user, **options)
    found: dict[str, list[dict]] = {}
    for check in json.loads(done.stdout):
        found.setdefault(check["check"], []).append(check)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, found


@pytest.mark.overlay
def test_doctor_finds_nothing_on_a_good_container(gateways):
    """Code 0, every line a pass, for root and for hermes."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a") and host.up("default"))
    host.box.exec("chown", "hermes:hermes", "/opt/data/does")  # ours, in this test
    for user in (None, "hermes"):
        code, found = diagnosis(host, user=user)
        assert code == 0 and {check["level"] for checks in found.values() for check in checks} == {"pass"}, found
        assert found["supervisor"][0]["found"] == "s6 is PID 1"


def test_doctor_names_the_way_out_of_every_state(gateways):
    """A crash loop with its log's last lines and likely cause, a parked gateway, one without slot or supervisor, one
    that was stopped."""
    host = gateways(STATES, "running")
    tell_all_states(host)
    code, found = diagnosis(host)
    assert code == 1
    (crash,) = found["crashing"]
    assert crash["level"] == "fail" and "no model or authentication" in crash["found"]
    advice, *said = crash["fix"].split("\n      | ")
    assert advice == "`hermes -p crashing setup`, then `hermes -p crashing gateway start`"
    assert "no API key found" in said, said  # between the lines of finish
    (parked,) = found["parked"]
    assert (
        parked["level"] == "fail"
        and "parked after code 78" in parked["found"]
        and "hermes -p parked setup" in parked["fix"]
    )
    assert (
        "down, as it was left (stopped); to have it up: `hermes -p stopped gateway start`"
        == found["stopped"][0]["found"]
    )
    for name, what in (("no-slot", "it has no slot"), ("no-supervisor", "s6-supervise is not running for it")):
        assert (found[name][0]["level"], found[name][0]["found"], found[name][0]["fix"]) == (
            "fail",
            what,
            "hermes-boot doctor --fix",
        )
    done = host.box.exec(MANAGER, "doctor", "--fix")
    assert (
        "fixed: no-slot: published its slot (started)" in done.stderr
        and "fixed: no-supervisor: published its slot" in done.stderr
    )
    assert wait_for(lambda: host.up("no-slot") and host.up("no-supervisor"))
    assert "fixed:" not in host.box.exec(MANAGER, "doctor", "--fix").stderr


@pytest.mark.sandbox
def test_doctor_finds_what_is_wrong_on_the_volume_and_fixes_what_is_safe(gateways, tmp_path):
    """Owners, readable secrets, folders that are no profiles, versions; a second --fix finds nothing to do."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    box = host.box
    (host.folder("a") / "root.txt").write_text("by docker exec")
    for name in "ab":
        (host.folder(name) / ".env").write_text("API_SERVER_KEY=s3cr3t\nAPI_SERVER_PORT=9000\n")
        (host.folder(name) / ".env").chmod(0o644 if name == "a" else 0o600)
        box.exec("chown", "hermes:hermes", f"/opt/data/profiles/{name}/.env")
    for folder in ("Not A Profile", "nosoul"):
        (host.volume / "profiles" / folder).mkdir()
    (host.volume / ".hermes-agent-version").write_text("99.0\n")
    box.path("/opt/hermes/.venv/lib/python3.11/site-packages/hermes_agent-0.19.0.dist-info").mkdir(parents=True)
    code, found = diagnosis(host)
    assert code == 1
    assert re.match(r"4 of \d+ entries are not hermes's, the first: ", found["owners"][0]["found"])
    assert (found["a"][0]["level"], found["a"][0]["fix"]) == ("warn", "hermes-boot doctor --fix")
    assert (
        found["profiles/'Not A Profile'"][0]["fix"]
        == "/command/s6-setuidgid hermes mv '/opt/data/profiles/Not A Profile' '/opt/data/profiles/NEW-NAME'"
    )
    assert "no SOUL.md" in found["profiles/nosoul"][0]["found"]
    assert "99.0 has run on this volume, the image has 0.19.0" in found["versions"][0]["found"]
    assert "s3cr3t" not in json.dumps(found)
    fixed = box.exec(MANAGER, "doctor", "--fix")
    assert (
        "fixed: owners: gave 4 entries" in fixed.stderr
        and "fixed: a: chmod 600" in fixed.stderr
        and "s3cr3t" not in str(fixed)
    )
    assert (host.folder("a") / ".env").stat().st_mode & 0o777 == 0o600 and (
        host.folder("a") / "root.txt"
    ).stat().st_uid == 10000
    assert "fixed:" not in box.exec(MANAGER, "doctor", "--fix").stderr


def test_doctor_sees_a_log_folder_that_another_container_has_locked(gateways):
    """Two containers with gateways on one volume fight for s6-log's lock; the loser is told."""
    first = gateways({"a": RUN}, "running")
    second = Gateways(gateways.__closure__[0].cell_contents(), {"a": RUN}, "running")
    assert wait_for(lambda: first.up("a"))
    assert wait_for(
        lambda: any("is locked by another container" in check["found"] for check in diagnosis(second)[1]["a"]), 20
    )
    assert "HERMES_RECONCILE=0" in next(
        check["fix"] for check in diagnosis(second)[1]["a"] if "locked" in check["found"]
    )
    assert not any("locked" in check["found"] for check in diagnosis(first)[1]["a"])


VOLUMES = {
    "full": (lambda home: fill(home), "cannot be written: No space left on device", "free some space"),
    "read-only": (
        lambda home: mount(home, "remount,ro"),
        "(tmpfs) cannot be written: Read-only file system",
        "mount it writable",
    ),
}


def fill(home) -> None:
    """Leave no byte free."""
    with open(home / "fill", "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))


def mount(home, options: str) -> None:
    """Mount a small tmpfs, or change it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,{options}", "tmpfs", home], check=True)


@pytest.mark.parametrize("make, found, fix", VOLUMES.values(), ids=VOLUMES)
def test_doctor_tries_the_volume(live, plain, make, found, fix):
    """A small one is warned about, one that takes no write fails."""
    mount(plain.home, "rw")
    try:
        make(plain.home)
        done = plain.reconcile(command=["doctor"])
    finally:
        subprocess.run(["umount", "-l", plain.home], check=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fail  volume")]
    assert found in line and line.endswith(fix)
    assert re.search(r"warn  volume: only [01] MiB are free", done.stdout)


def test_doctor_without_a_supervisor_or_a_volume(plain):
    """Says so, and does not stumble over the rest."""
    plain.profile("a", '{"desired_state": "running"}')
    done = plain.reconcile(command=["doctor"])
    assert (
        done.returncode == 1
        and f"fail  supervisor: no s6-svscan answers on {plain.scandir}; start the container" in done.stdout
    )
    assert "a: " not in done.stdout  # whose slot is not what is wrong
    done = plain.reconcile(command=["doctor"], HERMES_HOME=str(plain.home / "none"))
    assert done.returncode == 1 and "fail  volume: " in done.stdout and "Traceback" not in done.stderr


# logs

WRITER = f"""n=0; while [ $n -lt 30000 ]; do n=$((n + 1)); echo "line $n {"x" * 63}"; done
exec sleep infinity
"""


def test_logs_reads_archives_in_order_and_follows_over_rotations(gateways):
    """Every line once, in order, while s6-log rotates below the reader; -n and --since cut."""
    host = gateways({"a": WRITER})
    assert host.do("start", "-p", "a").returncode == 0
    out = host.volume / "followed"
    with open(out, "wb") as file:
        following = subprocess.Popen(
            host.box.exec_command(["timeout", "40", MANAGER, "logs", "-p", "a", "-f"]), stdout=file
        )
    assert wait_for(lambda: b"line 30000 " in out.read_bytes()[-200:], 40)
    following.kill()
    lines = [int(line.split(b"line ")[1].split()[0]) for line in out.read_bytes().splitlines()]
    assert lines == list(range(1, 30001))
    assert len(list((host.volume / "logs/gateways/a").glob("@*"))) >= 2
    done = host.box.exec(MANAGER, "logs", "-p", "a")
    assert [int(line.split("line ")[1].split()[0]) for line in done.stdout.splitlines()] == lines
    done = host.box.exec(MANAGER, "logs", "-p", "a", "-n", "3", user="hermes")
    assert [line.split("  ")[1].split()[1] for line in done.stdout.splitlines()] == ["29998", "29999", "30000"]
    assert host.box.exec(MANAGER, "logs", "-p", "a", "--since", "1h", "-n", "1").stdout.count("\n") == 1
    assert host.box.exec(MANAGER, "logs", "-p", "a", "--since", "2099-01-01").stdout == ""
    piped = host.box.exec("sh", "-c", f"{MANAGER} logs -p a | head -n 1")
    assert piped.stdout.endswith("line 1 " + "x" * 63 + "\n") and piped.stderr == ""


@pytest.mark.parametrize("words", ["setup", "reconcile", "status", "doctor", "gateway start -p a"])
def test_a_closed_stdout_costs_the_output_alone(gateways, words):
    """As with `>&-`: no traceback, though root works in a process that becomes hermes."""
    host = gateways({"a": RUN})
    done = host.box.exec("sh", "-c", f"{MANAGER} {words} >&-")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done


def test_a_time_span_is_the_containers_own(container):
    """In its timezone, which s6-log's stamps have, though a login shell knows nothing of that."""
    box = container(environment={"TZ": "EST5", "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\necho hello\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    logs = ["env", "-i", MANAGER, "logs", "-p", "default", "--since"]
    assert wait_for(lambda: "hello" in box.exec(*logs, "10m").stdout, 10)
    assert wait_for(lambda: box.exec(*logs, "0s").stdout == "", 10)


@pytest.mark.sandbox
def test_a_log_that_fails_when_it_is_read_costs_its_line_alone(gateways):
    """As on a bad disk or an NFS that has lost it: every other row is there."""
    host = gateways({"a": "echo hello\n" + RUN}, "running")
    current = host.folder("default") / "logs/gateways/a/current"
    assert wait_for(lambda: current.exists() and "hello" in current.read_text())
    assert status(host)["a"]["last_line"]
    host.box.exec("mount", "--bind", "/proc/1/attr/current", "/opt/data/logs/gateways/a/current")
    assert host.box.exec("cat", "/opt/data/logs/gateways/a/current").returncode == 1
    rows = status(host)
    assert rows.keys() == {"a", "default"} and not rows["a"]["last_line"]


def test_a_log_that_is_not_there_is_one_line(plain):
    """With the way to the names."""
    done = plain.reconcile(command=["logs", "-p", "nobody"])
    assert (
        done.returncode == 4
        and done.stderr
        == "hermes_boot.py: error: nobody: no log here; `hermes-boot status` lists gateways,"
        " `docker logs` has the rest\n"
    )
    (plain.home / "logs/gateways/default").mkdir(parents=True)
    (plain.home / "logs/gateways/default/current").write_text("2026-11-29 10:00:00.000000000  line\n")
    words = [sys.executable, "-IS", str(plain.stub), "logs"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            words, env={"HERMES_HOME": str(plain.home)}, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and "error: stdout cannot be used (No space left on device)" in done.stderr
    done = plain.reconcile(command=["logs", "--since", "yesterday"])
    assert done.returncode == 2 and "neither a time span (30s, 10m, 2h, 1d) nor a date" in done.stderr


# help


@pytest.mark.parametrize("command", ["", "status", "doctor", "health", "logs", "gateway", "setup", "reconcile"])
def test_help_is_everywhere(plain, command):
    """With examples wherever there is something to choose."""
    done = plain.reconcile(command=[*command.split(), "--help"])
    assert (
        done.returncode == 0
        and done.stdout.startswith(f"usage: hermes_boot.py {command}".rstrip())
        and done.stderr == ""
    )
    assert "examples:\n" in done.stdout and not plain.scandir.exists()


def test_all_of_no_gateways(plain):
    """To stop them is done; to start them is not."""
    plain.scandir.mkdir()
    assert plain.reconcile(command=["gateway", "stop", "--all"]).returncode == 0
    done = plain.reconcile(command=["gateway", "start", "--all"])
    line = "hermes_boot.py: error: this container has no gateways; `hermes-boot doctor` says why\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_version(plain):
    """Ours and the agent's."""
    said = plain.reconcile(command=["--version"]).stdout
    assert re.fullmatch(r"hermes_boot\.py \d+\.\d+\.\d+, hermes-agent missing\n", said)


@pytest.mark.parametrize(
    "words",
    [["--dry-run", "setup"], ["--dry-run", "reconcile"], ["reconcile", "--dry-run"], ["--dry-run"]],
    ids=" ".join,
)
def test_a_dry_run_is_one_wherever_the_option_is(plain, words):
    """And what has none is refused."""
    if "reconcile" not in words and os.geteuid() and any(accounts(path)[1] for path in ("/etc/passwd", "/etc/group")):
        pytest.skip("this machine's hermes is somebody else, as whom a setup is not to be started")
    before = sorted(plain.home.iterdir())
    done = plain.reconcile(command=words)
    assert (
        done.returncode == 0
        and "would " in done.stdout
        and not plain.scandir.exists()
        and sorted(plain.home.iterdir()) == before
    )
    assert plain.reconcile(command=["--dry-run", "shutdown"]).returncode == 2


def test_what_doctor_says_to_paste_is_harmless(gateways):
    """Names and versions from the volume are one word of the shell, and nothing to a terminal."""
    host = gateways({}, "")
    nasty = "x'$(touch /tmp/pwned) #\"\n\033[31m"
    (host.volume / "profiles" / nasty).mkdir(parents=True)
    (host.volume / ".hermes-agent-version").write_text("\033]0;title\007")
    done = host.box.exec(MANAGER, "doctor")
    assert "\033" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if " mv " in line]
    pasted = line.partition("; ")[2]
    assert host.box.exec("bash", "-c", pasted).returncode == 0 and (host.volume / "profiles/NEW-NAME").is_dir()
    assert not host.box.path("/tmp/pwned").exists()


def test_other_files_in_a_log_folder_are_in_no_archives_way(plain):
    """However many."""
    folder = plain.home / "logs/gateways/default"
    folder.mkdir(parents=True)
    for number in range(150):
        (folder / f"z{number}").touch()
    (folder / "@40000000000000000000000a.s").write_text("2026-01-01 00:00:00.0  old\n")
    (folder / "current").write_text("2026-01-02 00:00:00.0  new\n")
    assert plain.reconcile(command=["logs"]).stdout.count("\n") == 2


TROUBLE = [["status"], ["doctor"], ["doctor", "--fix"], ["gateway", "status"], ["logs"]]


@pytest.mark.parametrize("command", TROUBLE, ids=" ".join)
@pytest.mark.parametrize(
    "make", [lambda home: home.rmdir(), lambda home: (home.rmdir(), home.touch())], ids=["missing", "a file"]
)
def test_a_home_that_is_none_is_one_line(plain, command, make):
    """For every command."""
    make(plain.home)
    done = plain.reconcile(command=command)
    assert done.returncode in (1, 4) and "Traceback" not in done.stderr and done.stdout + done.stderr


@pytest.mark.parametrize(
    "words", [["--since", "99999999999999d"], ["--since", "2026-13-99"], ["--since", "\u00b2h"]], ids=" ".join
)
def test_times_that_are_none(plain, words):
    """A usage error, or a time before all others."""
    done = plain.reconcile(command=["logs", *words])
    assert done.returncode in (2, 4) and "Traceback" not in done.stderr


def test_a_slot_whose_profile_is_gone(gateways):
    """doctor says so, and --fix removes it."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    host.folder("a").rename(host.volume / "away")
    found = diagnosis(host)[1]
    assert (
        found["a"][0]["found"] == "has a slot, but its profile is gone"
        and "gateway unregister -p a" in found["a"][0]["fix"]
    )
    assert "fixed: a: removed its slot" in host.box.exec(MANAGER, "doctor", "--fix").stderr
    assert "a" not in diagnosis(host)[1] and host.do("unregister", "-p", "a").returncode == 4


def test_whoever_reads_may_stop(gateways):
    """`status --watch | head`: no traceback."""
    host = gateways({"a": RUN})
    done = host.box.exec("sh", "-c", f"{MANAGER} status --watch 1 | head -n 1; sleep 1")
    assert done.stdout.startswith("PROFILE") and done.stderr == ""


def test_a_dashboard_that_dies_stays_down_and_doctor_says_so(container):
    """Five deaths in five minutes are enough."""
    box = container(environment={"HERMES_DASHBOARD": "1"})
    box.put_agent("#!/bin/sh\nexit 1\n")
    box.start("sleep", "infinity")
    assert wait_for(lambda: "dashboard: died 5 times in five minutes, so it stays down" in box.log(), 15)
    done = box.exec(MANAGER, "doctor")
    assert done.returncode == 1 and "fail  dashboard: does not run; " in done.stdout
    assert box.exec(MANAGER, "health", "--live").stdout == "live: the supervisor answers\n"
