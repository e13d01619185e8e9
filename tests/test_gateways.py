"""Gateways on real s6: the manager, its command line, the `hermes` command, crashes, and the end.

Where a gateway has to misbehave on command, a child made for that stands in the agent's place: it reads what to do from
a file. What hermes-agent itself does to our slots, and we to its, is shown with the real program.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from itertools import pairwise

import pytest
from conftest import MANAGER, RUN, Gateways, busy
from sandbox import wait_for

BEFORE = {
    "down": (RUN, ""),
    "up": (RUN, "running"),
    "parked": ("exit 78\n", "running"),
    "crashing": ("exit 1\n", "running"),
    "missing": None,
}
EITHER = {
    0: "started",
    1: "is parked",
}  # a start is done once the process is up: of one that ends right then, both can be seen
# state before, command: exit code, up afterwards, intent recorded
RESULTS = {
    ("down", "start"): (0, True, "running"),
    ("down", "stop"): (0, False, "stopped"),
    ("down", "restart"): (0, True, "running"),
    ("down", "status"): (3, False, None),
    ("down", "register"): (1, False, None),
    ("down", "unregister"): (0, None, None),
    ("up", "start"): (0, True, "running"),
    ("up", "stop"): (0, False, "stopped"),
    ("up", "restart"): (0, True, "running"),
    ("up", "status"): (0, True, "running"),
    ("up", "register"): (1, True, "running"),
    ("up", "unregister"): (0, None, "running"),
    ("parked", "start"): (EITHER, False, "running"),
    ("parked", "stop"): (0, False, "stopped"),
    ("parked", "restart"): (EITHER, False, "running"),
    ("parked", "status"): (3, False, "running"),
    ("parked", "unregister"): (0, None, "running"),
    ("crashing", "stop"): (0, False, "stopped"),
    ("crashing", "unregister"): (0, None, "running"),
    ("missing", "start"): (0, True, "running"),
    ("missing", "stop"): (4, None, None),
    ("missing", "restart"): (4, None, None),
    ("missing", "status"): (4, None, None),
    ("missing", "register"): (0, False, None),
    ("missing", "unregister"): (4, None, None),
}


@pytest.mark.parametrize("user", [None, "hermes"], ids=["root", "hermes"])
@pytest.mark.parametrize("before", BEFORE)
def test_every_command_from_every_state(gateways, before, user):
    """One container per state and user: each command finds that state, and leaves what the table says."""
    does, state = BEFORE[before] or (RUN, "")
    commands = [command for known, command in RESULTS if known == before]
    host = gateways({f"p-{command}": does for command in commands}, state)
    if before in ("parked", "crashing"):
        assert wait_for(lambda: all(host.starts(f"p-{command}") > (before == "crashing") for command in commands))
        time.sleep(0.2)
    for command in commands:
        name = f"p-{command}"
        if before == "missing":
            assert host.do("unregister", "-p", name).returncode == 0
        code, up, intent = RESULTS[before, command]
        done = host.do(command, "-p", name, user=user)
        if code is EITHER:
            assert EITHER[done.returncode] in done.stdout + done.stderr
            assert wait_for(lambda: not host.up(name))
        else:
            assert done.returncode == code, (command, done)
        if done.returncode and command != "status":
            assert len(done.stderr.splitlines()) == 1 and name in done.stderr
        slot = host.box.path(f"/run/service/gateway-{name}")
        assert slot.exists() is (up is not None)
        assert not up or wait_for(lambda: host.up(name))
        assert up is not False or wait_for(lambda: not host.up(name), 1)
        file = host.folder(name) / "gateway_state.json"
        assert (json.loads(file.read_text()).get("desired_state") if file.exists() else None) == intent
        assert not file.exists() or file.stat().st_uid == 10000
    left = [path.name for path in host.box.path("/run/service").iterdir() if path.name.startswith(".gateway")]
    assert left == []
    assert (
        host.box.exec("find", "/opt/data", "-user", "root", "-newer", "/run/s6/workdir", "-name", "*state*").stdout
        == ""
    )


def test_other_keys_of_the_state_survive(gateways):
    """The operator's intent is one key among the gateway's own."""
    host = gateways({"a": RUN}, "running")
    assert host.do("stop", "-p", "a").returncode == 0
    assert host.state("a") == {"desired_state": "stopped", "kept": [1, {"a": None}]}


def test_a_stopped_gateway_stays_stopped_over_a_restart_and_a_killed_one_comes_back(gateways):
    """Intent survives `docker restart`; a crash is not an intent."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    assert host.do("stop", "-p", "a").returncode == 0
    killed = host.pid("b")
    host.box.exec("sh", "-c", f"kill -9 {killed}")
    started = time.monotonic()
    assert wait_for(lambda: host.up("b") and host.pid("b") != killed, 5)
    assert time.monotonic() - started < 2 * busy()
    host.box.restart()
    assert wait_for(lambda: host.up("b")) and not host.up("a") and host.up("default")


