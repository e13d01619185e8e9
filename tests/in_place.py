"""A container without any privilege to make one: in place, for a root that is a container's own already.

In a plain container (root, no CAP_SYS_ADMIN) there are no namespaces to be had. There the image's files are put where
they belong, /init runs below the container's PID 1, which makes it the fallback init, and afterwards all is as it was.
One container at a time. It is chosen by sandbox.py where namespaces are refused and this is a container, or where
HERMES_IN_PLACE=1 says so.

What it cannot show, besides what a sandbox cannot: s6-overlay itself (PID 1 is another's), mounts, a second container
beside the first, and a boot that finds /run empty of the machine's own things.

Everything that is put away or put in place is noted in a journal first. Whatever ends the run, the next one begins by
undoing that.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from sandbox import Sandbox, command_runs, start_time, take_place

STATE = Path("/.hermes-in-place")  # on the root's own file system, so that a rename is all it takes
JOURNAL, AWAY = STATE / "journal", STATE / "away"
VOLUME = "/opt/data"
OURS = ("/init", "/init.s6-overlay", "/command", "/package", "/opt/hermes", VOLUME, "/etc/cont-init.d")
# folders whose new entries are the container's own: kept with its layer, or forgotten
KEPT = ("/", "/etc", "/home", "/opt", "/srv", "/usr/local/bin", "/var")
FORGOTTEN = ("/run", "/tmp")
PR_SET_CHILD_SUBREAPER = 36


def unsupported() -> str:
    """Return why no container can be made in place here, "" when one can."""
    inside = [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)]
    if os.environ.get("HERMES_IN_PLACE") != "1" and not inside and "KUBERNETES_SERVICE_HOST" not in os.environ:
        return "not in place: this is no container, and HERMES_IN_PLACE=1 is not set"
    if os.geteuid() != 0:
        return "in place needs root"
    if not os.access("/", os.W_OK) or not os.access("/etc", os.W_OK):
        return "in place needs a root file system that can be written"
    STATE.mkdir(exist_ok=True)
    with open(STATE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "not in place: another container runs here, and there is place for one"
        undo()
    if there := [path for path in OURS if os.path.lexists(path)]:
        return f"not in place: {there[0]} is there already"
    return ""


# What is put in place, and undone


def note(kind: str, *paths: str) -> None:
    """Write what is about to be done into the journal."""
    with open(JOURNAL, "a") as file:
        file.write(json.dumps([kind, *paths]) + "\n")
        file.flush()
        os.fsync(file.fileno())


def put(layer: str, target: str = "/") -> None:
    """Move what lies in a layer to where it belongs; what is in its way is put away."""
    for name in os.listdir(layer):
        source, path = f"{layer}/{name}", os.path.join(target, name)
        folder = os.path.isdir(source) and not os.path.islink(source)
        if folder and os.path.isdir(path):
            put(source, path)
            continue
        if os.path.lexists(path):
            away = f"{AWAY}/{path.replace('%', '%25').replace('/', '%2f')}"
            note("away", path, away)
            os.rename(path, away)
        note("put", path, source)
        os.rename(source, path)


def undo() -> None:
    """Undo what the journal tells, last things first; what was put in place goes back to its layer as it is by now."""
    lines = JOURNAL.read_text().splitlines() if JOURNAL.exists() else []
    for kind, *paths in map(json.loads, reversed(lines)):
        UNDO[kind](*paths)
    JOURNAL.unlink(missing_ok=True)


def take_back(path: str, source: str) -> None:
    """Move what was put in place to where it came from, if that is still there."""
    if os.path.lexists(path) and os.path.isdir(os.path.dirname(source)):
        os.rename(path, source)
    elif os.path.lexists(path):
        remove(path)


def put_back(path: str, away: str) -> None:
    """Move what was in the way back."""
    if os.path.lexists(away):
        os.rename(away, path)


def take_new(layer: str, *entries: str) -> None:
    """Move what has come into the folders above to the layer, or remove it."""
    for folder in KEPT + FORGOTTEN:
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if path in entries or path == str(STATE):
                continue
            target = f"{layer}{path}"
            if folder in FORGOTTEN or not os.path.isdir(layer):
                remove(path)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.rename(path, target)


def remove(path: str) -> None:
    """Remove whatever is there."""
    subprocess.run(["rm", "-rf", "--one-file-system", path], check=True)


def restore_owner(path: str, uid: int, gid: int, mode: int) -> None:
    """Give a folder back to who had it."""
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def leave_volume(volume: str) -> None:
    """Move the volume back from where it was mounted, as it were."""
    if os.path.islink(VOLUME):
        os.unlink(VOLUME)
    elif os.path.islink(volume):
        os.unlink(volume)
        os.rename(VOLUME, volume)


UNDO = {"put": take_back, "away": put_back, "new": take_new, "owner": restore_owner, "volume": leave_volume}


# A container


class InPlace(Sandbox):
    """One container at a time, on this machine's own root; see sandbox.Sandbox for the options and methods."""

    def make_layers(self, layer: Path) -> None:
        """Make the writable layer, on the root's own file system; nothing of it is mounted."""
        layers = STATE / f"box-{os.getpid()}-{time.monotonic_ns()}"
        layers.mkdir(parents=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "layers").symlink_to(layers)
        shutil.copytree(layer, layers / "upper", symlinks=True)

    @property
    def upper(self) -> Path:
        """The container's layer: while it runs, that is the root."""
        return Path("/") if self.init() else self.folder / "layers/upper"

    def command(self, words: list[str]) -> list[str]:
        """Return the argv that runs this container in the foreground; its exit code is the container's."""
        if self.mounts or self.run_options != "mode=0755":
            raise CannotShow("mount")
        if self.first:
            raise CannotShow("other PID 1")
        self.write_spec(words)
        return [sys.executable, "-IS", str(Path(__file__).resolve()), str(self.folder)]

    def booted(self) -> bool:
        """Return whether the command runs."""
        return bool(self.init()) and command_runs(Path("/"))

    def path(self, guest: str) -> Path:
        """Return the path of a path in the running container: the same."""
        return Path(guest)

    def exec_command(
        self, words: list[str], user: str | None = None, environment: dict[str, str] | None = None
    ) -> list[str]:
        """Return the argv that runs a program as in the running container."""
        variables = {"HOME": "/root"} | self.environment | (environment or {})
        drop = ["/command/s6-setuidgid", user] if user else []
        return ["env", "-C", "/", "-i", *(f"{name}={value}" for name, value in variables.items()), *drop, *words]

    def remove(self) -> None:
        """Stop and forget everything but a volume that was given."""
        layers = os.path.realpath(self.folder / "layers")
        super().remove()
        shutil.rmtree(layers, ignore_errors=True)


