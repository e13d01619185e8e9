#!/usr/bin/env python3
"""A container in miniature, for machines without a container engine: the image's layout and boot, on the real s6.

New mount, PID, UTS and IPC namespaces over this machine's own root (an overlay; the machine is never changed), a tmpfs
on /run, an own /etc/passwd and /etc/group with the user hermes, and the image's files as the Dockerfile lays them out
(image.py). PID 1 is /init, as in the image. Needs root and util-linux (unshare, nsenter, mount). Where namespaces are
refused, as in a plain container, in_place.py takes over.

s6-overlay itself is played by the scripts in docker/stand-in. They do as release 3.2.3.0 does, each thing tried on it:
environment files and with-contenv, the process tree with the command lines that matter, owners and modes below /run,
what is on stderr at each S6_VERBOSITY, a boot that fails, the terminal, signals, the end and its exit codes. What still
differs, so that only a real image can show it:

- The root is this machine's: its Python, its shell and its programs; s6 is Debian's, dynamic, a bug fix newer than the
  release's own. s6 programs that s6 calls by path are in /usr/bin too and not in /command alone.
- Of services there are the oneshots of the bundles user and user2, one after another, then their longruns, all after
  the cont-init scripts; no dependencies, pipelines or bundles of a derived image, no fix-attrs.d, no services.d. There
  is no s6-rc to call. Below another PID 1, where s6-overlay's rc.init runs all the same, this is so too.
- S6_LOGGING, S6_STAGE2_HOOK, S6_RUNTIME_PROFILE, S6_READ_ONLY_ROOT, S6_SYNC_DISKS and S6_CMD_* have no effect, but
  S6_CMD_WAIT_FOR_SERVICES_MAXTIME.
- A container that lived less than a second does not wait for the rest of it. `s6-svscanctl -t` ends it at once.
- With a user, /run is that user's from the start, as the image has it for hermes alone.
- root has all of root's capabilities, /sys is empty, the network is the machine's, nothing is limited.

    sandbox.py run [--name NAME] [-e NAME=VALUE] [-v HOST:GUEST] [-u UID] [-w DIR] [--group-add GID] [--] WORD...
    sandbox.py exec NAME [-u USER] WORD...      stop NAME       restart NAME
"""

from __future__ import annotations

import argparse
import contextlib
import json
import marshal
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from become import MNT_DETACH, call, leave_for_good, mount, start_time

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache"
WRAPPER = "/opt/hermes/docker/main-wrapper.sh"
ENTRYPOINT = ("/init", WRAPPER)
PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\n"
    "www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n"
    "hermes:x:10000:10000::/opt/data:/bin/bash\n"
)
GROUP = "root:x:0:\nwww-data:x:33:\nusers:x:100:\nhermes:x:10000:\n"
# A script that is started by its path would be compiled each time.
BECOME = f"import sys; sys.path.insert(0, {str(PROJECT / 'tests')!r}); from become import leave; leave(sys.argv[1])"
READY = 300  # seconds that a container may take to start on a busy machine


def __getattr__(name: str) -> object:
    """Return what the Dockerfile and the Makefile say, read when it is asked for."""
    if name == "AGENT_VERSION":
        return image().agent_version()
    if name == "IMAGE_ENVIRONMENT":
        return image().environment()
    raise AttributeError(name)


def image():
    """Return the module image, which a container's own processes have no need of."""
    import image as module

    return module


@cache
def unsupported() -> str:
    """Return why this machine cannot run the sandbox, "" when it can."""
    if os.geteuid() != 0:
        return "the sandbox needs root: start docker or podman, or run this as root"
    if any(shutil.which(program) is None for program in ("unshare", "nsenter", "mount")):
        return "the sandbox needs util-linux (unshare, nsenter, mount)"
    if why := unreachable(base_python()):
        return why
    with tempfile.TemporaryDirectory() as folder:
        memory = f"mount -t tmpfs tmpfs {folder}\n" if on_overlay(folder) else ""
        script = f"{memory}cd {folder}\nmkdir upper work root\n{OVERLAY}"
        tried = subprocess.run([*NAMESPACES, "sh", "-ec", script, "sh", folder], capture_output=True, text=True)
    return f"no namespaces or overlay here: {tried.stderr.strip()}" if tried.returncode else ""