def test_the_nearest_name_is_offered_and_all_goes_on_past_a_failure(gateways):
    """Both name what failed."""
    host = gateways({"coder": RUN, "gone": RUN})
    done = host.do("stop", "-p", "codre")
    assert done.returncode == 4 and "no such gateway: codre; did you mean coder?" in done.stderr
    slot = host.box.path("/run/service/gateway-gone")
    slot.rename(slot.with_name(".hidden"))
    assert host.box.exec("/command/s6-svscanctl", "-an", "/run/service").returncode == 0
    slot.mkdir()
    done = host.do("start", "--all")
    assert done.returncode == 1 and done.stdout == "coder: started\ndefault: started\n"
    *_, line = done.stderr.splitlines()  # what it waited for comes before
    assert line.endswith("error: gone: no supervisor answers within 10 s; run `hermes-boot doctor`")
    assert host.up("coder") and host.up("default")


def test_list_and_status(gateways):
    """A name a line, and a table."""
    host = gateways({"a": RUN}, "running")
    wait_for(lambda: host.up("a"))
    assert host.do("list").stdout == "a\ndefault\n"
    assert re.search(rf"^a +(up|starting) +\d+s +{host.pid('a')} ", host.do("status", "-p", "a").stdout, re.M)


USAGE = [
    [],
    ["dance"],
    ["start", "stop"],
    ["start", "--all", "-p", "a"],
    ["register", "--all"],
    ["start", "-p"],
    ["start", "--what"],
]


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage_is_code_2(plain, words):
    """With the usage, and nothing done."""
    done = plain.reconcile(command=["gateway", *words])
    assert done.returncode == 2 and "usage: hermes_boot.py" in done.stderr


@pytest.mark.parametrize("kind", ["folder", "link", "unreadable"])
def test_a_command_is_carried_out_even_if_it_cannot_be_remembered(gateways, kind):
    """Code 1, since the next boot will not know; but the gateway does what it was told."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    file = host.folder("a") / "gateway_state.json"
    file.unlink()
    {
        "folder": lambda: file.mkdir(),
        "link": lambda: file.symlink_to("/etc/shadow"),
        "unreadable": lambda: file.touch(0),
    }[kind]()
    for action, up in (("stop", False), ("start", True)):
        done = host.do(action, "-p", "a")
        assert done.returncode == 1 and "a: done, but gateway_state.json " in done.stderr and host.up("a") is up, done


def test_what_cannot_be_read_of_a_state_is_kept_beside(gateways):
    """Legal JSON that is too deep for us: nothing of it is lost, with several gateways at once neither."""
    host = gateways({"a": RUN, "b": RUN}, "")
    for name in "ab":
        file = host.folder(name) / "gateway_state.json"
        file.write_text('{"a": ' + "[" * 30000 + "]" * 30000 + "}")
        os.chown(file, 10000, 10000)
    done = host.do("start", "--all")
    assert done.returncode == 0 and done.stderr.count("the old one is gateway_state.json.bad") == 2, done
    for name in "ab":
        assert host.state(name) == {"desired_state": "running"}
        assert len((host.folder(name) / "gateway_state.json.bad").read_text()) == 60007


@pytest.mark.long
def test_many_restarts_are_no_crash_loop(gateways):
    """An end that the operator asked for is no death."""
    host = gateways({"a": RUN}, "running")
    for _ in range(6):
        assert host.do("restart", "-p", "a").returncode == 0
    assert host.box.exec(MANAGER, "health").returncode == 0
    (row,) = json.loads(host.box.exec(MANAGER, "status", "-p", "a", "--json").stdout)
    assert row["state"] in ("starting", "up") and row["restarts"] == 0 and row["last_exit"] == "SIGTERM"


def test_the_commands_stderr_stays_blocking(gateways):
    """s6-log makes its output non-blocking, which is not the command's file then."""
    host = gateways({"a": "echo line\nexec sleep infinity\n"}, "running")
    host.box.stop()
    script = "import os, time; time.sleep(1); print([os.get_blocking(fd) for fd in (0, 1, 2)])"
    assert host.box.run("python3", "-c", script, input=b"").stdout == b"[True, True, True]\n"


