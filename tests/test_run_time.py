"""What becomes of profiles and slots while the container runs: they come, go, cannot be read, or are another's work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time

import pytest
from conftest import MANAGER, RUN, Gateways, busy
from sandbox import wait_for

import hermes_boot

INIT = ("/init", "/opt/hermes/docker/main-wrapper.sh")


def doctor(host: Gateways, *words: str) -> list[dict[str, str]]:
    """Return doctor's checks that are no pass."""
    done = host.box.exec(MANAGER, "doctor", "--json", *words)
    assert "Traceback" not in done.stderr, done.stderr
    return [check for check in json.loads(done.stdout) if check["level"] != "pass"]


def processes(host: Gateways, word: str) -> list[str]:
    """Return the command lines of the container's processes that have a word in it."""
    return [line for line in host.box.processes().values() if word in line]


UNREADABLE = {
    "mode 000": lambda folder: folder.chmod(0),
    "a file": lambda folder: (folder.rename(folder.with_name("away")), folder.touch()),
    "a link": lambda folder: (folder.rename(folder.with_name("away")), folder.symlink_to("away")),
    "a loop": lambda folder: (folder.rename(folder.with_name("away")), folder.symlink_to(folder)),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE)
def test_one_profile_that_cannot_be_read_is_its_own_failure(gateways, make):
    """stop, start and restart --all take the steps for it too; status and doctor say that it cannot be read."""
    host = gateways({"a": RUN, "b": RUN, "c": RUN}, "running")
    assert wait_for(lambda: all(host.up(name) for name in "abc"))
    make(host.folder("b"))
    gone = make is UNREADABLE["a file"]  # its slot then parks by itself at the next start
    for action, up in (("stop", False), ("start", True), ("restart", True)):
        done = host.do(action, "--all")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done
        assert {line.split(":")[0] for line in done.stdout.splitlines()} == {"a", "c", "default"}
        errors = [line for line in done.stderr.splitlines() if ": info: waiting for " not in line]
        assert len(errors) == 1 and "error: b: " in errors[0], done
        assert host.up("a") is host.up("c") is up
        assert action != "stop" or not host.up("b")
    (row,) = json.loads(host.box.exec(MANAGER, "status", "-p", "b", "--json").stdout)
    if not gone:
        assert row["why"].startswith("profiles/b ") and ", mode 0" in row["why"] and ": it belongs to " in row["why"]
    assert not any("unregister" in check["fix"] for check in doctor(host) if check["check"] == "b")


def test_a_profile_from_elsewhere_gets_its_slot_by_start(gateways):
    """Only a real profile, and only by start; what its archive has brought along of another's process is removed."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    for name in ("new", "nosoul"):
        host.folder(name).mkdir()
        (host.folder(name) / "does").write_text(RUN)
    (host.folder("new") / "SOUL.md").touch()
    (host.folder("new") / "gateway.pid").write_text(host.pid("a"))
    host.box.exec("chown", "-R", "hermes:hermes", "/opt/data/profiles")
    for action in ("stop", "restart"):
        done = host.do(action, "-p", "new")
        assert done.returncode == 4 and "`hermes-boot gateway register -p new`" in done.stderr
    assert "no such gateway: nosoul; no SOUL.md, so not a profile" in host.do("start", "-p", "nosoul").stderr
    done = host.box.exec("hermes", "-p", "new", "gateway", "start")
    assert (done.returncode, done.stdout) == (0, "new: started\n"), done
    assert host.up("new") and not (host.folder("new") / "gateway.pid").exists()
    assert host.state("new")["desired_state"] == "running" and host.up("a")
    assert host.do("list").stdout == "a\ndefault\nnew\n"


def test_doctor_gives_many_profiles_their_slots(gateways):
    """As after a restore at run time: root's limit on what hermes does is none on that, and none of them waits."""
    host = gateways({}, "running")
    for number in range(50):
        folder = host.folder(f"p{number}")
        folder.mkdir(parents=True)
        (folder / "SOUL.md").touch()
    started = time.monotonic()
    done = host.box.exec(MANAGER, "doctor", "--fix")
    assert done.returncode == 0 and done.stderr.count("published its slot (registered)") == 50, done
    assert time.monotonic() - started < 15 * busy()


