"""From the caller's process to a sandbox's PID 1: namespaces, mounts, IDs, the entrypoint.

One process of few imports, since each start of a container waits for it. The caller's part stays outside, as the
container's only process there: it waits, and ends as PID 1 ends.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import signal

NAMESPACES = 0x00020000 | 0x20000000 | 0x04000000 | 0x08000000  # CLONE_NEWNS, _NEWPID, _NEWUTS, _NEWIPC
PR_SET_NAME = 15
MS_NOSUID, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 8, 1 << 12, 1 << 14, 1 << 18, 2
PR_SET_PDEATHSIG, SYS_PIVOT_ROOT = 1, {"x86_64": 155, "aarch64": 41}
LIBC = ctypes.CDLL(None, use_errno=True)


def start_time(pid: int | str) -> str:
    """Return when a process started, in clock ticks since the machine did; see proc(5). Raises OSError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[19].decode()


def call(name: str, *arguments: object) -> None:
    """Make a call of the C library's; raise OSError when it fails. Texts are paths, or what mount(2) reads."""
    plain = (os.fsencode(word) if isinstance(word, str) else word for word in arguments)
    if getattr(LIBC, name)(*plain) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """Mount a file system, or, without a kind, a file or folder at another place."""
    words = options.split(",")
    flags |= (MS_NOEXEC if "noexec" in words else 0) | (MS_BIND if kind is None else 0)
    others = ",".join(word for word in words if word not in ("exec", "noexec"))
    call("mount", source, target, kind, ctypes.c_ulong(flags), others)


# Outside


def leave(folder: str) -> None:
    """Leave word of this process, give the terminal up if it is ours alone, and start PID 1 in new namespaces."""
    with open(f"{folder}/pid", "w") as file:
        file.write(f"{os.getpid()} {start_time(os.getpid())}")
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if os.isatty(0) and os.getsid(0) == os.getpid():
        import fcntl
        import termios

        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        fcntl.ioctl(0, termios.TIOCNOTTY)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    call("unshare", NAMESPACES)
    child = os.fork()
    if child == 0:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        become_container(folder)
    end_as(child)


def leave_for_good(folder: str) -> None:
    """Leave, in the fork of another program: that does not go on here, whatever happens."""
    try:
        leave(folder)
    except BaseException as error:
        os.write(2, f"sandbox: {error!r}\n".encode(errors="surrogateescape"))
    os._exit(1)


def end_as(child: int) -> None:
    """Wait for PID 1, and end with its exit code or by its signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


# Inside


def become_container(folder: str) -> None:
    """In the new namespaces: mount, take the user's IDs, and become the entrypoint."""
    with open(f"{folder}/spec", "rb") as file:
        spec = marshal.load(file)
    agent = [(spec["agent"], "/opt/hermes/.venv")] if spec["agent"] else []
    mounts = [*spec["fixed"], (spec["volume"], "/opt/data"), *agent, *spec["mounts"]]
    mount_root(f"{folder}/layers", mounts, spec["run_options"])
    environment = {os.fsencode(name): os.fsencode(value) for name, value in spec["environment"]}
    if os.isatty(0):
        take_terminal()
        environment.setdefault(b"TERM", b"xterm")
    if spec["user"] is not None:
        os.chown("/run", spec["user"], spec["gid"])
    take_place(spec)
    words = [os.fsencode(word) for word in spec["words"]]
    if spec["has_init"]:
        be_another_init(words, environment)
    os.execve(words[0], words, environment)


def take_place(spec: dict) -> None:
    """Take the folder, the IDs and the signals that a container's first process has."""
    os.makedirs(spec["workdir"], exist_ok=True)
    os.chdir(spec["workdir"])
    os.setgroups(spec["groups"])
    if spec["user"] is not None:
        os.setresgid(*[spec["gid"]] * 3)
        os.setresuid(*[spec["user"]] * 3)
    for number in range(1, 32):  # as an engine does: what the caller ignores stays outside
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)


def mount_root(layers: str, mounts: list[tuple[str, str]], run_options: str) -> None:
    """Put the container's root together, and make it this process's."""
    root = f"{layers}/root"
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    mount("overlay", root, "overlay", 0, f"lowerdir=/,upperdir={layers}/upper,workdir={layers}/work")
    mount("/dev", f"{root}/dev", flags=MS_REC)
    for kind, target, flags, options in (
        ("proc", "proc", MS_NOSUID, ""),
        ("tmpfs", "run", 0, run_options),
        ("tmpfs", "tmp", 0, "mode=1777"),
    ):
        os.makedirs(f"{root}/{target}", exist_ok=True)
        mount(kind, f"{root}/{target}", kind, flags, options)
    for host, guest in mounts:
        target = root + guest
        if os.path.isdir(host):
            os.makedirs(target, exist_ok=True)
        elif not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        mount(host, target)
    os.chdir(root)  # it takes the old one's place: in a mere chroot nobody may make user namespaces
    call("syscall", SYS_PIVOT_ROOT[os.uname().machine], ".", ".")
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    os.umask(0o022)


def take_terminal() -> None:
    """Be the leader of a session whose terminal is the one that we have, unless it is another session's."""
    import fcntl
    import termios

    if os.getsid(0) != os.getpid():
        os.setsid()
    try:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    except OSError:
        pass


def be_another_init(words: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Be the PID 1 of a platform: run the entrypoint below, pass SIGTERM and SIGINT on, reap, end with its code."""
    call("prctl", PR_SET_NAME, b"docker-init", 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.execve(words[0], words, environment)
    os._exit(attend(child))


def attend(child: int) -> int:
    """Pass SIGTERM and SIGINT on to a child, reap until it has ended, and return its code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