def test_a_running_gateways_files_are_its_own(gateways):
    """A reconcile by hand in a running container leaves them; without arguments hermes-boot only shows its help."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    (host.folder("a") / "gateway.pid").write_text("1")
    pid = host.pid("a")
    assert host.box.exec(MANAGER, "reconcile").returncode == 0
    assert "usage: hermes-boot" in host.box.exec("hermes-boot").stdout
    assert (host.folder("a") / "gateway.pid").exists() and host.pid("a") == pid


def test_a_hanging_gateway_is_killed_after_the_stop_timeout(gateways):
    """SIGKILL comes from s6, by the slot's own timeout-kill."""
    host = gateways(
        {"a": "trap '' TERM\nwhile :; do sleep 0.1; done\n"},
        "running",
        environment={"HERMES_GATEWAY_STOP_TIMEOUT": "1"},
    )
    assert wait_for(lambda: host.up("a"))
    started = time.monotonic()
    assert host.do("stop", "-p", "a").returncode == 0
    assert 1 <= time.monotonic() - started < 3 * busy() and not host.up("a")


@pytest.mark.long
def test_a_crashing_gateway_backs_off_and_a_start_ends_that_at_once(gateways):
    """Five deaths within a minute, then waits; mended, the next start stays up."""
    host = gateways({"a": "exit 1\n"}, "running")
    assert wait_for(lambda: "waiting 2 s before the next start" in host.box.log(), 20), host.box.log()
    assert host.starts("a") == 5
    assert wait_for(lambda: "waiting 4 s before the next start" in host.box.log(), 20)
    (host.folder("a") / "does").write_text(RUN)
    start = subprocess.Popen(host.box.exec_command([MANAGER, "gateway", "start", "-p", "a"], "hermes"))
    assert wait_for(lambda: host.starts("a") == 7, 3) and host.up("a") and start.wait(10) == 0
    assert wait_for(lambda: not any("timeout 4 cat back-off" in line for line in host.box.processes().values()), 2)


def test_a_stop_in_a_back_off_is_at_once(gateways):
    """And so is the container's end."""
    host = gateways({"a": "exit 1\n", "b": "exit 1\n"}, "running")
    assert wait_for(lambda: host.box.log().count("waiting 4 s before the next start") == 2, 30)
    started = time.monotonic()
    assert host.do("stop", "-p", "a").returncode == 0
    assert time.monotonic() - started < 1 * busy()
    started = time.monotonic()
    host.box.stop()
    assert time.monotonic() - started < 2 * busy()


def test_a_misconfigured_gateway_parks(gateways):
    """Code 78 is EX_CONFIG: one start, no loop."""
    host = gateways({"a": "exit 78\n"}, "running")
    assert wait_for(lambda: host.starts("a") == 1)
    time.sleep(2.5)
    assert host.starts("a") == 1 and not host.up("a")
    (host.folder("a") / "does").write_text(RUN)
    assert host.do("start", "-p", "a").returncode == 0 and host.up("a")


# Two files, since it may be ended while it writes one. No more lines than s6-log keeps.
COUNTER = """n=$(cat "$folder"/count.* 2>/dev/null | sort -n | tail -n 1) zeros=$(printf %0200d 0)
while [ "${n:-0}" -lt 30000 ]; do
  n=$((n + 1)); echo "line $n $zeros" >&$((n % 2 + 1)); echo $n >"$folder/count.$((n % 2))"
done
exec sleep infinity
"""