def test_a_slot_whose_profile_is_gone_parks_and_doctor_removes_it(gateways):
    """One line, one start, code 78."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    host.folder("a").rename(host.folder("b"))
    host.box.exec("sh", "-c", f"kill {host.pid('a')}")
    assert wait_for(lambda: "a: profiles/a is no folder, so its gateway is parked" in host.box.log())
    time.sleep(2.5)
    assert host.box.log().count("so its gateway is parked") == 1 and not host.up("a")
    (check,) = [check for check in doctor(host) if check["check"] == "a"]
    assert check["found"] == "has a slot, but its profile is gone"
    assert "fixed: a: removed its slot" in host.box.exec(MANAGER, "doctor", "--fix").stderr
    assert host.do("list").stdout == "b\ndefault\n" or host.do("list").stdout == "default\n"


@pytest.mark.long
@pytest.mark.overlay
def test_a_slot_of_the_agents_own_manager_is_brought_to_ours(container, tmp_path):
    """By start and restart, also by the `hermes` command; until then doctor names it."""
    box = container(agent=True)
    box.start("sleep", "infinity")
    for name in ("coder", "writer"):
        assert box.exec("hermes", "profile", "create", name, user="hermes").returncode == 0
    slots = {name: box.path(f"/run/service/gateway-{name}") for name in ("coder", "writer")}
    assert all("hermes-boot" not in (slot / "finish").read_text() for slot in slots.values())
    box.exec("s6-svc", "-u", "/run/service/gateway-coder")
    assert wait_for(lambda: "warn  coder: its slot is not as the boot makes it" in box.exec(MANAGER, "doctor").stdout)
    assert "warn  writer" not in box.exec(MANAGER, "doctor").stdout  # it is down, and a start is enough
    box.exec("s6-svc", "-d", "/run/service/gateway-coder")
    assert box.exec("hermes", "-p", "coder", "gateway", "start").stdout == "coder: started\n"
    assert box.exec(MANAGER, "gateway", "restart", "-p", "writer").stdout == "writer: restarted\n"
    for name, slot in slots.items():
        assert f"hermes-boot finish {name} " in (slot / "finish").read_text()
        assert 'export HOME="$home"' in (slot / "run").read_text() and (slot / "back-off").is_fifo()
        assert not (slot / "down").exists()
    assert "its slot is not as the boot makes it" not in box.exec(MANAGER, "doctor").stdout
    log = tmp_path / "volume/logs/gateways/coder/current"
    assert wait_for(lambda: log.exists() and "Hermes Gateway Starting" in log.read_text(), 30)
    state = tmp_path / "volume/profiles/coder/gateway_state.json"
    down = "pass  coder: down, as it was left (stopped)"

    def stops() -> bool:
        assert box.exec("hermes", "-p", "coder", "gateway", "start").returncode == 0
        assert wait_for(lambda: json.loads(state.read_text()).get("gateway_state") == "running", 60), state.read_text()
        command = ["/opt/hermes/.venv/bin/hermes", "-p", "coder", "gateway", "stop"]
        assert box.exec(*command, user="hermes").returncode == 0
        return wait_for(lambda: down in box.exec(MANAGER, "doctor").stdout)

    # and its own manager still stops ours: with code 1, which is no death where desired_state says stopped; its writers
    # do not wait for one another, so what it has written may be gone
    assert stops() or stops() or stops(), box.exec(MANAGER, "doctor").stdout
    assert box.exec(MANAGER, "gateway", "status", "-p", "coder").returncode == 3
    assert box.exec(MANAGER, "health").returncode == 0


@pytest.mark.parametrize("entrypoint", [(), INIT], ids=["s6-overlay", "another init"])
def test_a_slot_that_somebody_has_removed_runs_once(gateways, entrypoint):
    """doctor finds its supervisors; registering it anew ends the old gateway and its logger first."""
    host = gateways({"a": RUN, "b": RUN}, "running", entrypoint=entrypoint)
    assert wait_for(lambda: host.up("a") and host.up("b"))
    old = [host.pid("a"), host.pid("b")]
    host.box.exec("rm", "-rf", "/run/service/gateway-a", "/run/service/gateway-b")
    (found,) = [check for check in doctor(host) if check["check"] == "supervisors"]
    gone = {f"gateway-{name}" for name in ("a", "a/log", "b", "b/log")}
    assert set(found["found"].partition(":")[0].split()) == gone
    done = host.do("register", "-p", "a")
    assert (done.returncode, done.stdout) == (0, "a: registered, started\n"), done
    assert wait_for(lambda: host.up("a"))
    assert host.pid("a") != old[0] and not host.box.path(f"/proc/{old[0]}").exists()
    assert len(processes(host, "s6-supervise gateway-a")) == 2
    fixed = host.box.exec(MANAGER, "doctor", "--fix").stderr
    assert "fixed: supervisors: ended them" in fixed or "fixed: b: published its slot" in fixed  # if register has
    assert wait_for(lambda: host.up("b")) and len(processes(host, "s6-supervise gateway-b")) == 2
    assert [check for check in doctor(host) if check["check"] in ("a", "b", "supervisors")] == []


FALSE = """cd /tmp; echo sleep 300 >gateway-new
(setsid bash -c 'exec -a s6-supervise sh gateway-new' &)
(setsid bash -c '(exec -a s6-supervise sh gateway-new) & wait' &)
exec sleep infinity
"""


@pytest.mark.parametrize("entrypoint", [(), INIT], ids=["s6-overlay", "another init"])
def test_a_process_of_hermess_is_taken_for_no_supervisor(container, entrypoint):
    """By its command line, below PID 1 or s6-svscan's own parent: a new slot would wait for its end, in vain."""
    box = container(entrypoint=entrypoint)
    host = Gateways(box, {"new": RUN}, "running", command=("bash", "-c", FALSE))
    assert wait_for(lambda: len(processes(host, "s6-supervise gateway-new")) == 4) and wait_for(lambda: host.up("new"))
    assert [check for check in doctor(host) if check["check"] == "supervisors"] == []
    assert host.do("unregister", "-p", "new").returncode == 0
    done = host.do("register", "-p", "new")
    assert (done.returncode, done.stdout) == (0, "new: registered, started\n"), done


