"""A container without any privilege to make one: in place, for a root that is a container's own already.

In a plain container (root, no CAP_SYS_ADMIN) there are no namespaces to be had. There the image's files are put where
they belong, /init runs below the container's PID 1, which makes it the fallback init, and afterwards all is as it was.
sandbox.py takes this way where namespaces are refused and this is a container, or where HERMES_IN_PLACE=1 says so.

What it cannot show, besides what a sandbox cannot: s6-overlay as PID 1, mounts, a second container beside
the first, and a machine's own processes out of sight. What others make in /run while a container is in place goes with
it, as does what other users make in /tmp, and while the tests run what is made in the folders KEPT below and in /tmp.

Whatever is put away or in place is noted in a journal first. Whatever ends a run, the next one begins by undoing it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import marshal
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from become import attend, start_time, take_place
from sandbox import CACHE, FIXED, CannotShow, Sandbox, command_lines, image, unreachable, wait_for

STATE = Path("/.hermes-in-place")  # on the root's own file system, so that a rename is all it takes
JOURNAL, AWAY = STATE / "journal", STATE / "away"
VOLUME, AGENT = "/opt/data", "/opt/hermes/.venv"
OURS = ("/init", "/init.s6-overlay", "/command", "/package", "/opt/hermes", VOLUME, "/names", "/etc/cont-init.d")
FORGOTTEN = ("/run", "/tmp")  # what is new here is forgotten; in /tmp, what is not root's, or not pytest's
KEPT = ("/", "/etc", "/home", "/opt", "/srv", "/usr/local/bin", "/var")  # in tests: what is new here is the layer's
PR_SET_CHILD_SUBREAPER = 36


def unsupported() -> str:
    """Return why no container can be made in place here, "" when one can."""
    inside = [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)]
    if os.environ.get("HERMES_IN_PLACE") != "1" and not inside and "KUBERNETES_SERVICE_HOST" not in os.environ:
        return "not in place: this is no container, and HERMES_IN_PLACE=1 is not set"
    if os.geteuid() != 0:
        return "in place needs root"
    if not all(os.access(path, os.W_OK) for path in KEPT + FORGOTTEN):
        return "in place needs a root file system that can be written"
    there = [path for path in OURS if os.path.lexists(path)]
    return f"not in place: {there[0]} is there already" if there and not JOURNAL.exists() else ""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Have the root for ourselves, as it was before anybody had; it is so again afterwards."""
    with contextlib.ExitStack() as at_end:
        lock = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
        at_end.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotShow("another container runs; in place, there is room for one at a time") from None
        at_end.callback(undo)
        undo()
        AWAY.mkdir(parents=True, exist_ok=True)
        yield


# What is put in place, and undone


def note(kind: str, *words: str | int) -> None:
    """Write what is about to be done into the journal."""
    with open(JOURNAL, "a") as file:
        file.write(json.dumps([kind, *words]) + "\n")


def undo() -> None:
    """Undo what the journal tells, last things first; what was put in place goes back to its layer as it is by now.

    A step that is undone leaves the journal, so that whatever ends this may begin again.
    """
    lines = JOURNAL.read_bytes().splitlines(keepends=True) if JOURNAL.exists() else []
    size = sum(map(len, lines))
    for line in reversed(lines):
        if line.endswith(b"\n"):
            kind, *words = json.loads(line)
            UNDO[kind](*words)
        size -= len(line)
        os.truncate(JOURNAL, size)
    JOURNAL.unlink(missing_ok=True)
    for layers in STATE.glob("box-*"):
        folder, maker = layers.joinpath("of").readlink(), layers.name.split("-")[1:3]
        if not running(*maker) and CACHE / "containers" not in folder.parents:  # those have a name, and stay
            remove(folder)
            remove(layers)
    for folder in (AWAY, STATE):
        with contextlib.suppress(OSError):  # it is not there, or a stopped container's layer is
            folder.rmdir()


def put_file(layer: str, source: str, target: str) -> None:
    """Copy a file of a layer; link what no container changes, which halves the work."""
    if source.removeprefix(layer).startswith(tuple(f"{folder}/" for folder in FIXED)):
        with contextlib.suppress(OSError):  # the layers are on another file system
            os.link(source, target)
            return
    shutil.copy2(source, target)


