"""Fixtures: the scripts run on a plain volume anywhere, and a sandbox where this machine can run one."""

from __future__ import annotations

import ctypes
import glob
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent / "docker")]

import engine  # noqa: E402
import image  # noqa: E402
import sandbox  # noqa: E402
from become import MS_REC, mount  # noqa: E402
from sandbox import CannotShow, Sandbox, busy  # noqa: E402, F401

# `make test-engine`: the tests that make containers, on a real engine's; those that reach into a sandbox's layers are
# left out.
ON_ENGINE = os.environ.get("HERMES_TEST_ENGINE") == "1"


# How often an attacker tries while root works beside it. 10,000 is for patience.
ROUNDS = int(os.environ.get("HERMES_TEST_ROUNDS", "500"))
HIDDEN = pytest.StashKey[bool]()
CLONE_NEWNS, MS_SLAVE = 0x20000, 1 << 19
HERMES_HERE = "this machine has an account hermes, which the scripts would become, and no namespace to hide it in"


def accounts(path: str) -> tuple[list[str], list[str]]:
    """Return the lines of an account file that are not hermes's, and those that are, by name or by number."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.readlines()
    theirs = [line for line in lines if line.startswith("hermes:") or line.split(":")[2:3] == ["10000"]]
    return [line for line in lines if line not in theirs], theirs


def own_mounts() -> bool:
    """Have what root's tests mount end with them, whatever ends them; return whether that is so."""
    if os.geteuid() != 0 or ctypes.CDLL(None).unshare(CLONE_NEWNS) != 0:
        return False
    mount("none", "/", "none", MS_REC | MS_SLAVE)
    return True


def hide_hermes(*, own: bool) -> bool:
    """Give root's tests account files without hermes, if mounts are theirs alone; return whether that is so."""
    found = {path: accounts(path) for path in ("/etc/passwd", "/etc/group")}
    if os.geteuid() != 0 or not any(theirs for _, theirs in found.values()):
        return True
    if not own:
        return False
    for path, (others, _) in found.items():
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(others)
            file.flush()
            os.chmod(file.name, 0o644)
            subprocess.run(["mount", "--bind", file.name, path], check=True)
    return True


def left_behind() -> set[str]:
    """Return what of ours is on this machine where only a container may have it."""
    return {
        path for path in (*glob.glob("/run/hermes-*"), "/run/s6", "/run/service", "/opt/data") if os.path.exists(path)
    }


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind():
    """The suite writes nothing of ours outside of a container and of its own temporary folders."""
    before = left_behind()
    yield
    assert left_behind() <= before


def pytest_configure(config: pytest.Config) -> None:
    """Be on a machine without a user hermes, and have containers in memory where nothing of them can stay."""
    if not ON_ENGINE:
        Sandbox.in_memory = own_mounts()
        config.stash[HIDDEN] = hide_hermes(own=Sandbox.in_memory)


# Programs that a small image has not or a plain container may not use, how a test calls them, and the capability that
# they need; see capabilities(7)
PROGRAMS = {
    "ps": r'"ps"|\bps (-|a)',
    "pkill": r"\bpkill ",
    "chattr": r'"chattr"',
    "mount": r'"u?mount"',
    "unshare": r'"unshare"|\bunshare -',
}
CAPABILITIES = {"chattr": 9, "mount": 21, "unshare": 21}


def text_of(thing: object, module: ModuleType, seen: set[object]) -> str:
    """Return the source of a test, with that of what it names in its module."""
    if isinstance(thing, str):
        return thing
    if isinstance(thing, (dict, tuple)):
        return "\n".join(text_of(part, module, seen) for part in (thing.values() if isinstance(thing, dict) else thing))
    thing = inspect.unwrap(thing) if callable(thing) else thing  # a fixture is a function too
    if not inspect.isfunction(thing) or thing in seen:
        return ""
    seen.add(thing)
    text = inspect.getsource(thing)
    named = (getattr(module, name, None) for name in set(re.findall(r"\w+", text)))
    return "\n".join([text, *(text_of(other, module, seen) for other in named)])


@cache
def refused(program: str) -> str:
    """Return why a program cannot be used here, "" when it can."""
    if not shutil.which(program):
        return f"this machine has no {program}"
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)
    may = program not in CAPABILITIES or int(effective, 16) >> CAPABILITIES[program] & 1
    return "" if may else f"{program} is not permitted here"


def lacking(item: pytest.Function) -> list[str]:
    """Return why programs that a test calls cannot be used here."""
    missing = [name for name in PROGRAMS if refused(name)]
    things = [item.function, *(item.callspec.params.values() if hasattr(item, "callspec") else ())]
    text = "\n".join(text_of(thing, item.module, set()) for thing in things) if missing else ""
    return [refused(name) for name in missing if re.search(PROGRAMS[name], text)]