def test_commands_that_overlap_follow_one_another_and_the_last_one_is_the_intent(gateways):
    """A start waits for the stop before it, however long the gateway drains; what runs is what is recorded."""
    host = gateways({"a": "trap 'sleep 3; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n"}, "running")
    assert wait_for(lambda: "ready" in host.box.log())
    old = host.pid("a")
    stop = subprocess.Popen(host.box.exec_command([MANAGER, "gateway", "stop", "-p", "a"]), stdout=subprocess.PIPE)
    assert wait_for(lambda: host.state("a")["desired_state"] == "stopped")
    done = host.do("start", "-p", "a")
    assert (done.returncode, done.stdout) == (0, "a: started\n") and stop.wait(10) == 0, done
    assert host.up("a") and host.pid("a") != old and host.state("a")["desired_state"] == "running"


SAYS = 'echo "{\\"pid\\": $$, \\"gateway_state\\": \\"%s\\"}" > "$folder/gateway_state.json"\n'
SLOW = "trap 'sleep 4; exit 0' TERM\nwhile :; do sleep 0.05; done\n"


def test_a_restart_waits_for_nobody_elses_end_and_a_command_that_is_ended_leaves_none_down(gateways):
    """s6 knows from the first moment that each is to come up again."""
    host = gateways({"a": RUN, "slow": SLOW}, "running")
    assert wait_for(lambda: all(map(host.up, ("a", "default", "slow"))))
    old, slow, words = host.pid("a"), host.pid("slow"), ["sh", "-c", f"echo $$; exec {MANAGER} gateway restart --all"]
    with subprocess.Popen(host.box.exec_command(words, None), stdout=subprocess.PIPE) as restart:
        pid = restart.stdout.readline().decode().strip()
        assert wait_for(lambda: host.up("a") and host.pid("a") != old, 3 * busy())
        assert restart.poll() is None and host.pid("slow") == slow  # which still drains
        assert host.box.exec("sh", "-c", f"kill -INT {pid}").returncode == 0
        assert restart.wait(20) == 130
    assert wait_for(lambda: all(host.up(name) and host.starts(name) == 2 for name in ("a", "default", "slow")), 15)
    assert host.box.exec(MANAGER, "health").stdout == "healthy: 3 up, 0 not wanted\n"