def put(source: str, path: str) -> None:
    """Move something to where it belongs; a folder that is there gets what is in it, all else is put away."""
    if os.path.isdir(source) and not os.path.islink(source) and os.path.isdir(path):
        for name in os.listdir(source):
            put(f"{source}/{name}", os.path.join(path, name))
        return
    if os.path.lexists(path):
        away = f"{AWAY}/{path.replace('%', '%25').replace('/', '%2f')}"
        note("moved", away, path)
        move(path, away)
    note("moved", path, source)
    move(source, path)


def move_back(path: str, source: str) -> None:
    """Move something to where it was, if its folder is still there."""
    if os.path.lexists(path) and os.path.isdir(os.path.dirname(source)):
        move(path, source)
    elif os.path.lexists(path):
        remove(path)


def take_new(layer: str, folder: str, in_tests: bool, *entries: str) -> None:
    """Move what has come into a folder to the layer, or forget it."""
    forgotten = []
    for name in set(os.listdir(folder)) - {*entries, STATE.name}:
        path = os.path.join(folder, name)
        if folder == "/tmp" and (name.startswith("pytest-") if in_tests else os.lstat(path).st_uid == os.geteuid()):
            continue
        if folder in FORGOTTEN or not os.path.isdir(layer):
            forgotten.append(path)
        else:
            os.makedirs(os.path.dirname(layer + path), exist_ok=True)
            move(path, layer + path)
    remove(*forgotten)


def move(source: str, target: str) -> None:
    """Rename, or copy and remove where that cannot be done."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        subprocess.run(["mv", "-T", source, target], check=True)


def remove(*paths: str | Path) -> None:
    """Remove whatever is there."""
    for first in range(0, len(paths), 1000):
        subprocess.run(["rm", "-rf", "--one-file-system", "--", *paths[first : first + 1000]], check=True)


def restore_owner(path: str, uid: int, gid: int, mode: int) -> None:
    """Give a folder back to who had it."""
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def bring(folder: str, path: str) -> None:
    """Have a folder that outlives the container where it belongs: moved, and a link instead, or by a link to it."""
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)
    note("bring", folder, path)
    if os.stat(folder).st_dev == os.stat("/").st_dev:
        os.rename(folder, path)
        os.symlink(path, folder)
    else:
        os.symlink(folder, path)


def bring_back(folder: str, path: str) -> None:
    """Undo that."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.lexists(path):
        if os.path.islink(folder):
            os.unlink(folder)
        os.rename(path, folder)


def end(pid: int, started: str) -> None:
    """Kill a process that was started, with all below it, if it still runs."""
    with contextlib.suppress(OSError):
        if start_time(pid) != started:
            return
        os.kill(pid, signal.SIGSTOP)  # so that it starts no more
        for child in children(pid):
            end(child, start_time(child))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not running(pid, started))