class CannotShow(Exception):
    """What a container in place cannot have."""


# The process that a container in place is


def main(folder: str) -> int:
    """Put a container in place, run it, undo all; return its exit code."""
    spec = json.loads(Path(folder, "spec.json").read_text())
    Path(folder, "pid").write_text(f"{os.getpid()} {start_time(os.getpid())}")
    lock = os.open(STATE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("in place: another container runs here, and there is place for one", file=sys.stderr)
        return 125
    undo()
    AWAY.mkdir(exist_ok=True)
    try:
        enter(spec, os.path.realpath(f"{folder}/layers/upper"))
        return run(spec)
    finally:
        undo()


def enter(spec: dict, layer: str) -> None:
    """Put the container in place."""
    volume = spec["volume"]
    note("new", layer, *(os.path.join(parent, name) for parent in KEPT + FORGOTTEN for name in os.listdir(parent)))
    put(layer)
    if spec["agent"]:
        os.rmdir("/opt/hermes/.venv")
        os.symlink(spec["agent"], "/opt/hermes/.venv")
    note("volume", volume)
    if os.stat(volume).st_dev == os.stat("/").st_dev:
        os.rename(volume, VOLUME)
        os.symlink(VOLUME, volume)
    else:
        os.symlink(volume, VOLUME)
    if spec["user"] is not None:
        status = os.stat("/run")
        note("owner", "/run", status.st_uid, status.st_gid, status.st_mode & 0o7777)
        os.chown("/run", spec["user"], spec["gid"])


def run(spec: dict) -> int:
    """Run the entrypoint below us, with all that it leaves, to the end."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        become(spec)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    code = reap(child)
    while left := [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]:
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(-1, 0)
    return code if code >= 0 else 128 - code


def reap(child: int) -> int:
    """Reap until a child has ended; return its code."""
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def become(spec: dict) -> None:
    """In the child: be the entrypoint."""
    os.umask(0o022)
    take_place(spec)
    words = [os.fsencode(word) for word in spec["words"]]
    os.execve(words[0], words, {os.fsencode(name): os.fsencode(value) for name, value in spec["environment"]})


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
