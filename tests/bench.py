#!/usr/bin/env python3
"""How far the boot is from what the machine can do: every figure a ratio to a floor, measured in turn with it in the
same run.

Runs inside a sandbox container (tests/sandbox.py, needs root), on volumes in memory, so that the disk is not what is
measured. The floors are programs anyone can run: a bare `python3 -IS -c pass`, `find` for a clean sweep, `chown -Rh`
for a repair, and for slots a loop that makes the same files under the same names. Prints a table, writes the whole as
JSON.

Each figure is of the minima, of as many rounds as it takes until two agree within 5 %, for 30 s at most.

bench.py [--quick] [--only CASE,...] [--out FILE]      QUICK=1 and OUT=FILE do the same; quick takes fewer rounds, on
                                                       smaller volumes
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sandbox import PROJECT, Sandbox, base_python, unsupported, wait_for

SCRIPTS = "/opt/hermes/docker"
PYTHON = base_python()
BARE = [PYTHON, "-IS", "-c", "pass"]
MANAGER = "/opt/hermes/bin/hermes-boot"
SETUP, RECONCILE = "/etc/cont-init.d/01-hermes-setup", "/etc/cont-init.d/02-reconcile-profiles"
COMMAND_PROCESS = "/run/hermes-command"
VARIABLES = "/run/s6/container_environment"
GATEWAY = f"""#!{PYTHON} -IS
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
open("/tmp/ready", "w").close()
signal.sigwait([signal.SIGTERM])
now = time.monotonic()
with open("/tmp/stopped.part", "w") as file:
    file.write(str(now))