def test_an_unregister_waits_for_its_turn(gateways):
    """Beside a restart of a gateway that drains, and a start."""
    host = gateways({"slow": SLOW}, "running")
    assert wait_for(lambda: host.up("slow"))
    commands = []
    for action in ("restart", "unregister", "start"):
        words = host.box.exec_command([MANAGER, "gateway", action, "-p", "slow"], None)
        commands.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        time.sleep(0.5)
    said = [command.communicate(timeout=40) for command in commands]
    assert said[0][0] == "slow: restarted\n" and said[1][0] == "slow: unregistered\n", said
    assert commands[2].returncode in (0, 4), said  # before it or after it
    assert not host.box.path("/run/service/gateway-slow").exists()


def test_a_name_that_begins_as_slots_do(gateways):
    """gateway-late is a profile of its own, with or without a slot: late is never meant by it."""
    host = gateways({"late": RUN}, "running")
    assert wait_for(lambda: host.up("late"))
    host.box.exec("sh", "-c", "cd /opt/data/profiles && cp -r late gateway-late", user="hermes")
    for action, code in (("stop", 4), ("unregister", 4), ("start", 0), ("unregister", 0)):
        done = host.do(action, "-p", "gateway-late")
        assert (done.returncode, "gateway-late" in done.stdout + done.stderr) == (code, True), done
        assert host.up("late") and host.state("late")["desired_state"] == "running"
    assert (
        host.do("stop", "-p", "gateway-x").returncode == 4 and host.do("stop", "-p", "gateway-default").returncode == 0
    )
    assert not host.up("default")


LOCKS = """
import fcntl, glob, os, time
held = [os.open(folder, os.O_RDONLY) for folder in ["/opt/data", *glob.glob("/opt/data/profiles/*")]]
for fd in held:
    fcntl.flock(fd, fcntl.LOCK_EX)
open("/opt/data/locked", "w")
time.sleep(1000)
"""


def test_locks_on_profiles_hold_up_no_stop(gateways):
    """The word to the gateway that its stop is meant waits for nobody; the intent is written all the same."""
    names = "abcdefghijkl"
    host = gateways(dict.fromkeys(names, RUN), "running")
    assert wait_for(lambda: all(map(host.up, names)), 20)
    argv = host.box.exec_command(["/usr/bin/python3", "-ISc", LOCKS], "hermes")
    with subprocess.Popen(argv) as holder:
        assert wait_for((host.volume / "locked").exists)
        started = time.monotonic()
        assert host.do("stop", "--all").returncode == 0
        assert time.monotonic() - started < 4 * hermes_boot.UPDATE_TIMEOUT * busy()
        holder.kill()
    assert all(host.state(name)["desired_state"] == "stopped" for name in names)


def test_a_log_folder_that_somebody_has_removed(gateways):
    """doctor --fix makes it anew, once."""
    host = gateways({}, "running")
    assert wait_for(lambda: host.up("default"))
    host.box.exec("rm", "-rf", "/opt/data/logs/gateways")
    assert wait_for(lambda: any("is not used" in check["found"] for check in doctor(host)), 10)
    assert "started its logger anew" in host.box.exec(MANAGER, "doctor", "--fix").stderr
    assert wait_for(lambda: host.box.exec("test", "-f", "/opt/data/logs/gateways/default/lock").returncode == 0, 5)
    assert wait_for(lambda: host.box.exec(MANAGER, "doctor", "--fix").stderr == "", 10)