@pytest.mark.long
def test_no_line_is_lost_or_doubled_over_restarts_and_rotation(gateways):
    """stdout and stderr alike, in the container's log and in the profile's, over three restarts and a rotation at 1
    MB."""
    host = gateways({"a": COUNTER}, "running")

    def count() -> int:
        return max((int(path.read_text() or 0) for path in host.folder("a").glob("count.*")), default=0)

    for _ in range(3):
        assert wait_for(lambda: count() > 0, 10)
        time.sleep(0.7)
        assert host.do("restart", "-p", "a").returncode == 0
    assert wait_for(lambda: count() > 6000, 60 * busy())
    assert host.do("stop", "-p", "a").returncode == 0
    last = count()
    logs = host.volume / "logs/gateways/a"

    def files() -> list[str]:
        return [path.read_text() for path in (*sorted(logs.glob("@*")), logs / "current")]

    assert wait_for(lambda: all(f"line {last} " in text for text in ("".join(files()), host.box.log())))
    archives = sorted(logs.glob("@*"))
    assert archives, "no rotation happened"
    kept = [
        int(number) for file in [*archives, logs / "current"] for number in re.findall(r"line (\d+) ", file.read_text())
    ]
    shown = [int(number) for number in re.findall(r"line (\d+) ", host.box.log())]
    for numbers in (kept, shown):
        # a kill between a line and its count makes the next run say that number again: at most once a restart
        repeated = [number for before, number in pairwise(numbers) if number != before + 1]
        assert len(repeated) <= 3 and set(numbers) == set(range(1, max(numbers) + 1)) and max(numbers) >= last
    assert kept == shown


DRAIN = "trap 'sleep 2; echo drained; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n"


def test_the_end_drains_all_in_parallel_and_marks_nobody_stopped(gateways):
    """Five gateways of 2 s each and a command end together well below Docker's 10 s, and all come back."""
    host = gateways(dict.fromkeys("abcde", DRAIN), "running")
    assert wait_for(lambda: host.box.log().count("ready") == 5)
    started = time.monotonic()
    assert host.box.stop() == 143
    assert 2 <= time.monotonic() - started < 4 * busy()
    assert host.box.log().count("drained") == 5
    assert {host.state(name)["desired_state"] for name in "abcde"} == {"running"}
    host.box.start("sleep", "infinity")
    assert wait_for(lambda: all(host.up(name) for name in "abcde"))


def test_the_cmd_is_told_to_end_with_the_gateways(container):
    """It gets SIGTERM at once, not the final kill, and its own code is the container's."""
    box = container()
    box.start("sh", "-c", "trap 'sleep 1; echo goodbye; exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    assert wait_for(lambda: "ready" in box.log())
    started = time.monotonic()
    assert box.stop() == 5
    assert time.monotonic() - started < 3 * busy() and "goodbye" in box.log()


def test_a_gateway_gets_all_of_the_shutdown_timeout(gateways):
    """6 s are more than the 5 that s6-overlay gives a cont-finish.d script unless told otherwise."""
    host = gateways({"a": DRAIN.replace("sleep 2", "sleep 6")}, "running")
    assert wait_for(lambda: "ready" in host.box.log())
    assert host.box.stop() == 143
    assert "drained" in host.box.log()


def test_nobody_can_stop_the_end(gateways):
    """Not by stopping the process that waits for the gateways, nor by a slot on which s6's own programs would wait."""
    stopper = (
        "trap 'while :; do pkill -STOP -f 10-hermes-shutdown; sleep 0.01; done' TERM\nwhile :; do sleep 0.05; done\n"
    )
    fifos = (
        "for name in supervise/control supervise/status; do mkfifo $name; done;"
        " sleep infinity <>supervise/control & exec sleep infinity"
    )
    host = gateways({"a": stopper}, "running", environment={"HERMES_SHUTDOWN_TIMEOUT": "1"})
    assert wait_for(lambda: host.up("a"))
    host.box.exec(
        "sh",
        "-c",
        f"mkdir -p /run/service/gateway-b/supervise && cd /run/service/gateway-b && ({fifos}) >&- 2>&- &",
        user="hermes",
    )
    started = time.monotonic()
    host.box.stop(20)
    assert time.monotonic() - started < 5 * busy()


def test_a_slot_that_answers_nobody_does_not_hold_up_the_others(gateways):
    """Its control FIFO is hermes's own, and full: stop --all says so after some seconds."""
    host = gateways({"a": RUN, "z": RUN}, "running", environment={"HERMES_GATEWAY_STOP_TIMEOUT": "1"})
    assert wait_for(lambda: host.up("a") and host.up("z"))
    script = "rm control; mkfifo control; exec 3<>control; yes | dd of=control oflag=nonblock; exec sleep 300 <>control"
    words = host.box.exec_command(["sh", "-c", f"cd /run/service/gateway-a/supervise; {script}"], "hermes")
    holder = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)
    done = host.do("stop", "--all")
    assert done.returncode == 1 and "a: no supervisor answers within 6 s" in done.stderr and not host.up("z"), done
    holder.kill()


