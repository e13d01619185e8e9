#!/usr/bin/env python3
"""How far the boot is from what the machine can do: every figure a ratio to a floor, measured in turn with it in the
same run.

Runs inside a sandbox container (tests/sandbox.py, needs root), on volumes in memory, so that the disk is not what is
measured. The floors are programs anyone can run: a bare `python3 -IS -c pass`, `find` for a clean sweep, `chown -Rh`
for a repair, and for slots a loop that makes the same files under the same names. Prints a table, writes the whole as
JSON.

bench.py [--quick] [--out FILE]      QUICK=1 and OUT=FILE do the same; quick takes under a minute, with smaller volumes
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sandbox import PROJECT, Sandbox, base_python, unsupported, wait_for

SCRIPTS = "/opt/hermes/docker"
PYTHON = base_python()
BARE = [PYTHON, "-IS", "-c", "pass"]
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
# case: what it is to reach, in words and as the largest figure
TARGETS = {
    "wrapper, until the program has run": ("x", 1.5),
    "hermes gateway stop, until the gateway has the signal": ("x", 3.0),
    "hermes-boot health": ("x", 4.0),
    "boot, 20 profiles, 10,000 files, nothing to change": ("x", 2.0),
    "boot, 1,000 profiles, 100,000 files, nothing to change": ("x", 1.2),
    "setup with a remap, 100,000 files": ("x", 1.2),
    "setup, 1,000,000 files, nothing to change": ("x", 1.0),
    "memory of that, MiB": ("MiB", 40),
    "container `true`, ms more than without our boot": ("ms", 150),
    "reconcile, a profile among many to one among few": ("x", 1.2),
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
    """Set a variable of the container."""
    Path(VARIABLES, name).write_text(value)


def pairs(case, floor, runs: int, before=lambda: None) -> dict:
    """Measure a case and its floor in turn; return medians, ratio and samples, in ms. before comes before each and
    is not timed."""
    samples: dict[str, list[float]] = {"case": [], "floor": []}
    for _ in range(runs):
        for name, action in (("case", case), ("floor", floor)):
            before()
            samples[name].append(action())
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "ms": medians["case"],
        "floor_ms": medians["floor"],
        "figure": medians["case"] / medians["floor"],
        "samples": samples,
    }


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

    def __init__(self, profiles: int, files: int) -> None:
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
            Path(folder, "gateway_state.json").write_text(
                '{"desired_state": "running", "gateway_state": "running", "pid": 7}'
            )
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


def measure(quick: bool) -> dict[str, dict]:
    """Measure everything that happens inside a container; return the results by case."""
    runs = 3 if quick else 9
    results: dict[str, dict] = {}
    cases = iter(TARGETS)
    results[next(cases)] = pairs(lambda: run(f"{SCRIPTS}/main-wrapper.sh", "true"), lambda: run(*BARE), runs * 4)
    results[next(cases)] = pairs(stop_gateway, lambda: run(*BARE), runs * 2)
    results[next(cases)] = pairs(
        lambda: run(f"{SCRIPTS}/hermes_boot.py", "health", check=False), lambda: run(*BARE), runs * 4
    )
    for case, profiles, files in zip(cases, (20, 1000), (10_000, 100_000)):
        with Volume(profiles, files) as volume:
            floor = lambda: run(*BARE) + run(*BARE) + volume.find() + volume.slots(volume.profiles + 1)  # noqa: E731
            results[case] = pairs(volume.boot, floor, runs, volume.clear)
        if case.startswith("boot, 1,000"):
            break
    results[next(cases)] = remap(10_000 if quick else 100_000, runs)
    name, memory = next(cases), next(cases)
    results[name], results[memory] = sweep(100_000 if quick else 1_000_000, runs)
    next(cases)  # measured outside
    results[next(cases)] = scaling((10, 100, 1000) if quick else (10, 100, 1000, 10_000), 5 * runs)
    return results


def remap(files: int, runs: int) -> dict:
    """Measure a setup that gives the whole volume to another UID, against chown."""
    with Volume(0, files) as volume:
        identities = iter(range(20_000, 30_000))

        def change() -> None:
            identity = str(next(identities))
            variable("HERMES_UID", identity)
            variable("HERMES_GID", identity)

        result = pairs(lambda: run(SETUP), lambda: run("/usr/bin/chown", "-Rh", "7777:7777", volume.home), runs, change)
        variable("HERMES_UID", "10000")
        variable("HERMES_GID", "10000")
        run(SETUP)
        return result | {"files": files}


def sweep(files: int, runs: int) -> tuple[dict, dict]:
    """Measure a setup that finds nothing to do, against find, and the memory of it: the largest process's, times
    their number."""
    with Volume(0, files) as volume:
        result = pairs(lambda: run(SETUP), volume.find, runs) | {"files": files}
        pid = os.posix_spawn(SETUP, [SETUP], os.environ, file_actions=DISCARD)
        most = 1
        while not (ended := os.wait4(pid, os.WNOHANG))[0]:
            most = max(most, 1 + len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
            time.sleep(0.001)
        return result, {
            "figure": ended[2].ru_maxrss / 1024 * most,
            "processes": most,
            "ms": None,
            "floor_ms": None,
            "samples": {},
        }


def scaling(counts: tuple[int, ...], runs: int) -> dict:
    """Measure what a further profile costs reconcile, from each number of profiles to the next, with the same of the
    loop beside it; the figure is the most to the least of that time."""
    took, loops = {}, {}
    for count in counts:
        with Volume(count, 0) as volume:
            times = max(5, runs * 200 // (200 + count))
            result = pairs(lambda: run(RECONCILE), lambda: volume.slots(count + 1), times, volume.clear)
            took[count], loops[count] = result["ms"], result["floor_ms"]
    each = {more: (took[more] - took[less]) / (more - less) for less, more in zip(counts, counts[1:])}
    ratio = {count: took[count] / loops[count] for count in counts}
    floors = {more: (loops[more] - loops[less]) / (more - less) for less, more in zip(counts, counts[1:])}
    return {
        "ms": None,
        "floor_ms": None,
        "figure": max(each.values()) / min(each.values()),
        "ms_per_profile": each,
        "floor_ms_per_profile": floors,
        "ratio_to_the_loop": ratio,
        "samples": {},
    }


def modules() -> dict[str, list[str]]:
    """Return what each path imports beyond a bare start."""
    paths = {
        "wrapper": ([f"{SCRIPTS}/main-wrapper.sh", "true"], "main_wrapper"),
        "hermes gateway stop": (["/opt/hermes/bin/hermes", "gateway", "stop"], "main_wrapper"),
        "setup": ([SETUP], "hermes_boot"),
        "reconcile": ([RECONCILE], "hermes_boot"),
        "health": ([f"{SCRIPTS}/hermes_boot.py", "health"], "hermes_boot"),
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


def containers(runs: int) -> dict:
    """Measure a whole container that runs `true`, against the same one without our boot scripts; the figure is the
    difference."""
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = Sandbox(Path(folder, "ours")), Sandbox(Path(folder, "bare"))
        for scripts in ("cont-init.d", "cont-finish.d"):
            shutil.rmtree(bare.upper / "etc" / scripts)
            (bare.upper / "etc" / scripts).mkdir()
            (bare.upper / "etc" / scripts / "nothing").symlink_to("/bin/true")

        def whole(box: Sandbox) -> float:
            started = time.perf_counter()
            if code := box.run("true").returncode:
                raise SystemExit(f"bench: a container ended with {code}")
            return (time.perf_counter() - started) * 1000

        result = pairs(lambda: whole(ours), lambda: whole(bare), runs)
        return result | {"figure": result["ms"] - result["floor_ms"]}


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
    lines = [("case", "ms", "floor ms", "figure", "to reach", "met")]
    for case, (unit, most) in TARGETS.items():
        result = results[case]
        ms, floor = ("-" if result[key] is None else f"{result[key]:.1f}" for key in ("ms", "floor_ms"))
        size = f" ({result['files']:,} files here)" if quick and "files" in result else ""
        result["target"], result["met"] = most, result["figure"] <= most
        lines.append(
            (
                case + size,
                ms,
                floor,
                f"{result['figure']:.2f} {unit}",
                f"{most:g} {unit}",
                "yes" if result["met"] else "NO",
            )
        )
    widths = [max(len(line[index]) for line in lines) for index in range(6)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]


def main() -> int:
    """Measure, print and write; return 1 when this machine cannot."""
    quick = "--quick" in sys.argv or os.environ.get("QUICK") == "1"
    if sys.argv[1:2] == ["inside"]:
        os.environ["HOME"] = "/root"
        print(json.dumps({"results": measure(quick), "modules": modules()}))
        return 0
    if why := unsupported():
        print(f"bench: {why}", file=sys.stderr)
        return 1
    out = Path(
        sys.argv[sys.argv.index("--out") + 1]
        if "--out" in sys.argv
        else os.environ.get("OUT") or PROJECT / ".cache/bench.json"
    )
    with tempfile.TemporaryDirectory() as folder:
        box = Sandbox(Path(folder, "box"))
        box.put_agent(GATEWAY)
        for file in ("bench.py", "sandbox.py"):  # where the checkout is may be hidden there
            shutil.copy(Path(__file__).with_name(file), box.upper / "opt")
        box.start("sleep", "infinity")
        try:
            done = box.exec(PYTHON, "-I", "/opt/bench.py", "inside", *(["--quick"] if quick else []), timeout=3000)
        finally:
            box.stop()
    if done.returncode:
        print(f"bench: {done.stderr}", file=sys.stderr)
        return 1
    found = json.loads(done.stdout)
    found["results"]["container `true`, ms more than without our boot"] = containers(3 if quick else 9)
    lines = report(found["results"], quick)
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
    found |= {"date": time.strftime("%Y-%m-%d"), "machine": machine, "quick": quick, "image": image_layers()}
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
    if quick:
        print("quick: fewer runs on smaller volumes; what is to be reached is meant for the whole\n")
    slots = found["results"]["reconcile, a profile among many to one among few"]
    for count, ratio in slots["ratio_to_the_loop"].items():
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