os.rename("/tmp/stopped.part", "/tmp/stopped")
"""
STUB = f"""#!/bin/sh
[ "$1" != -p ] || exec sleep infinity
exec {PYTHON} -IS /opt/gateway.py
"""
QUICK = "--quick" in sys.argv or os.environ.get("QUICK") == "1"
# profiles: of status and doctor; of the slow disk and of `docker stop`; of these, up
HEAVY, CROWD, RUNNING = (49, 20, 10) if QUICK else (490, 200, 100)
FSYNC = 50  # ms that the slow disk takes
SLOW_DISK = "/opt/slow-disk.so"
SLOW_DISK_SOURCE = f"""
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static void wait(void) {{ struct timespec time = {{0, {FSYNC} * 1000000}}; nanosleep(&time, 0); }}
int fsync(int fd) {{ wait(); return syscall(SYS_fsync, fd); }}
int fdatasync(int fd) {{ wait(); return syscall(SYS_fdatasync, fd); }}
int syncfs(int fd) {{ wait(); return syscall(SYS_syncfs, fd); }}
void sync(void) {{ wait(); syscall(SYS_sync); }}
"""
# case: its name, and what it is to reach, as a unit and the largest figure, None for what is only told
TARGETS = {
    "wrapper": ("wrapper, until the program has run", "x", 1.5),
    "stop": ("hermes gateway stop, until the gateway has the signal", "x", 3.0),
    "health": ("hermes-boot health", "x", 4.0),
    "boot": ("boot, 20 profiles, 10,000 files, nothing to change", "x", 2.0),
    "large boot": ("boot, 1,000 profiles, 100,000 files, nothing to change", "x", 1.2),
    "remap": ("setup with a remap, 100,000 files", "x", 1.2),
    "sweep": ("setup, 1,000,000 files, nothing to change", "x", 1.0),
    "memory": ("memory of that, MiB", "MiB", 40),
    "scaling": ("reconcile, a profile among many to one among few", "x", 1.2),
    "overlay": ("reconcile, 300 profiles, slots on the root's overlay to slots in memory", "x", None),
    "status": ("status, 490 profiles, to 4 starts + 1 ms a profile", "x", 1.0),
    "status one": ("status -p NAME among 490, to 4 starts", "x", 1.0),
    "gateway status one": ("gateway status -p NAME among 490, to 4 starts", "x", 1.0),
    "doctor": ("doctor, 490 profiles, to 10 starts + 3 ms a profile", "x", 1.0),
    "logs": ("logs -n 1, 64 GiB (sparse), to 4 starts", "x", 1.0),
    "archives": ("logs -n 50000, over ten archives, to 4 starts + 1 µs a line", "x", 1.0),
    "slots": ("memory of a slot without its gateway (PSS), KiB", "KiB", None),
    "slow boot": ("setup and reconcile, 20 profiles, fsync 50 ms, ms more than fsync 0", "ms", 200),
    "slow first boot": ("first boot of a volume, fsync 50 ms, ms more than fsync 0", "ms", 1500),
    "slow stop": ("gateway stop --all, 200 slots, 100 up, fsync 50 ms, ms more than the gateways", "ms", 3000),
    "docker stop": ("docker stop, 200 idle gateways, ms more than they take", "ms", 1000),
    "container": ("container `true`, ms more than without our boot", "ms", 30),
}


# Inside the container


DISCARD = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_WRONLY, 0) for number in (1, 2)]


def run(*argv: str, check: bool = True) -> float:
    """Run a program; return how long it took, in ms."""
    started = time.perf_counter()
    pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=DISCARD)
    status = os.waitpid(pid, 0)[1]
    took = (time.perf_counter() - started) * 1000
    if check and status:
        raise SystemExit(f"bench: {argv} ended with {os.waitstatus_to_exitcode(status)}")
    return took


def variable(name: str, value: str) -> None:
    """Set a variable of the container, and of what runs in it by `docker exec`, as we do."""
    Path(VARIABLES, name).write_text(f"{value}\n")
    os.environ[name] = value


class Bench:
    """How long to try: runs a round, and seconds until which rounds are added while their minima differ; and which
    cases."""

    def __init__(self, *, quick: bool, only: list[str]) -> None:
        self.quick, self.only = quick, only
        self.runs, self.patience = (2, 1.0) if quick else (5, 30.0)
        self.results: dict[str, dict] = {}

    def wants(self, *cases: str) -> bool:
        """Return whether one of these cases is to be measured."""
        return not self.only or any(case in self.only for case in cases)

    def pairs(self, case, floor, before=lambda: None) -> dict:
        """Measure a case and its floor in turn until the minima of two rounds agree within 5 %; return minima,
        ratio, load and samples, in ms. before comes before each and is not timed."""
        samples: dict[str, list[float]] = {"case": [], "floor": []}
        deadline, last = time.monotonic() + self.patience, None
        while True:
            for _ in range(self.runs):
                for name, action in (("case", case), ("floor", floor)):
                    before()
                    samples[name].append(action())
            least = [min(values[-self.runs :]) for values in samples.values()]
            if time.monotonic() > deadline or (last and all(map(near, least, last))):
                break
            last = least
        ms, floor_ms = (min(values) for values in samples.values())
        figure = ms / floor_ms if floor_ms else ms
        return {"ms": ms, "floor_ms": floor_ms, "figure": figure, "load": os.getloadavg()[0], "samples": samples}


def near(one: float, other: float) -> bool:
    """Return whether two minima agree."""
    return abs(one - other) <= 0.05 * max(one, other)


def bare(starts: int, milliseconds: float = 0):
    """Return the bound of a case: as many bare Python starts, and some time for what it looks at."""
    return lambda: starts * run(*BARE) + milliseconds


def slow(*argv: str) -> float:
    """Run a program on a disk whose fsync takes FSYNC ms; return ms."""
    return run("/usr/bin/env", f"LD_PRELOAD={SLOW_DISK}", *argv)


def stop_gateway() -> float:
    """Start the gateway, then stop it with the `hermes` command; return ms until the gateway has the signal."""
    for name in ("ready", "stopped"):
        Path("/tmp", name).unlink(missing_ok=True)
    run("/command/s6-svc", "-u", "/run/service/gateway-default")
    wait_for(lambda: os.path.exists("/tmp/ready"))
    started = time.monotonic()
    pid = os.posix_spawn(
        "/opt/hermes/bin/hermes", ["/opt/hermes/bin/hermes", "gateway", "stop"], os.environ, file_actions=DISCARD
    )
    wait_for(lambda: os.path.exists("/tmp/stopped"))
    os.waitpid(pid, 0)
    return (float(Path("/tmp/stopped").read_text()) - started) * 1000


class Volume:
    """A volume in memory, with profiles and with files in folders of a hundred, all hermes's, and a scandir beside
    it."""

    def __init__(self, profiles: int, files: int, *, running: int | None = None) -> None:
        """running says how many of the profiles are to run, all unless given."""
        self.profiles, self.top, self.home, self.scandir = (
            profiles,
            "/srv/bench",
            "/srv/bench/home",
            "/srv/bench/scandir",
        )
        os.makedirs(self.top, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=0", "tmpfs", self.top], check=True)
        os.makedirs(self.scandir)
        os.makedirs(self.home)
        for number in range(profiles):
            folder = f"{self.home}/profiles/p{number:05}"
            os.makedirs(folder)
            Path(folder, "SOUL.md").touch()
            Path(folder, "config.yaml").touch()
            desired = "running" if running is None or number < running else "stopped"
            state = {"desired_state": desired, "gateway_state": "running", "pid": 7}
            Path(folder, "gateway_state.json").write_text(json.dumps(state))
        tops = ("sessions", "memories", "skills", "workspace", "profiles/p00000" if profiles else "home")
        for number in range(files // 100):
            folder = f"{self.home}/{tops[number % len(tops)]}/{number // 50:04}/{number:05}"
            os.makedirs(folder)
            for file in range(100):
                os.close(os.open(f"{folder}/{file:03}.json", os.O_CREAT, 0o644))
        subprocess.run(["chown", "-R", "hermes:hermes", self.home], check=True)
        Path(COMMAND_PROCESS).unlink(missing_ok=True)  # as at a boot: the container's command has not started yet
        variable("HERMES_HOME", self.home)
        variable("S6_PROFILE_GATEWAY_SCANDIR", self.scandir)
        self.boot()
        self.model = read_slot(f"{self.scandir}/gateway-default")

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", self.top], check=True)

    def clear(self) -> None:
        """Empty the scandir, as /run is at every boot."""
        shutil.rmtree(self.scandir)
        os.mkdir(self.scandir)

    def start_anew(self) -> None:
        """Empty the volume too."""
        self.clear()
        shutil.rmtree(self.home)

    @contextlib.contextmanager
    def supervised(self):
        """Have an s6-svscan of its own keep the slots."""
        svscan = subprocess.Popen(
            ["/command/s6-svscan", self.scandir], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            slots = [Path(self.scandir, name) for name in os.listdir(self.scandir) if name.startswith("gateway-")]
            logs = [f"{self.home}/logs/gateways/{slot.name.removeprefix('gateway-')}/current" for slot in slots]
            if not wait_for(lambda: all(os.path.exists(log) for log in logs), 60):
                raise SystemExit("bench: s6 does not take up all slots")
            time.sleep(2)
            yield
        finally:
            svscan.terminate()
            svscan.wait(60)

    def fill(self) -> None:
        """Give every profile a log and a configuration of 1 MiB, the default one a log of 64 GiB, and another one ten
        archives; all sparse but the last block."""
        lines = "".join(f"2026-05-21 06:18:05.{number:09}  line {number}\n" for number in range(90))
        for number in range(self.profiles):
            name = f"p{number:05}"
            os.truncate(f"{self.home}/profiles/{name}/config.yaml", 1 << 20)
            extend(f"{self.home}/logs/gateways/{name}/current", 1 << 20, lines)
        extend(f"{self.home}/logs/gateways/default/current", 64 << 30, lines)
        for number in range(10):
            archive = Path(f"{self.home}/logs/gateways/p{self.profiles // 2:05}/@400000006{number:015}.s")
            archive.write_text("".join(f"2026-05-21 06:18:05.{line:09}  line {line}\n" for line in range(22_000)))

    def boot(self) -> float:
        """Run both phases; return ms."""
        return run(SETUP) + run(RECONCILE)

    def find(self) -> float:
        """Look for a wrong owner with find; return ms."""
        return run(
            "/usr/bin/find",
            self.home,
            "(",
            "!",
            "-user",
            "hermes",
            "-o",
            "!",
            "-group",
            "hermes",
            ")",
            "-print",
            "-quit",
        )

    def slots(self, count: int) -> float:
        """Make as many slots as a plain loop would, with the files of one that the boot has made; return ms."""
        folders, files, fifos = self.model
        target = f"{self.top}/loop"
        os.mkdir(target)
        started = time.perf_counter()
        for number in range(count):
            slot = f"{target}/gateway-p{number:05}"
            for name, mode in folders:
                os.mkdir(slot + name, mode)
                if mode > 0o777:
                    os.chmod(slot + name, mode)
            for name, mode, content in files:
                fd = os.open(slot + name, os.O_WRONLY | os.O_CREAT, mode)
                os.write(fd, content)
                os.close(fd)
            for name, mode in fifos:
                os.mkfifo(slot + name, mode)
                if mode & 0o022:
                    os.chmod(slot + name, mode)
        took = (time.perf_counter() - started) * 1000
        shutil.rmtree(target)
        return took


def extend(path: str, size: int, lines: str) -> None:
    """Make a log as long, with these lines at its end."""
    with open(path, "r+") as file:
        file.truncate(size - len(lines))
        file.seek(size - len(lines) - 1)
        file.write("\n" + lines)


def read_slot(model: str) -> tuple[list, list, list]:
    """Return the folders, files and FIFOs of a slot, by their paths in it, with modes and contents."""
    folders, files, fifos = [], [], []
    for path, _, names in os.walk(model):
        folders.append((path[len(model) :], os.stat(path).st_mode & 0o7777))
        for name in names:
            file = Path(path, name)
            place, mode = str(file)[len(model) :], file.stat().st_mode & 0o777
            if file.is_fifo():
                fifos.append((place, mode))
            else:
                files.append((place, mode, file.read_bytes()))
    return folders, files, fifos


def measure(bench: Bench) -> None:
    """Measure everything that happens inside a container."""
    results, wants = bench.results, bench.wants
    for case, action in (
        ("wrapper", lambda: run(f"{SCRIPTS}/main-wrapper.sh", "true")),
        ("stop", stop_gateway),
        ("health", lambda: run(MANAGER, "health", check=False)),
    ):
        if wants(case):
            results[case] = bench.pairs(action, bare(1))
    for case, profiles, files in (
        ("boot", 20, 10_000),
        ("large boot", *((100, 10_000) if bench.quick else (1000, 100_000))),
    ):
        if wants(case):
            with Volume(profiles, files) as volume:

                def floor():
                    return bare(2)() + volume.find() + volume.slots(volume.profiles + 1)

                results[case] = bench.pairs(volume.boot, floor, volume.clear)
    if wants("remap"):
        results["remap"] = remap(bench, 10_000 if bench.quick else 100_000)
    if wants("sweep", "memory"):
        results["sweep"], results["memory"] = sweep(bench, 20_000 if bench.quick else 1_000_000)
    if wants("scaling"):
        results["scaling"] = scaling(bench, (10, 100, 300) if bench.quick else (10, 100, 1000, 10_000))
    if wants("overlay"):
        results["overlay"] = on_overlay(bench)
    if wants("status", "status one", "gateway status one", "doctor", "slots", "logs", "archives"):
        operators(bench)
    for case, profiles in (("slow boot", 20), ("slow first boot", 0)):
        if wants(case) and os.path.exists(SLOW_DISK):
            with Volume(profiles, 0) as volume:
                before = volume.clear if profiles else volume.start_anew
                delayed = bench.pairs(lambda: slow(SETUP) + slow(RECONCILE), volume.boot, before)
                results[case] = difference(delayed)


def difference(result: dict) -> dict:
    """Return a result whose figure is how much longer the case took."""
    return result | {"figure": result["ms"] - result["floor_ms"]}


def operators(bench: Bench) -> None:
    """Measure what people wait for, with as many gateways as one container takes, RUNNING of them up, each with a log
    and a configuration of 1 MiB; and the memory of the slots."""
    before = memory_of_s6()
    with Volume(HEAVY, 0, running=RUNNING) as volume, volume.supervised():
        size = (memory_of_s6() - before) / (HEAVY + 1)
        bench.results["slots"] = {"figure": size, "ms": None, "floor_ms": None, "samples": {}}
        volume.fill()
        one = f"p{HEAVY // 2:05}"
        for case, bound, words in (
            ("status", bare(4, HEAVY), ["status"]),
            ("status one", bare(4), ["status", "-p", one]),
            ("gateway status one", bare(4), ["gateway", "status", "-p", one]),
            ("doctor", bare(10, 3 * HEAVY), ["doctor", "--json"]),
            ("logs", bare(4), ["logs", "-n", "1"]),
            ("archives", bare(4, 50), ["logs", "-p", one, "-n", "50000"]),
        ):
            if bench.wants(case):
                result = bench.pairs(
                    lambda words=words: run(MANAGER, *words, check=words[-1] not in (one, "--json")), bound
                )
                bench.results[case] = result


def remap(bench: Bench, files: int) -> dict:
    """Measure a setup that gives the whole volume to another UID, against chown."""
    with Volume(0, files) as volume:
        identities = iter(range(20_000, 30_000))

        def change() -> None:
            identity = str(next(identities))
            variable("HERMES_UID", identity)
            variable("HERMES_GID", identity)

        def chown():
            return run("/usr/bin/chown", "-Rh", "7777:7777", volume.home)

        result = bench.pairs(lambda: run(SETUP), chown, change)
        variable("HERMES_UID", "10000")
        variable("HERMES_GID", "10000")
        run(SETUP)
        return result | {"files": files}


def sweep(bench: Bench, files: int) -> tuple[dict, dict]:
    """Measure a setup that finds nothing to do, against find, and the memory of it: the most that its processes have
    together, with what they share counted once (PSS)."""
    with Volume(0, files) as volume:
        result = bench.pairs(lambda: run(SETUP), volume.find) | {"files": files}
        pid = os.posix_spawn(SETUP, [SETUP], os.environ, file_actions=DISCARD)
        most = 0.0
        while not os.waitpid(pid, os.WNOHANG)[0]:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            most = max(most, sum(pss(Path("/proc", process)) for process in (str(pid), *children)))
            time.sleep(0.01)
        return result, {"figure": most / 1024, "ms": None, "floor_ms": None, "samples": {}}


def scaling(bench: Bench, counts: tuple[int, ...]) -> dict:
    """Measure what a further profile costs reconcile, from each number of profiles to the next, with the same of the
    loop beside it; the figure is the most to the least of that time."""
    took, loops = {}, {}
    for count in counts:
        with Volume(count, 0) as volume:

            def loop():
                return volume.slots(count + 1)

            result = bench.pairs(lambda: run(RECONCILE), loop, volume.clear)
            took[count], loops[count] = result["ms"], result["floor_ms"]
    each = {more: (took[more] - took[less]) / (more - less) for less, more in pairwise(counts)}
    ratio = {count: took[count] / loops[count] for count in counts}
    floors = {more: (loops[more] - loops[less]) / (more - less) for less, more in pairwise(counts)}
    return {
        "ms": None,
        "floor_ms": None,
        "figure": max(each.values()) / min(each.values()),
        "ms_per_profile": each,
        "floor_ms_per_profile": floors,
        "ratio_to_the_loop": ratio,
        "samples": {},
    }


def on_overlay(bench: Bench) -> dict:
    """Measure reconcile with the scandir on the container's root, where an engine has /run unless told otherwise,
    against one in memory."""
    on_root = "/var/slots"
    with Volume(300, 0) as volume:

        def at(scandir: str) -> float:
            variable("S6_PROFILE_GATEWAY_SCANDIR", scandir)
            return run(RECONCILE)

        def clear() -> None:
            volume.clear()
            shutil.rmtree(on_root, ignore_errors=True)

        return bench.pairs(lambda: at(on_root), lambda: at(volume.scandir), clear)


def pss(process: Path) -> float:
    """Return a process's proportional memory (PSS) in KiB, 0 when it has ended meanwhile."""
    try:
        return int((process / "smaps_rollup").read_text().partition("\nPss:")[2].split()[0])
    except (OSError, IndexError):
        return 0