def maker() -> tuple[type[Sandbox], str]:
    """Return what makes containers here, and why nothing does ("" when something does)."""
    why = unsupported() if os.environ.get("HERMES_IN_PLACE") != "1" else "HERMES_IN_PLACE=1 is set"
    if not why:
        return Sandbox, ""
    import in_place

    other = in_place.unsupported()
    return in_place.InPlace, f"{why}; {other}" if other else ""


class CannotShow(Exception):
    """What a container made in the way that this machine allows cannot have."""


NAMESPACES = ["unshare", "-m", "-p", "-u", "-i", "--fork", "--kill-child", "--"]
OVERLAY = 'mount -n -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"\n'


def base_python() -> str:
    """Return a Python that the user hermes can reach."""
    return "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else os.path.realpath(sys.executable)


def unreachable(place: str | Path) -> str:
    """Return why other users cannot start a program, or enter a folder, "" when they can."""
    for path in (Path(place).resolve(), *Path(place).resolve().parents):
        if not path.stat().st_mode & 0o001:
            return f"other users cannot have {place}, since {path} is closed to them"
    return ""


def on_overlay(folder: str | Path) -> bool:
    """Return whether a folder is on an overlay, as a container's root is: that cannot be the upper layer of another."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as file:
        return any(line.split()[2] == number and " - overlay " in line for line in file)


# A container


class Sandbox:
    """One container. Its folder holds what a container's writable layer would; the volume outlives it.

    mounts are (host path, guest path); environment is what `docker run -e` gives; user and gid are `--user`, groups
    `--group-add`, all by number; agent says whether to have the real hermes-agent at /opt/hermes/.venv; with an
    entrypoint, that is run below a PID 1 of the platform's, as with `docker run --init`; with first, that is PID 1;
    run_options are those of the tmpfs on /run; passwd and group are the image's account files.
    """

    in_memory = False  # whether the layer of each container is, which costs half as much and is lost with the machine

    def __init__(
        self,
        folder: Path,
        *,
        volume: Path | None = None,
        environment: dict[str, str] | None = None,
        mounts: tuple[tuple[str, str], ...] = (),
        user: int | None = None,
        gid: int | None = None,
        groups: tuple[int, ...] = (),
        workdir: str = "/opt/data",
        agent: bool = False,
        entrypoint: tuple[str, ...] = (),
        first: tuple[str, ...] = (),
        run_options: str = "mode=0755",
        passwd: str = PASSWD,
        group: str = GROUP,
    ) -> None:
        self.folder = folder
        self.volume = volume or folder / "volume"
        self.environment = image().environment() | (environment or {})
        self.mounts, self.user, self.groups, self.workdir, self.agent = mounts, user, groups, workdir, agent
        self.entrypoint, self.first, self.run_options = entrypoint, first, run_options
        self.gid = user if gid is None else gid
        self.process: subprocess.Popen[bytes] | None = None
        self.words: list[str] = []
        if not (folder / "layers/upper").exists():
            self.make_image(passwd, group)

    @property
    def upper(self) -> Path:
        """The writable layer: what lies in it hides the machine's own."""
        return self.folder / "layers/upper"

    def make_image(self, passwd: str, group: str) -> None:
        """Lay out the image's files and accounts; s6's programs of the machine's own are hidden."""
        mask = os.umask(0o022)
        self.make_layers(image().layer())  # may take a download, which may be interrupted: nothing is half made then
        if not os.path.exists("/usr/bin/python3"):
            (self.upper / "usr/bin/python3").symlink_to(base_python())
        (self.upper / "opt/hermes/.venv").mkdir(exist_ok=True)
        etc = self.upper / "etc"
        (etc / "passwd").write_text(passwd)
        (etc / "group").write_text(group)
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files dns\n")  # as in an image
        os.umask(mask)

    def make_layers(self, layer: Path) -> None:
        """Make the writable layer of the image's; in memory if wanted, or where this machine's root is an overlay."""
        layers = self.folder / "layers"
        layers.mkdir(parents=True)
        if self.in_memory or on_overlay(layers):
            mount("tmpfs", str(layers), "tmpfs")
        for name in ("work", "root"):
            (layers / name).mkdir()
        for entry in entries(layer):
            entry.copy(str(self.upper))
        for name in machines_own() - set(os.listdir(layer / "usr/bin")):
            os.mknod(self.upper / "usr/bin" / name, 0o020000, 0)  # overlayfs takes a device 0:0 for "not there"

    def put_agent(self, script: str) -> None:
        """Put a program in the agent's place: for what leads to it, or a gateway that misbehaves on command."""
        write_script(self.upper / "opt/hermes/.venv/bin/hermes", script)

    # Life

    def command(self, words: list[str]) -> list[str]:
        """Return the argv that runs this container in the foreground; its exit code is the container's."""
        self.write_spec(words)
        return [sys.executable, "-IS", "-c", BECOME, str(self.folder)]

    def program(self, words: list[str]) -> dict:
        """Return what runs this container, as options of Popen's. A fork of this process, which has Python's start
        behind it: a container would pay for that each time."""
        return {"args": self.command(words), "preexec_fn": partial(leave_for_good, str(self.folder))}

    def write_spec(self, words: list[str]) -> None:
        """Write down what the container's own processes need to know."""
        self.volume.mkdir(parents=True, exist_ok=True)
        spec = {
            "fixed": [(str(image().layer() / name), f"/{name}") for name in FIXED],
            "volume": str(self.volume),
            "agent": str(image().agent_venv()) if self.agent else "",
            "mounts": self.mounts,
            "environment": list(({"HOME": self.home(), "HOSTNAME": self.folder.name} | self.environment).items()),
            "user": self.user,
            "gid": self.gid,
            "groups": self.groups,
            "workdir": self.workdir,
            "has_init": bool(self.entrypoint),
            "words": [*(self.entrypoint or self.first or ENTRYPOINT), *words],
            "run_options": self.run_options,
        }
        (self.folder / "spec").write_bytes(marshal.dumps(spec))

    def home(self) -> str:
        """Return the home folder of who runs the container, as an engine finds it in the image's /etc/passwd."""
        lines = (self.upper / "etc/passwd").read_text(errors="surrogateescape").splitlines()
        users = (line.split(":") for line in lines if line.count(":") == 6)
        return next((fields[5] for fields in users if fields[2] == str(self.user or 0)), "/")

    def run(self, *words: str, timeout: float = READY, **options) -> subprocess.CompletedProcess:
        """Run to the end, as `docker run`; stdout and stderr are captured unless options say otherwise."""
        options = {"capture_output": True} | options
        return subprocess.run(**self.program(list(words)), timeout=timeout, **options)

    def start(self, *words: str) -> None:
        """Start in the background, as `docker run -d`, and wait for the command; what is said goes to a log."""
        self.words = list(words)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                **self.program(self.words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if not wait_for(lambda: self.process.poll() is not None or self.booted(), READY):
            raise TimeoutError(f"the container's command has not started within {READY} s\n{self.log()}")

    def booted(self) -> bool:
        """Return whether the command runs: the wrapper has left word of itself, and is another program now."""
        return command_runs(self.path("/"))

    def log(self) -> str:
        """Return what `docker logs` would show."""
        return (self.folder / "log").read_text(errors="backslashreplace")

    def init(self) -> int:
        """Return PID 1's number on the machine, 0 when the container is not running."""
        try:
            outer, started = (self.folder / "pid").read_text().split()
            children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            return int(children[0]) if start_time(outer) == started else 0
        except (OSError, IndexError, ValueError):
            return 0

    def signal(self, number: int) -> None:
        """Send a signal to PID 1, as `docker kill -s`, and to no process that has its number later."""
        if init := self.init():
            try:
                process = os.pidfd_open(init)
            except ProcessLookupError:
                return
            if self.init() == init:
                signal.pidfd_send_signal(process, number)
            os.close(process)

    def path(self, guest: str) -> Path:
        """Return a path on the machine for a path in the running container."""
        return Path(f"/proc/{self.init()}/root{guest}")

    def exec_command(
        self, words: list[str], user: str | None = None, environment: dict[str, str] | None = None
    ) -> list[str]:
        """Return the argv that enters the running container, as `docker exec`."""
        variables = {"HOME": "/root"} | self.environment | (environment or {})
        drop = ["/command/s6-setuidgid", user] if user else []
        return [*self.enter(), "-i", *(f"{name}={value}" for name, value in variables.items()), *drop, *words]

    def enter(self) -> list[str]:
        """Return the argv of an env that runs in the container."""
        return ["nsenter", f"--target={self.init()}", *"--mount --pid --uts --ipc --root --wd -- env".split()]

    def exec(
        self, *words: str, user: str | None = None, environment: dict[str, str] | None = None, timeout: float = READY
    ) -> subprocess.CompletedProcess:
        """Run a program in the running container, as root or as a user of it, and capture its output."""
        argv = self.exec_command(list(words), user, environment)
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)

    def processes(self) -> dict[str, str]:
        """Return the command lines of the processes in the running container, by their pids there."""
        return command_lines(self.path("/proc"))

    def stop(self, timeout: float = 10) -> int:
        """Do as `docker stop`: SIGTERM to PID 1, SIGKILL after timeout seconds; return the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout) if self.process else self.wait_gone(timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return self.process.wait() if self.process else 137

    def wait_gone(self, timeout: float) -> int:
        """Wait for a container that another process started."""
        if not wait_for(lambda: not self.init(), timeout):
            raise subprocess.TimeoutExpired("stop", timeout)
        return 0

    def restart(self) -> None:
        """Do as `docker restart`: volume and writable layer stay, /run is new."""
        self.stop()
        self.start(*self.words)

    def remove(self) -> None:
        """Kill and forget everything but a volume that was given."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
        if os.path.ismount(self.folder / "layers"):
            call("umount2", str(self.folder / "layers"), MNT_DETACH)
        shutil.rmtree(self.folder, ignore_errors=True)