def test_the_end_has_a_limit(gateways):
    """A gateway that does not end is killed after HERMES_SHUTDOWN_TIMEOUT seconds."""
    host = gateways(
        {"a": "trap '' TERM\necho ready\nwhile :; do sleep 0.1; done\n"},
        "running",
        environment={"HERMES_SHUTDOWN_TIMEOUT": "1"},
    )
    assert wait_for(lambda: "ready" in host.box.log())
    started = time.monotonic()
    assert host.box.stop() == 143
    assert 1 <= time.monotonic() - started < 3 * busy()


def test_a_short_command_pays_no_grace(container):
    """`docker run --rm IMAGE true`, with gateways idle or none: no fixed wait at its end."""
    box = container()
    box.run("true")
    times = []
    for _ in range(3):
        started = time.monotonic()
        assert box.run("true").returncode == 0
        times.append(time.monotonic() - started)
    assert min(times) < 1.5 * busy()


@pytest.mark.long
def test_sixty_gateways_start_and_stop_as_one(gateways):
    """One call, in parallel: gateways that each take 2 s to end are all gone in a fraction of 60 times that."""
    host = gateways({f"p{number}": "trap 'sleep 2; exit 0' TERM\nsleep infinity & wait\n" for number in range(60)})
    done = host.do("start", "--all")
    assert done.returncode == 0 and done.stdout.count(": started") == 61, done.stderr
    assert wait_for(lambda: all(host.starts(f"p{number}") for number in range(60)), 60)
    started = time.monotonic()
    done = host.do("stop", "--all")
    assert done.returncode == 0 and done.stdout.count(": stopped") == 61, done.stderr
    assert 2 <= time.monotonic() - started < 40


FORMS = {
    "gateway start": True,
    "-p a gateway stop": True,
    "--profile a gateway restart": True,
    "--profile=a gateway start": True,
    "gateway stop --all": True,
    "gateway restart --system": False,
    "gateway stop --help": False,
    "gateway status": False,
    "gateway": False,
    "-v gateway stop": False,
    "gateway stop --all --force": False,
    "chat -q gateway stop": False,
}


def test_the_hermes_command_answers_exactly_its_forms(gateways):
    """Everything else reaches the real program untouched."""
    host = gateways({"a": RUN})
    for form, ours in FORMS.items():
        done = host.box.exec("hermes", *form.split())
        assert done.stdout.startswith("real hermes: ") is not ours, (form, done)
        assert ours or done.stdout == f"real hermes: {form}\n"
        assert done.returncode == 0, (form, done)


@pytest.mark.long
def test_the_profile_is_found_as_hermes_does(gateways):
    """-p, else HERMES_HOME of a profile, else active_profile, else default."""
    host = gateways({"a": RUN, "b": RUN, "c": RUN})
    (host.volume / "active_profile").write_text("c\n")
    assert host.box.exec("hermes", "-p", "a", "gateway", "start").stdout == "a: started\n"
    assert (
        host.box.exec("hermes", "gateway", "start", environment={"HERMES_HOME": "/opt/data/profiles/b"}).stdout
        == "b: started\n"
    )
    assert host.box.exec("hermes", "gateway", "start").stdout == "c: started\n"
    (host.volume / "active_profile").unlink()
    assert host.box.exec("hermes", "gateway", "start").stdout == "default: started\n"


WORKER = """
import random, sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
hermes_boot.become_hermes()
manager = hermes_boot.S6ServiceManager(environment={"HERMES_HOME": "/opt/data"})
dice = random.Random(int(sys.argv[1]))
for _ in range(25):
    name, action = dice.choice("abc"), dice.choice(["register", "unregister", "start", "stop"])
    try:
        if action == "register":
            manager.register_profile_gateway(name, start_now=dice.random() < 0.5)
        elif action == "unregister":
            manager.unregister_profile_gateway(name)
        else:
            getattr(manager, action)(name, timeout=10)
        print(action, name, "done")
    except hermes_boot.GatewayError as error:
        print(action, name, type(error).__name__, error)
"""