def memory_of_s6() -> float:
    """Return the proportional memory (PSS) of all of s6's processes, in KiB."""
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            total += pss(process) if (process / "comm").read_text().startswith("s6-") else 0
        except OSError:
            continue  # ended meanwhile
    return total


def modules() -> dict[str, list[str]]:
    """Return what each path imports beyond a bare start."""
    paths = {
        "wrapper": ([f"{SCRIPTS}/main-wrapper.sh", "true"], "main_wrapper"),
        "hermes gateway stop": (["/opt/hermes/bin/hermes", "gateway", "stop"], "main_wrapper"),
        "setup": ([SETUP], "hermes_boot"),
        "reconcile": ([RECONCILE], "hermes_boot"),
        "health": ([MANAGER, "health"], "hermes_boot"),
    }
    bare = imported(["-c", "pass"])
    found = {}
    for name, (argv, module) in paths.items():
        code = f"import os,sys;sys.path.insert(0,{SCRIPTS!r});import {module};sys.exit({module}.main(sys.argv[1:]))"
        found[name] = [other for other in imported(["-c", code, *argv]) if other not in bare]
    return found


def imported(arguments: list[str]) -> list[str]:
    """Return the modules that an interpreter imports, with what its children of ours do."""
    done = subprocess.run([PYTHON, "-IBS", "-X", "importtime", *arguments], capture_output=True, text=True)
    names = [
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:") and "imported" not in line
    ]
    return list(dict.fromkeys(names))