# Folders of the layer that no container changes: mounted and not copied
FIXED = ("command", "usr/lib/execline")


class Entry(NamedTuple):
    """An entry of the layer: its path from there, mode and time, and a file's content or a link's target."""

    path: str
    mode: int
    time: int
    content: bytes

    def copy(self, root: str) -> None:
        """Make it below another folder."""
        path = root + self.path
        if stat.S_ISDIR(self.mode):
            os.mkdir(path, self.mode)
        elif stat.S_ISLNK(self.mode):
            os.symlink(self.content, os.fsencode(path))
        else:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.mode & 0o7777)
            os.write(fd, self.content)
            os.utime(fd, ns=(self.time, self.time))
            os.close(fd)


@cache
def entries(layer: Path) -> list[Entry]:
    """Return what is copied of the layer, each folder before what is in it; read once, since each container has it."""
    found = [layer]
    for folder, folders, files in os.walk(layer):
        folders[:] = [name for name in folders if os.path.relpath(f"{folder}/{name}", layer) not in FIXED]
        found += [Path(folder, name) for name in folders + files]
    return [
        Entry(str(path)[len(str(layer)) :], (at := path.lstat()).st_mode, at.st_mtime_ns, content(path))
        for path in found
    ]


def content(path: Path) -> bytes:
    """Return a file's content, a link's target, nothing of a folder."""
    if path.is_symlink():
        return os.fsencode(path.readlink())
    return path.read_bytes() if path.is_file() else b""