def scandir(host: Gateways) -> set[str]:
    """Return what is in the container's scandir."""
    return {path.name for path in host.box.path("/run/service").iterdir()}


@pytest.mark.long
@pytest.mark.sandbox
def test_two_managers_interleave_without_a_leftover(gateways):
    """50 random commands of two processes on three names: then the scandir holds what it should, and nothing else
    runs."""
    host = gateways(dict.fromkeys("abc", RUN))
    others = {
        name for name in scandir(host) if not name.startswith("gateway-")
    }  # the static services, s6-overlay's own
    assert {"dashboard", "main-hermes"} < others
    (host.box.upper.parent / "volume").mkdir(exist_ok=True)
    (host.volume / "worker.py").write_text(WORKER)
    commands = [host.box.exec_command(["/usr/bin/python3", "-IBS", "/opt/data/worker.py", seed]) for seed in ("1", "2")]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert all("Traceback" not in err for _, err in outputs)
    registered = host.do("list").stdout.split()
    slots = {f"gateway-{name}" for name in registered}
    assert scandir(host) == others | slots
    processes = list(host.box.processes().values())
    supervised = {line.removeprefix("s6-supervise ") for line in processes if line.startswith("s6-supervise ")}
    assert supervised == others - {".s6-svscan"} | slots | {f"{slot}/log" for slot in slots}, processes
    assert sum("s6-log 1" in line for line in processes) == len(slots)
    for name in registered:
        assert host.do("start", "-p", name).returncode == 0 and host.do("unregister", "-p", name).returncode == 0
    assert not any("s6-log" in line for line in host.box.processes().values())


@pytest.mark.parametrize("sealed", ["", "1"])
def test_to_register_a_gateway_that_runs_takes_nothing_from_it(gateways, sealed):
    """What a dead container's process left goes before a slot is made; this one's pid file is a living one's."""
    host = gateways({"a": RUN}, "running", environment={"HERMES_SEALED": sealed})
    assert wait_for(lambda: host.up("a"))
    files = [host.folder("a") / name for name in ("gateway.pid", "processes.json")]
    for file in files:
        file.write_text("living\n")
    done = host.do("register", "-p", "a")
    assert (done.returncode, done.stdout) == (1, "") and "a: has a gateway already" in done.stderr, done
    assert [file.exists() for file in files] == [True, True]


def test_a_slot_that_goes_meanwhile_is_that_gateways_failure_alone(gateways):
    """Somebody unregisters one between its lock and its signal; the others stop."""
    host = gateways({"a": RUN})
    script = (
        "import sys; sys.path.insert(0, '/opt/hermes/docker'); import hermes_boot; hermes_boot.become_hermes()\n"
        "manager = hermes_boot.S6ServiceManager(environment={'HERMES_HOME': '/opt/data'})\n"
        "print(*manager.bring(['gone', 'a'], b'D', timeout=None).values(), manager.is_running('a'))\n"
    )
    assert host.do("start", "-p", "a").returncode == 0
    done = host.box.exec("/usr/bin/python3", "-IBSc", script)
    assert re.fullmatch(r"no such gateway: gone; .* False\n", done.stdout), done


def test_extra_env_reaches_the_gateway_as_data(gateways):
    """Quotes, newlines and $() included; a name that is none is refused."""
    host = gateways({"a": 'env -0 >"$folder/part"; mv "$folder/part" "$folder/env"\n' + RUN})
    value = 'it\'s "$(id)" `id`\nnext $HOME'
    script = (
        "import sys; sys.path.insert(0, '/opt/hermes/docker'); import hermes_boot; hermes_boot.become_hermes()\n"
        "manager = hermes_boot.S6ServiceManager(environment={'HERMES_HOME': '/opt/data'})\n"
        "manager.unregister_profile_gateway('a')\n"
        "try: manager.register_profile_gateway('a', extra_env={'A B': 'x'})\n"
        "except hermes_boot.InvalidName as error: print(error)\n"
        "manager.register_profile_gateway('a', extra_env={'EXTRA': sys.argv[1]})\n"
        "print(manager.is_running('gateway-a'))\n"
    )
    done = host.box.exec("/usr/bin/python3", "-IBSc", script, value)
    assert done.stdout.startswith("extra_env: 'A B' cannot be a variable"), done
    assert wait_for(lambda: (host.folder("a") / "env").exists() and host.up("a"))
    assert f"EXTRA={value}".encode() in (host.folder("a") / "env").read_bytes().split(b"\0")