STARTS = {
    "parks": ("sleep 0.5\nexit 78\n", 1, "ended with code 78 and is parked; `hermes-boot logs -p a -n 20` says why"),
    "loops": ("exit 3\n", 1, "is in a crash loop, last end: code 3; `hermes-boot logs -p a -n 20` says why"),
    "stays": (RUN, 0, ""),
    "says so": (SAYS % "running" + RUN, 0, ""),
    "dies once": ('[ "$(wc -l < "$folder/starts")" -gt 1 ] || exit 1\n' + RUN, 0, ""),
    "is slow": (SAYS % "starting" + "sleep 5\n" + SAYS % "running" + RUN, 0, ""),
}


@pytest.mark.parametrize("does, code, said", STARTS.values(), ids=STARTS)
def test_start_and_restart_wait_out_the_start(gateways, does, code, said):
    """They say what became of the gateway, not that a process was made."""
    host = gateways({"a": does}, "stopped")
    for action in ("start", "restart"):
        started = time.monotonic()
        done = host.do(action, "-p", "a")
        took = time.monotonic() - started
        assert done.returncode == code and said in done.stderr, done
        assert host.state("a").get("gateway_state", "running") == "running"
        (host.folder("a") / "starts").unlink()
        assert took < 9 * busy() and (code or "running" not in does or took < 2.5 * busy() or "sleep 5" in does)


def test_health_sees_a_wanted_profile_without_a_slot_and_a_logger_that_is_gone(gateways):
    """One that is not wanted, or was left out on purpose, is nobody's illness."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    assert wait_for(lambda: host.up("a") and host.up("b"))
    assert host.do("unregister", "-p", "a").returncode == 0
    assert host.box.exec(MANAGER, "health").stdout == "unhealthy: a: no slot\n"
    (host.folder("a") / "gateway_state.json").write_text('{"desired_state": "stopped"}')
    assert host.box.exec(MANAGER, "health").returncode == 0
    host.box.exec("/command/s6-svc", "-d", "/run/service/gateway-b/log")
    loggers = [pid for pid, line in host.box.processes().items() if line.startswith("s6-log ")]
    host.box.exec("sh", "-c", f"kill {' '.join(loggers)}")
    assert wait_for(lambda: host.box.exec(MANAGER, "health").stdout == "unhealthy: b: no logger\n", 15)


LOCKED = {"state": "retrying", "error_code": "telegram-bot-token_lock"}


def test_a_platform_that_has_failed_is_shown_and_who_shares_its_token(gateways):
    """Not as green; what a gateway that has ended left there says nothing."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    assert wait_for(lambda: host.up("a") and host.up("b"))
    for name, pid in (("a", int(host.pid("a"))), ("b", 1)):
        message = LOCKED | {"error_message": f"Telegram bot token already in use (PID {host.pid('b')})."}
        state = {"desired_state": "running", "pid": pid, "gateway_state": "running", "platforms": {"telegram": message}}
        (host.folder(name) / "gateway_state.json").write_text(json.dumps(state))
    table = host.box.exec(MANAGER, "status").stdout
    assert re.search(r"^a +up, telegram: telegram-bot-token_lock  ", table, re.M)
    assert table.count("telegram:") == 1
    (found,) = [check for check in doctor(host) if check["check"] == "a"]
    assert found["found"] == "telegram: b has its token or account (telegram-bot-token_lock)"
    assert not [check for check in doctor(host) if check["check"] == "b"]


def test_without_reconcile_gateway_run_is_in_the_foreground(container):
    """Where doctor sends a second container; also by way of a shell."""
    for words in (["gateway", "run"], ["sh", "-c", "exec hermes -p a gateway run"]):
        box = container(environment={"HERMES_RECONCILE": "0"})
        box.put_agent('#!/bin/sh\necho "$HERMES_GATEWAY_NO_SUPERVISE $*"\n')
        done = box.run(*words)
        assert done.returncode == 0 and done.stdout.decode() in ("1 gateway run\n", "1 -p a gateway run\n"), done