def dealt(items: list[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return the tests in an order in which the part of each of pytest-xdist's workers begins with the long ones."""
    long = [item for item in items if item.get_closest_marker("long")]
    others = [item for item in items if item not in long]
    size = -(-len(others) // workers)
    parts = (long[number::workers] + others[number * size :][:size] for number in range(workers))
    return [item for part in parts for item in part]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the plain tests; leave out what an engine cannot show; skip what this machine lacks the programs for."""
    for item in items:
        if "live" not in item.fixturenames:
            item.add_marker("plain")
        if not ON_ENGINE and isinstance(item, pytest.Function) and (reasons := lacking(item)):
            item.add_marker(pytest.mark.skip(reason=", ".join(reasons)))
    wanted = [item for item in items if "container" in item.fixturenames and not item.get_closest_marker("sandbox")]
    if ON_ENGINE:
        wanted += [item for item in items if item.path.parent.name == "docker" and item not in wanted]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        items[:] = dealt(items, int(workers))


def missing(why: str) -> NoReturn:
    """Skip with the reason; fail instead where live tests are required."""
    (pytest.fail if os.environ.get("HERMES_TEST_REQUIRE_LIVE") else pytest.skip)(why)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Skip what the way to make a container here cannot show."""
    if call.excinfo and isinstance(why := call.excinfo.value, CannotShow):
        call.excinfo = pytest.CallInfo.from_call(lambda: missing(str(why)), call.when).excinfo


def fetched(get: Callable[[], Path]) -> Path:
    """Return what this machine lacks, or skip the test where it cannot be had."""
    try:
        return get()
    except image.CannotFetch as error:
        missing(str(error))


@pytest.fixture(scope="session")
def live() -> None:
    """Skip with the reason where no container can run; fail instead where live tests are required, which means the
    sandbox's."""
    why = ("" if engine.engine() else "no container engine answers") if ON_ENGINE else sandbox.maker()[1]
    if why and os.environ.get("HERMES_TEST_REQUIRE_LIVE") and not ON_ENGINE:
        pytest.fail(f"live tests are required here: {why}")
    if why:
        pytest.skip(why)
    if ON_ENGINE:
        engine.image()  # built here, out of every test's time


@pytest.fixture
def in_time(live):
    """Fail a test that takes an engine longer than its limit, and let it clean up."""

    def fail(*_: object) -> None:
        pytest.fail(f"took longer than {engine.TIMEOUT} s")

    if not ON_ENGINE:
        yield
        return
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(engine.TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def container(in_time, request, tmp_path):
    """Make containers, all on one volume unless told otherwise; they are removed at the end."""
    boxes: list[Sandbox] = []
    maker = engine.EngineContainer if ON_ENGINE else sandbox.maker()[0]
    if request.node.get_closest_marker("overlay") and maker not in (engine.EngineContainer, Sandbox):
        missing("in place, s6-overlay is not PID 1")

    def make(**options) -> Sandbox:
        options.setdefault("volume", tmp_path / "volume")
        if options.get("agent") and not ON_ENGINE:
            fetched(image.agent_venv)
        boxes.append(maker(tmp_path / f"box{len(boxes)}", **options))
        return boxes[-1]

    yield make
    for box in boxes:
        box.remove()


# What s6-overlay says of a boot that failed, after us, at S6_VERBOSITY 1; with 0 it is the two lines of rc.init alone.
OVERLAYS = ("/run/s6/basedir/scripts/rc.init: ", "s6-rc: ", "cont-init: ")
if not ON_ENGINE and sandbox.maker()[0] is not Sandbox:
    OVERLAYS += ("init: info: s6-svscan runs as PID ",)  # what is said instead, in place


def ours(stderr: bytes | str) -> list[str]:
    """Return the lines on stderr that are not s6-overlay's."""
    text = stderr if isinstance(stderr, str) else stderr.decode(errors="surrogateescape")
    return [line for line in text.splitlines() if not line.startswith(OVERLAYS)]


MANAGER = "/opt/hermes/bin/hermes-boot"
GATEWAY = """#!/bin/sh
# A gateway that does what the file `does` of its profile says; any other command shows what it was called with.
folder=$HERMES_HOME
[ "$1" != -p ] || folder=$HERMES_HOME/profiles/$2
case "$*" in *"gateway run --replace"*) ;; *) echo "real hermes: $*"; exit 0;; esac
echo start >> "$folder/starts"
. "$folder/does"
"""
RUN = "exec sleep infinity\n"


class Gateways:
    """A running container with profiles whose gateways do as told."""

    def __init__(
        self,
        box: Sandbox,
        profiles: dict[str, str],
        state: str = "",
        *,
        agent: str = GATEWAY,
        command: tuple[str, ...] = ("sleep", "infinity"),
    ) -> None:
        self.box, self.volume = box, box.volume
        box.put_agent(agent)
        for name, does in ({"default": RUN} | profiles).items():
            folder = self.folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "SOUL.md").touch()
            (folder / "does").write_text(does)
            if state:
                (folder / "gateway_state.json").write_text(
                    json.dumps({"desired_state": state, "kept": [1, {"a": None}]})
                )
        box.start(*command)

    def folder(self, name: str) -> Path:
        """Return a profile's folder on the machine."""
        return self.volume if name == "default" else self.volume / "profiles" / name

    def do(self, *words: str, user: str | None = None) -> subprocess.CompletedProcess:
        """Run `hermes-boot gateway …` in the container."""
        return self.box.exec(MANAGER, "gateway", *words, user=user)

    def up(self, name: str) -> bool:
        """Return s6's own word; a gateway that does something at SIGTERM has to have come so far as to say it."""
        done = self.box.exec("/command/s6-svstat", "-o", "up,pid", f"/run/service/gateway-{name}")
        up, _, pid = done.stdout.strip().partition(" ")
        return up == "true" and (" TERM\n" not in (self.folder(name) / "does").read_text() or self.minds(pid))

    def minds(self, pid: str) -> bool:
        """Return whether a process ignores SIGTERM or has a handler for it; see proc(5)."""
        masks = self.box.exec("grep", "-E", "^Sig(Ign|Cgt)", f"/proc/{pid}/status").stdout.split()[1::2]
        return any(int(mask, 16) >> signal.SIGTERM - 1 & 1 for mask in masks)

    def starts(self, name: str) -> int:
        """Return how often a gateway was started."""
        file = self.folder(name) / "starts"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def state(self, name: str) -> dict:
        """Return a profile's state file."""
        return json.loads((self.folder(name) / "gateway_state.json").read_text())

    def pid(self, name: str) -> str:
        """Return a gateway's pid in the container."""
        return self.box.exec("/command/s6-svstat", "-o", "pid", f"/run/service/gateway-{name}").stdout.strip()


@pytest.fixture
def gateways(container):
    """Start a container with profiles."""
    return lambda profiles, state="", **options: Gateways(container(**options), profiles, state)


STUB = f"""import os, sys
sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r})
from hermes_boot import main
os._exit(main(sys.argv))
"""


class Plain:
    """The scripts on a volume of this machine's, without s6: what they do with files alone."""

    def __init__(self, folder: Path) -> None:
        self.home, self.scandir = folder / "home", folder / "scandir"
        self.home.mkdir()
        self.stub = folder / "hermes_boot.py"  # as in the image, since Python compiles a script anew at every start
        self.stub.write_text(STUB)

    def profile(self, name: str, state: str | bytes | None = None, soul: bool = True) -> Path:
        """Make a profile folder, with a state file and a SOUL.md or without."""
        folder = self.home if name == "default" else self.home / "profiles" / name
        folder.mkdir(parents=True, exist_ok=True)
        if soul:
            (folder / "SOUL.md").write_text("soul\n")
        if state is not None:
            (folder / "gateway_state.json").write_bytes(state if isinstance(state, bytes) else state.encode())
        return folder

    def reconcile(
        self, *arguments: str, command: list[str] | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run the phase; S6_ and HERMES_ variables are the test's own."""
        clean = {
            "PATH": os.environ["PATH"],
            "HERMES_HOME": str(self.home),
            "S6_PROFILE_GATEWAY_SCANDIR": str(self.scandir),
        }
        argv = [sys.executable, "-IS", str(self.stub), *(command or ["reconcile"]), *arguments]
        return subprocess.run(argv, env=clean | environment, capture_output=True, text=True, timeout=60)

    def slots(self) -> dict[str, bool]:
        """Return every published slot, and whether it starts by itself."""
        found = sorted(path for path in self.scandir.iterdir() if path.name.startswith("gateway-"))
        return {path.name.removeprefix("gateway-"): not (path / "down").exists() for path in found}


@pytest.fixture
def stays_itself(request) -> None:
    """Skip where a script that is started as root would become this machine's hermes."""
    if not request.config.stash.get(HIDDEN, True):
        pytest.skip(HERMES_HERE)


@pytest.fixture
def plain(stays_itself, tmp_path) -> Plain:
    """A volume and a scandir."""
    return Plain(tmp_path)