@pytest.mark.long
@pytest.mark.overlay  # elsewhere the agent does not see s6
def test_the_real_agent_and_ours_work_on_each_others_slots(container, tmp_path):
    """`hermes profile create` publishes what ours controls and removes, `profile delete` removes ours, a restart
    rebuilds both."""
    box = container(agent=True)
    box.start("sleep", "infinity")
    for name in ("coder", "writer"):
        assert box.exec("hermes", "profile", "create", name, user="hermes").returncode == 0
    assert box.exec(MANAGER, "gateway", "list").stdout == "coder\ndefault\nwriter\n"
    assert box.exec("hermes", "-p", "coder", "gateway", "start").stdout == "coder: started\n"
    state = tmp_path / "volume/profiles/coder/gateway_state.json"
    assert wait_for(lambda: json.loads(state.read_text()).get("gateway_state") == "running", 30), box.log()
    box.restart()
    assert wait_for(lambda: box.exec(MANAGER, "gateway", "status", "-p", "coder").returncode == 0, 20)
    assert box.path("/run/service/gateway-writer/down").exists()
    assert wait_for(lambda: json.loads(state.read_text()).get("gateway_state") == "running", 30)
    done = box.exec("hermes", "-p", "coder", "gateway", "stop")
    assert done.stdout == "coder: stopped\n"
    assert json.loads(state.read_text())["desired_state"] == "stopped" and state.stat().st_uid == 10000
    box.restart()
    assert box.exec(MANAGER, "gateway", "status", "-p", "coder").returncode == 3
    assert box.exec("hermes", "profile", "delete", "coder", "--yes", user="hermes").returncode == 0
    assert box.exec(MANAGER, "gateway", "unregister", "-p", "writer").returncode == 0
    assert box.exec(MANAGER, "gateway", "list").stdout == "default\n"
    assert wait_for(lambda: not any("gateway-coder" in line for line in box.processes().values()))


@pytest.mark.long
@pytest.mark.sandbox
def test_the_real_agent_fetches_what_a_platform_needs_to_the_volume(container, tmp_path):
    """From PyPI, into lazy-packages; its own environment is sealed."""
    box = container(agent=True)
    ask = (
        "import hermes_bootstrap; from tools.lazy_deps import ensure; ensure('platform.telegram');"
        " import telegram; print(telegram.__file__)"
    )
    done = box.run("/opt/hermes/.venv/bin/python", "-c", ask, timeout=120)
    assert done.stdout.startswith(b"/opt/data/lazy-packages/telegram/"), done


def test_the_real_gateway_run_as_cmd_is_supervised_and_the_container_stays(container, tmp_path):
    """The old way to start a gateway: the agent hands it to s6 and the command sleeps."""
    box = container(agent=True)
    box.start("gateway", "run")
    state = tmp_path / "volume/gateway_state.json"
    assert wait_for(lambda: state.exists() and json.loads(state.read_text()).get("gateway_state") == "running", 30), (
        box.log()
    )
    assert wait_for(lambda: "sleep infinity" in box.processes().values())
    assert box.exec(MANAGER, "gateway", "status", "-p", "default").returncode == 0
    started = time.monotonic()
    box.stop()
    assert time.monotonic() - started < 9.5
    box.start("gateway", "run")
    assert wait_for(lambda: box.exec(MANAGER, "gateway", "status", "-p", "default").returncode == 0, 20)
    assert wait_for(lambda: "sleep infinity" in box.processes().values())  # the command has had its say
    assert box.exec("hermes", "gateway", "stop").returncode == 0
    box.restart()
    assert wait_for(lambda: "info: default was stopped and stays so" in box.log())
    assert json.loads(state.read_text())["desired_state"] == "stopped"