def test_the_hermes_command_hands_gateway_run_to_s6_below_another_init(gateways):
    """`sh -c "hermes gateway run"`, at the first start and at the second; its help stays the agent's."""
    host = gateways({}, entrypoint=INIT)
    assert host.box.exec("hermes", "gateway", "run", "--help").stdout == "real hermes: gateway run --help\n"
    host.box.stop()
    for number in (1, 2):
        host.box.start("sh", "-c", "hermes gateway run; echo ended")
        assert wait_for(lambda: host.up("default"))
        assert wait_for(lambda: "default: started" in host.box.log())
        assert wait_for(lambda: host.starts("default") == number) and "ended" not in host.box.log()
        host.box.stop()


@pytest.mark.parametrize("entrypoint", [(), INIT], ids=["s6-overlay", "another init"])
def test_hermess_option_may_come_last(gateways, entrypoint):
    """As in hermes-boot's own words, and as the agent takes it."""
    host = gateways({"a": RUN}, "running", entrypoint=entrypoint)
    assert wait_for(lambda: host.up("a"))
    assert host.box.exec("hermes", "gateway", "stop", "-p", "a").stdout == "a: stopped\n"
    assert not host.up("a") and host.up("default")


@pytest.mark.sandbox
@pytest.mark.parametrize("entrypoint", [(), INIT], ids=["s6-overlay", "another init"])
def test_before_the_boot_is_over_nothing_is_called_wrong(container, entrypoint):
    """Commands say what to wait for, and change nothing."""
    box = container(entrypoint=entrypoint)
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    (box.upper / "etc/cont-init.d").mkdir(parents=True, exist_ok=True)
    slow = box.upper / "etc/cont-init.d/00-slow"
    slow.write_text("#!/bin/sh\n: >/run/slow\nwhile [ -e /run/slow ]; do sleep 0.05; done\n")
    slow.chmod(0o755)
    starting = threading.Thread(target=box.start, args=("sleep", "infinity"))
    starting.start()
    assert wait_for(lambda: box.init() and box.path("/run/slow").exists(), 20)
    text = "the boot is not over; wait until it is (`docker logs`), then repeat this\n"
    done = box.exec(MANAGER, "gateway", "stop")
    assert (done.returncode, done.stderr) == (4, f"hermes-boot: error: no such gateway: default; {text}"), done
    done = box.exec(MANAGER, "doctor", "--fix")
    assert f"warn  gateways: {text}" in done.stdout and "fail" not in done.stdout, done
    assert box.exec(MANAGER, "status").stderr == f"hermes-boot: warning: {text}"
    box.path("/run/slow").unlink()
    starting.join()
    assert box.exec(MANAGER, "gateway", "stop").stdout == "default: stopped\n"