def children(pid: int | str) -> list[int]:
    """Return a process's children."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int | str, started: str) -> bool:
    """Return whether a process is more than what waits for its parent to ask."""
    try:
        return start_time(pid) == started and b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


UNDO = {"moved": move_back, "new": take_new, "owner": restore_owner, "bring": bring_back, "run": end}


def at_home(folders: dict[str, Path], work: Callable[[], object]) -> None:
    """Do something while folders are where they belong."""
    with alone():
        for path, folder in folders.items():
            put(str(folder), path)
        work()


# A container


class InPlace(Sandbox):
    """One container at a time, on this machine's own root; see sandbox.Sandbox for the options and methods."""

    latest: Sandbox | None = None

    def make_layers(self, layer: Path) -> None:
        """Make the writable layer, on the root's own file system; nothing of it is mounted."""
        layers = STATE / f"box-{os.getpid()}-{start_time(os.getpid())}-{time.monotonic_ns()}"
        layers.mkdir(parents=True)
        (layers / "of").symlink_to(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "layers").symlink_to(layers)
        shutil.copytree(layer, layers / "upper", symlinks=True, copy_function=partial(put_file, f"{layer}/"))

    @property
    def upper(self) -> Path:
        """The container's layer: while it runs, that is the root."""
        return Path("/") if self.init() else self.folder / "layers/upper"

    def command(self, words: list[str]) -> list[str]:
        """Return the argv that runs this container in the foreground; its exit code is the container's."""
        if self.mounts or self.run_options != "mode=0755":
            raise CannotShow("in place, nothing can be mounted")
        if self.first:
            raise CannotShow("in place, PID 1 is another's")
        if (latest := InPlace.latest) and (latest.init() or not (latest.folder / "pid").exists()):
            raise CannotShow("in place, there is room for one container at a time")
        self.write_spec(words)
        for folder in [self.volume] + ([image().agent_venv()] if self.agent else []):
            if folder.stat().st_dev != os.stat("/").st_dev and (why := unreachable(folder.parent)):
                raise CannotShow(f"{why}, and {folder} cannot be moved, being on another file system")
        with alone():
            InPlace.latest = self
            (self.folder / "pid").unlink(missing_ok=True)
            return [sys.executable, "-IS", str(Path(__file__).resolve()), str(self.folder)]

    def program(self, words: list[str]) -> dict:
        """Return what runs this container, as options of Popen's."""
        return {"args": self.command(words)}

    def init(self) -> int:
        """Return the number of the container's first process, 0 when the container is not running; it may be undone
        still."""
        try:
            (pid, started), outer = ((self.folder / name).read_text().split() for name in ("init", "pid"))
            return int(pid) if running(pid, started) and running(*outer) else 0
        except (OSError, ValueError):
            return 0

    def path(self, guest: str) -> Path:
        """Return the path of a path in the running container: the same."""
        return Path(guest)

    def processes(self) -> dict[str, str]:
        """Return the command lines of the processes in the running container, by pid: no others on this machine."""
        found = command_lines(Path("/proc"))
        below = children((self.folder / "pid").read_text().split()[0])
        for pid in below:
            with contextlib.suppress(OSError):  # it has ended
                below += children(pid)
        return {str(pid): found[str(pid)] for pid in below if str(pid) in found}

    def enter(self) -> list[str]:
        """Return the argv of an env that runs in the container."""
        return ["env", "-C", "/"]

    def remove(self) -> None:
        """Stop and forget everything but a volume that was given."""
        layers = os.path.realpath(self.folder / "layers")
        if InPlace.latest is self:
            InPlace.latest = None
        if self.process and self.process.poll() is None:
            self.stop(1)  # a kill would leave what was started in it from outside
        super().remove()
        shutil.rmtree(layers, ignore_errors=True)
        with contextlib.suppress(OSError):  # another's layer is there
            STATE.rmdir()


# The process that a container in place is


def main(folder: str) -> int:
    """Put a container in place, run it, undo all; return its exit code."""
    spec = marshal.loads(Path(folder, "spec").read_bytes())
    Path(folder, "pid").write_text(f"{os.getpid()} {start_time(os.getpid())}")
    try:
        with alone():
            enter(spec, os.path.realpath(f"{folder}/layers/upper"))
            return run(spec, folder)
    except CannotShow as error:
        print(f"in place: {error}", file=sys.stderr)
        return 125


def enter(spec: dict, layer: str) -> None:
    """Put the container in place."""
    in_tests = "PYTEST_CURRENT_TEST" in os.environ
    for folder in (KEPT if in_tests else ()) + FORGOTTEN:
        note("new", layer, folder, in_tests, *os.listdir(folder))
        status = os.stat(folder)
        note("owner", folder, status.st_uid, status.st_gid, status.st_mode & 0o7777)
    put(layer, "/")
    if spec["agent"]:
        bring(spec["agent"], AGENT)
    bring(spec["volume"], VOLUME)
    if spec["user"] is not None:
        os.chown("/run", spec["user"], spec["gid"])


def run(spec: dict, folder: str) -> int:
    """Run the entrypoint below us, with all that it leaves, to the end."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        become(spec, folder)
    code = attend(child)
    while left := children(os.getpid()):
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(-1, 0)
    return code


def become(spec: dict, folder: str) -> None:
    """In the child: be the entrypoint."""
    pid, started = os.getpid(), start_time(os.getpid())
    note("run", pid, started)  # by itself, so that nothing of it goes unnoted
    Path(folder, "init").write_text(f"{pid} {started}")
    os.umask(0o022)
    take_place(spec)
    words = [os.fsencode(word) for word in spec["words"]]
    os.execve(words[0], words, {os.fsencode(name): os.fsencode(value) for name, value in spec["environment"]})


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
