"""Loggers: whatever becomes of one, its gateway goes on, and it is said who has its folder."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from conftest import MANAGER, RUN, Gateways, busy
from sandbox import wait_for

TALKS = 'n=0\nwhile :; do n=$((n + 1)); echo "line $n"; echo $n > "$folder/count"; sleep 0.05; done\n'


def count(host: Gateways, name: str = "a") -> int:
    """Return how many lines a gateway has written."""
    file = host.folder(name) / "count"
    return int(file.read_text().strip() or 0) if file.exists() else 0


def found(host: Gateways, name: str = "a") -> list[dict[str, str]]:
    """Return doctor's checks of a gateway that are no pass."""
    done = host.box.exec(MANAGER, "doctor", "--json")
    return [check for check in json.loads(done.stdout) if check["level"] != "pass" and check["check"] == name]


def logger(host: Gateways) -> str:
    """Return the pid of the logger of the gateway a."""
    return host.box.exec("/command/s6-svstat", "-o", "pid", "/run/service/gateway-a/log").stdout.strip()


@pytest.mark.sandbox
def test_a_locked_folder_costs_the_copy_alone(gateways):
    """The second container's gateway goes on, its log is the container's; doctor tells whose lock it is."""
    first = gateways({"a": TALKS}, "running")
    assert wait_for(lambda: first.up("a") and count(first) > 1)
    second = Gateways(gateways.__closure__[0].cell_contents(), {"a": TALKS}, "running")
    said = "a: logs/gateways/a is locked or cannot be used, so its log goes to the container's alone"
    assert wait_for(lambda: second.box.log().count("line ") > 20, 20)
    time.sleep(3)
    assert second.box.log().count(said) == 1 and said not in first.box.log()
    (check,) = found(second)
    assert "logs/gateways/a is locked by another container" in check["found"] and "HERMES_RECONCILE=0" in check["fix"]
    assert found(first) == []


@pytest.mark.long
def test_a_logger_without_its_supervisor_is_found_and_ended(gateways):
    """Its lock is seen to be of this container's; --fix gives the folder to the one with a supervisor."""
    host = gateways({"a": TALKS}, "running")
    assert wait_for(lambda: count(host) > 1)
    orphan = logger(host)
    lines = host.box.processes()
    (supervisor,) = [pid for pid, line in lines.items() if line.endswith("s6-supervise gateway-a/log")]
    host.box.exec("sh", "-c", f"kill -9 {supervisor}")
    assert wait_for(lambda: logger(host) not in ("-1", "", orphan), 15)
    assert wait_for(lambda: found(host) != [], 15)
    (check,) = found(host)
    assert f"locked by a logger without a supervisor (PID {orphan})" in check["found"], check
    assert "fixed: a: started its logger anew" in host.box.exec(MANAGER, "doctor", "--fix").stderr
    log, before = host.volume / "logs/gateways/a/current", count(host)
    assert wait_for(lambda: int(re.findall(r" line (\d+)\n", log.read_text())[-1]) > before + 20)
    time.sleep(3.5)
    assert found(host) == []
    assert not host.box.path(f"/proc/{orphan}").exists()


HELPER = 'sleep 1000 & echo $! > "$folder/helper"\nsetsid sleep 1001 & echo $! > "$folder/own"\necho ready\n'


@pytest.mark.parametrize("end", ["unregister", "stop", "kill"])
def test_what_a_gateway_leaves_behind(gateways, end):
    """A child in its group ends with it, where s6 names the group (2.12); one in a group of its own lives on, and keeps
    nobody from ending: neither the supervisors nor, of the old pipe, the logger."""
    host = gateways({"a": HELPER + RUN, "b": RUN}, "running")
    assert wait_for(lambda: "ready" in host.box.log())
    helper, own = ((host.folder("a") / name).read_text().strip() for name in ("helper", "own"))
    if end == "kill":
        host.box.exec("sh", "-c", f"kill -9 {host.pid('a')}")
        assert wait_for(lambda: host.starts("a") == 2)
    else:
        started = time.monotonic()
        assert host.do(end, "-p", "a").returncode == 0
        assert time.monotonic() - started < 9 * busy()
    alive = {pid for pid in (helper, own) if host.box.path(f"/proc/{pid}").exists()}
    group = host.box.exec("/command/s6-svstat", "-o", "pgid", "/run/service/gateway-b").returncode == 0
    assert own in alive and (helper not in alive or not group)
    if end == "unregister":
        for left in ("s6-supervise gateway-a", "logs/gateways/a"):
            assert wait_for(lambda: not any(left in line for line in host.box.processes().values()), 2)
        assert host.do("register", "-p", "a").returncode == 0
        assert wait_for(lambda: host.starts("a") == 2)
        assert found(host) == []


@pytest.mark.sandbox
def test_a_reader_that_stalls_costs_little_memory_and_no_gateway(gateways):
    """The engine stops to read the container's output, while a gateway writes 60 MB: its logger stays small, the
    gateway goes on, and the copy on the volume grows."""
    flood = (
        'line=$(printf %01000d 0)\nn=0\nwhile [ $n -lt 60 ]; do n=$((n + 1)); echo $n > "$folder/count";'
        ' i=0; while [ $i -lt 1000 ]; do i=$((i + 1)); echo $line; done; done\necho done > "$folder/done"\n'
    )
    host = gateways({"a": flood + RUN}, "stopped")
    pipe = host.box.path("/tmp/stalled")
    os.mkfifo(pipe)
    holder = os.open(pipe, os.O_RDWR)
    run = host.box.path("/run/service/gateway-a/log/run")
    first, _, rest = run.read_text().partition("\n")
    run.write_text(f"{first}\nexec 2>/tmp/stalled\n{rest}")
    os.chmod(pipe, 0o666)
    host.box.exec("/command/s6-svc", "-t", "/run/service/gateway-a/log")
    assert host.do("start", "-p", "a").returncode == 0
    largest = 0

    def finished() -> bool:
        nonlocal largest
        try:
            status = host.box.path(f"/proc/{logger(host)}/status").read_text()
            largest = max(largest, int(status.partition("VmRSS:")[2].split()[0]))
        except (OSError, IndexError, ValueError):
            pass  # between two of them
        return (host.folder("a") / "done").exists()

    assert wait_for(finished, 180), count(host)
    assert 0 < largest < 20 << 10, f"{largest} KiB"
    os.close(holder)
    assert host.up("a") and len(list((host.volume / "logs/gateways/a").glob("@*"))) >= 9


def test_a_finishs_line_has_the_name_and_is_in_the_gateways_log(gateways):
    """Among the gateway's own lines, and so in `hermes-boot logs` too."""
    host = gateways({"a": "echo oh no\nexit 1\n"}, "running")
    assert wait_for(lambda: "waiting 2 s before the next start" in host.box.log(), 20)
    line = "a: died too often, waiting 2 s before the next start"
    log = host.volume / "logs/gateways/a/current"
    assert wait_for(lambda: log.read_text().count(line) == 1)
    assert line in host.box.exec(MANAGER, "logs", "-p", "a").stdout and f"\n{line}\n" in host.box.log()