def test_a_gateway_without_a_platform(gateways):
    """Is well, and doctor says what makes it answer somebody."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    state = host.state("a") | {"pid": int(host.pid("a")), "gateway_state": "running", "platforms": {}}
    (host.folder("a") / "gateway_state.json").write_text(json.dumps(state))
    checks = json.loads(host.box.exec(MANAGER, "doctor", "--json").stdout)
    (check,) = [check for check in checks if check["check"] == "a"]
    assert check["level"] == "pass" and check["found"].endswith(", with no messaging platform")
    assert check["fix"] == "`hermes -p a setup` adds one, then `hermes -p a gateway restart`"


def test_a_command_that_outlives_its_sigterm_ends_the_container_with_143(container):
    """At the deadline; the code of one that ends in time is its own."""
    environment = {"HERMES_SHUTDOWN_TIMEOUT": "1"}
    for trap, code in (("trap '' TERM", 143), ("trap 'exit 7' TERM", 7), ("trap 'sleep 5; exit 7' TERM", 143)):
        box = container(environment=environment)
        box.start("sh", "-c", f"{trap}; echo ready; while :; do sleep 0.1; done")
        assert wait_for(lambda log=box.log: "ready" in log())
        assert box.stop() == code, trap


WORDS = {
    "stopped": '{"desired_state": "running", "gateway_state": "stopped"}',
    "killed": '{"desired_state": "running", "gateway_state": "running"}',
    "drained": '{"desired_state": "running", "gateway_state": "running"}',
    "silent": '{"desired_state": "running"}',
}


def test_the_boot_log_says_how_a_gateway_ended_and_when_by_its_time_zone(container, tmp_path):
    """Clean by the gateway's own word or marker, unclean where it was at work, else unknown; of one that has never run
    there is no end to tell."""
    for name, state in WORDS.items():
        folder = tmp_path / "volume/profiles" / name
        folder.mkdir(parents=True)
        (folder / "SOUL.md").touch()
        (folder / "gateway_state.json").write_text(state)
    (tmp_path / "volume/profiles/drained/.clean_shutdown").touch()
    box = container(environment={"TZ": "XYZ-05:30"})
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    lines = [line for line in box.log().splitlines() if " profile=" in line]
    ends = {line.split("profile=")[1].split()[0]: line.rpartition("prior_exit=")[2] for line in lines}
    assert ends.pop("default").endswith("prior_state=none action=registered")  # it has never run
    expected = {"stopped": "clean", "killed": "unclean", "drained": "clean", "silent": "unknown"}
    assert ends == expected
    now = time.strftime("%Y-%m-%dT%H:", time.gmtime(time.time() + 5.5 * 3600 - 60))
    later = time.strftime("%Y-%m-%dT%H:", time.gmtime(time.time() + 5.5 * 3600))
    assert all(line.startswith((now, later)) and "+0530 profile=" in line for line in lines), lines


def test_a_dashboard_that_is_off_reads_off_and_one_with_a_wrong_configuration_parks(container):
    """Code 78: one start."""
    box = container()
    box.put_agent("#!/bin/sh\necho started >&2\nexit 78\n")
    box.start("sleep", "infinity")
    assert "pass  dashboard: off (HERMES_DASHBOARD)\n" in box.exec(MANAGER, "doctor").stdout
    box.stop()
    box = container(environment={"HERMES_DASHBOARD": "1"})
    box.put_agent("#!/bin/sh\necho started >&2\nexit 78\n")
    box.start("sleep", "infinity")
    assert wait_for(lambda: "started" in box.log())
    time.sleep(2.5)
    assert box.log().count("started") == 1
    assert "fail  dashboard: does not run" in box.exec(MANAGER, "doctor").stdout


def test_what_a_gateway_prints_is_in_its_log_at_once(container, tmp_path):
    """Python's buffer would keep it for as long as the gateway runs."""
    box = container()
    assert box.run("python3", "-c", "import sys; print(sys.dont_write_bytecode, sys.stdout.write_through)").stdout == (
        b"True True\n"
    )


def test_the_files_of_slots_are_roots_where_they_are(gateways):
    """With the FIFOs open to hermes by group: start, stop and restart work as hermes, and say nothing."""
    host = gateways({"a": RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    slot = "/run/service/gateway-a"
    script = f"chown -R root:hermes {slot} && chmod 0620 {slot}/supervise/control && chmod 0660 {slot}/back-off"
    assert host.box.exec("sh", "-c", script).returncode == 0
    for action, up in (("stop", False), ("start", True), ("restart", True)):
        done = host.do(action, "-p", "a", user="hermes")
        assert done.returncode == 0 and done.stderr == "" and host.up("a") is up, done
    assert os.stat(host.box.path(f"{slot}/run")).st_uid == 0


def test_a_supervisor_that_has_not_said_anything_yet_is_waited_for(plain):
    """s6-supervise reads its FIFO before it writes its status, which takes a while where hundreds start at once."""
    plain.profile("a")
    plain.reconcile()
    manager = hermes_boot.S6ServiceManager(str(plain.scandir), str(plain.home), environment={})
    failures: dict = {}
    reader = os.open(plain.scandir / "gateway-a/supervise/control", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert manager.told(manager.slot("a"), b"U") and not manager.settled("a", b"U", time.time(), failures)
        assert not failures
    finally:
        os.close(reader)