# Outside


def containers(bench: Bench) -> dict:
    """Measure a whole container that runs `true`, against the same one without our boot scripts; the figure is the
    difference."""
    with tempfile.TemporaryDirectory() as folder:
        ours, without = Sandbox(Path(folder, "ours")), Sandbox(Path(folder, "bare"))
        for scripts in ("cont-init.d", "cont-finish.d"):
            shutil.rmtree(without.upper / "etc" / scripts)
            (without.upper / "etc" / scripts).mkdir()
            (without.upper / "etc" / scripts / "nothing").symlink_to("/bin/true")

        def whole(box: Sandbox) -> float:
            started = time.perf_counter()
            if code := box.run("true").returncode:
                raise SystemExit(f"bench: a container ended with {code}")
            return (time.perf_counter() - started) * 1000

        return difference(bench.pairs(lambda: whole(ours), lambda: whole(without)))


def crowd(bench: Bench) -> None:
    """Measure `gateway stop --all` on the slow disk, and `docker stop`, with CROWD gateways that end at once."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        box = Sandbox(Path(folder, "box"), volume=Path(memory, "volume"))
        box.put_agent("#!/bin/sh\nexec sleep infinity\n")
        slow_disk = put_slow_disk(box)
        for number in range(CROWD - 1):
            profile = box.volume / f"profiles/p{number:03}"
            profile.mkdir(parents=True)
            (profile / "SOUL.md").touch()
            desired = "running" if number < RUNNING - 1 else "stopped"
            (profile / "gateway_state.json").write_text(json.dumps({"desired_state": desired}))
        (box.volume / "gateway_state.json").write_text('{"desired_state": "running"}')
        box.start("sleep", "infinity")
        try:
            if slow_disk and bench.wants("slow stop"):
                bench.results["slow stop"] = slow_stop(box)
            if bench.wants("docker stop"):
                box.exec(MANAGER, "gateway", "start", "--all", timeout=120)
                time.sleep(2)
                started = time.perf_counter()
                box.stop(60)
                bench.results["docker stop"] = once((time.perf_counter() - started) * 1000)
        finally:
            box.remove()


def put_slow_disk(box: Sandbox) -> bool:
    """Put the library into a container that makes its disk slow; return whether this machine could make it."""
    if not (compiler := shutil.which("cc")):
        print("bench: no C compiler here, so there is no slow disk either", file=sys.stderr)
        return False
    target = str(box.upper) + SLOW_DISK
    argv = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", target]
    subprocess.run(argv, input=SLOW_DISK_SOURCE, text=True, check=True)
    return True


def slow_stop(box: Sandbox) -> dict:
    """Stop all gateways of a container whose disk is slow."""
    stop = ["env", f"LD_PRELOAD={SLOW_DISK}", MANAGER, "gateway", "stop", "--all"]
    wait_for(lambda: box.exec(MANAGER, "health").returncode == 0, 60)
    time.sleep(2)
    started = time.perf_counter()
    done = box.exec(*stop, timeout=300)
    took = (time.perf_counter() - started) * 1000
    if done.returncode or done.stdout.count("stopped") != CROWD:
        raise SystemExit(f"bench: gateway stop --all: {done.stderr[-500:]}")
    return once(took)


def once(ms: float) -> dict:
    """Return the result of a case that was measured once."""
    return {"ms": ms, "floor_ms": None, "figure": ms, "load": os.getloadavg()[0], "samples": {"case": [ms]}}


def image_layers() -> list[str] | str:
    """Return the image's layers with their sizes, or why there are none."""
    image = os.environ.get("HERMES_TEST_IMAGE", "hermes-agent")
    for engine in filter(shutil.which, ("docker", "podman")):
        done = subprocess.run(
            [engine, "history", "--format", "{{.Size}}\t{{.CreatedBy}}", image], capture_output=True, text=True
        )
        if done.returncode == 0:
            return [line[:120] for line in done.stdout.splitlines()]
    return f"no engine here has the image {image}"