@cache
def machines_own() -> set[str]:
    """Return the names of s6's programs that this machine has in /usr/bin."""
    names = os.listdir("/usr/bin")
    return {name for name in names if image().PROGRAMS.fullmatch(name) or name == "execlineb"}


def command_runs(root: Path) -> bool:
    """Return whether the command of the container with this root runs, and is no longer the wrapper.

    /proc/PID/root is the machine's own until the container has its own, which has no /run/hermes-command.
    """
    try:
        pid = (root / "run/hermes-command").read_text().split()[0]
        return os.fsencode(WRAPPER) not in (root / "proc" / pid / "cmdline").read_bytes().split(b"\0")
    except (OSError, IndexError):
        return False


def command_lines(proc: Path) -> dict[str, str]:
    """Return the command lines of the processes in a /proc, by pid."""
    found = {}
    for name in filter(str.isdigit, os.listdir(proc)):
        with contextlib.suppress(OSError):  # it has ended
            found[name] = (proc / name / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").rstrip()
    return found


def write_script(path: Path, text: str) -> None:
    """Write an executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def busy() -> float:
    """Return how many times as long as on a quiet machine things may take here now."""
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_for(condition, timeout: float = 60) -> bool:
    """Poll until a condition holds; return whether it came to hold in time, which is more on a busy machine. What
    takes long is asked less often."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        if waited > max(timeout, min(timeout * busy(), READY)):
            return False
        time.sleep(min(max(0.01, waited / 10), 0.1))
    return True


# Command line


def main() -> int:
    """Run the subcommand of the command line."""
    parser = argparse.ArgumentParser(description="Run the image's boot without a container engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="as `docker run`")
    run.add_argument("--name", help="keep the container under this name, for exec, stop and restart")
    run.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("-v", "--volume", action="append", default=[], metavar="HOST:GUEST")
    run.add_argument("-u", "--user", type=int)
    run.add_argument("-w", "--workdir", default="/opt/data")
    run.add_argument("--group-add", type=int, action="append", default=[])
    for name in ("exec", "stop", "restart"):
        command = commands.add_parser(name, help=f"as `docker {name}`")
        command.add_argument("name")
        if name == "exec":
            command.add_argument("-u", "--user")
    arguments, words = parser.parse_known_args(split_words(sys.argv[1:])[0])
    if words:
        parser.error(f"unknown arguments: {' '.join(words)}")
    if arguments.command == "run" and (wrong := [pair for pair in arguments.env if "=" not in pair]):
        parser.error(f"-e takes NAME=VALUE, not {wrong[0]}")
    if arguments.command == "run" and (wrong := [pair for pair in arguments.volume if ":" not in pair]):
        parser.error(f"-v takes HOST:GUEST, not {wrong[0]}")
    return act(arguments, split_words(sys.argv[1:])[1])


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at `--`, or before the first word that is neither an option of ours nor its value."""
    index = 1 if argv[:1] == ["run"] else 2
    while index < len(argv) and argv[index] != "--" and argv[index].startswith("-") and argv[:1] in (["run"], ["exec"]):
        if argv[index] in ("-h", "--help"):
            return argv[: index + 1], []
        index += 2 if "=" not in argv[index] else 1
    return argv[:index], argv[index + 1 :] if argv[index : index + 1] == ["--"] else argv[index:]


def act(arguments: argparse.Namespace, words: list[str]) -> int:
    """Do what the command line asks; return the container's exit code."""
    make, why = maker()
    if why:
        print(f"sandbox: {why}", file=sys.stderr)
        return 1
    try:
        return act_on_named(make, arguments, words) if arguments.command != "run" else act_run(make, arguments, words)
    except (image().CannotFetch, image().CannotShow) as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1


def act_run(make: type[Sandbox], arguments: argparse.Namespace, words: list[str]) -> int:
    """Make a container and run it."""
    folder = (
        CACHE / "containers" / arguments.name if arguments.name else Path(tempfile.mkdtemp(prefix="hermes-sandbox-"))
    )
    mounts = dict(reversed(pair.split(":", 1)) for pair in arguments.volume)
    volume = Path(mounts.pop("/opt/data", CACHE / "volume")).resolve()
    box = make(
        folder,
        volume=volume,
        environment=dict(pair.split("=", 1) for pair in arguments.env),
        mounts=tuple((str(Path(host).resolve()), guest) for guest, host in mounts.items()),
        user=arguments.user,
        groups=tuple(arguments.group_add),
        workdir=arguments.workdir,
        agent=True,
    )
    options = {"volume": str(volume), "environment": box.environment, "words": words}
    (folder / "options.json").write_text(json.dumps(options))
    try:
        return in_foreground(box.command(words))
    finally:
        if not arguments.name:
            box.remove()


def act_on_named(make: type[Sandbox], arguments: argparse.Namespace, words: list[str]) -> int:
    """Do what the command line asks of a container that has a name."""
    named = CACHE / "containers" / arguments.name
    try:
        options = json.loads((named / "options.json").read_text())
    except OSError:
        print(f"sandbox: no container named {arguments.name}; `run --name {arguments.name}` makes it", file=sys.stderr)
        return 1
    box = make(named, volume=Path(options["volume"]), environment=options["environment"], agent=True)
    if arguments.command == "exec" and not box.init():
        print(f"sandbox: {arguments.name} is not running; `restart {arguments.name}` starts it", file=sys.stderr)
        return 1
    if arguments.command == "exec":
        return in_foreground(box.exec_command(words, arguments.user))
    box.stop()
    return 0 if arguments.command == "stop" else in_foreground(box.command(options["words"]))


def in_foreground(argv: list[str]) -> int:
    """Run a container or a program of one, on a terminal of its own when we are on one; return its exit code."""
    if os.isatty(0) and os.isatty(1):
        import pty

        code = os.waitstatus_to_exitcode(pty.spawn(argv))
        return code if code >= 0 else 128 - code
    try:
        return subprocess.run(argv).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