def report(results: dict[str, dict], quick: bool) -> list[str]:
    """Return the table's lines."""
    lines = [("case", "ms", "floor ms", "figure", "to reach", "load", "met")]
    for case, (name, unit, most) in TARGETS.items():
        if not (result := results.get(case)):
            continue
        ms, floor = ("-" if result[key] is None else f"{result[key]:.1f}" for key in ("ms", "floor_ms"))
        size = f" ({result['files']:,} files here)" if quick and "files" in result else ""
        result["target"], result["met"] = most, most is None or result["figure"] <= most
        figure, load = f"{result['figure']:.2f} {unit}", f"{result['load']:.1f}" if "load" in result else "-"
        goal, met = ("-", "-") if most is None else (f"{most:g} {unit}", "yes" if result["met"] else "NO")
        lines.append((name + size, ms, floor, figure, goal, load, met))
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]


def option(name: str) -> str:
    """Return the value of an option of the command line, "" when it is not there."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv[:-1] else ""


def main() -> int:
    """Measure, print and write; return 1 when this machine cannot."""
    only = option("--only").split(",") if option("--only") else []
    bench = Bench(quick=QUICK, only=only)
    if sys.argv[1:2] == ["inside"]:
        os.environ["HOME"] = "/root"
        measure(bench)
        print(json.dumps({"results": bench.results, "modules": {} if only else modules()}))
        return 0
    if why := unsupported():
        print(f"bench: {why}", file=sys.stderr)
        return 1
    out = Path(option("--out") or os.environ.get("OUT") or PROJECT / ".cache/bench.json")
    with tempfile.TemporaryDirectory() as folder:
        box = Sandbox(Path(folder, "box"))
        box.put_agent(STUB)
        (box.upper / "opt/gateway.py").write_text(GATEWAY)
        for file in ("bench.py", "sandbox.py", "become.py"):  # where the checkout is may be hidden there
            shutil.copy(Path(__file__).with_name(file), box.upper / "opt")
        put_slow_disk(box)
        box.start("sleep", "infinity")
        try:
            done = box.exec(
                PYTHON, "-I", "/opt/bench.py", "inside", *sys.argv[1:], *(["--quick"] if QUICK else []), timeout=3000
            )
        finally:
            box.stop()
    if done.returncode:
        print(f"bench: {done.stderr}", file=sys.stderr)
        return 1
    found = json.loads(done.stdout)
    print(done.stderr, end="", file=sys.stderr)
    bench.results = found["results"]
    if bench.wants("slow stop", "docker stop"):
        crowd(bench)
    if bench.wants("container"):
        bench.results["container"] = containers(bench)
    lines = report(found["results"], QUICK)
    sizes = {
        name: (len(text.splitlines()), len(text))
        for name in ("hermes_boot.py", "main_wrapper.py")
        if (text := (PROJECT / name).read_text())
    }
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    machine = {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": subprocess.check_output([PYTHON, "-V"], text=True).split()[1],
    }
    found |= {"date": time.strftime("%Y-%m-%d"), "machine": machine, "quick": QUICK, "image": image_layers()}
    found["scripts"] = {name: {"lines": size[0], "bytes": size[1]} for name, size in sizes.items()}
    print(
        "\n".join(
            [
                f"{model}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}",
                "",
                *lines,
                "",
            ]
        )
    )
    if QUICK:
        print(
            "quick: fewer runs, on about a tenth of the files, profiles and gateways; what is to be reached is"
            " meant for the whole\n"
        )
    slots = found["results"].get("scaling", {})
    for count, ratio in slots.get("ratio_to_the_loop", {}).items():
        each, floor = (slots[key].get(count, 0) for key in ("ms_per_profile", "floor_ms_per_profile"))
        each = f"{each:.3f} ms for each more, {each / floor:.2f} x the loop's" if floor else "start included"
        print(f"reconcile, {int(count):,} profiles: {ratio:.2f} x the loop, {each}")
    for name, size in sizes.items():
        print(f"{name}: {size[0]} lines, {size[1]} bytes")
    for name, imports in found["modules"].items():
        print(f"{name} imports {' '.join(imports)}")
    print(f"image: {found['image']}" if isinstance(found["image"], str) else "\n".join(found["image"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))
    print(f"all of it: {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
