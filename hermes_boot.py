#!/usr/bin/python3 -IBS
"""Prepare the container's volume and accounts, and give every profile's gateway a slot that s6 supervises.

Run by s6-overlay from /etc/cont-init.d, as root (or as the UID of `--user`), without arguments and with a scrubbed
environment: as 01-hermes-setup it remaps the hermes user, fixes ownership and seeds the volume; as
02-reconcile-profiles it publishes one service directory per profile. People run `hermes-boot status|doctor|logs|gateway
...`; main_wrapper.py execs it with arguments.

Everything below $HERMES_HOME may have been written by the agent. So root only ever changes owners there, on descriptors
opened without following links; all else, reading included, is done by a process that has become hermes for good. One
bad profile never costs another its gateway: what is wrong is said in one line, and the boot goes on. It stops (exit
code 1) only for what it cannot work around, such as a wrong UID or GID, a UID that is not ours, a secret's file that is
missing, or a volume that hermes cannot write.

Contents, in the order of a container's life:

BOOT     What both scripts need   Reporting   Settings   Safe files   Processes   Accounts   Ownership   Seeding
         Profiles and their state   Slots   Setup and reconcile
RUNNING  What s6 knows   The service manager   Shutdown   Fallback init   Dashboard and gateway run   Status   Health
         Logs   Doctor   Command line
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` itself would cost 5 ms for its enums
import errno
import os
import stat
import sys
import time

TYPE_CHECKING = False  # true to a type checker; to import typing for that would cost every start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any, BinaryIO, Self

VERSION = "1.1.0"

Owner = tuple[int, int]  # UID, GID
MountId = tuple[int, bytes]  # device and mount that a folder is on
Files = dict[str, tuple[str, int]]  # of a slot: path, text, mode
Asked = dict[str, tuple[bool, bool]]  # by profile: whether its gateway starts, and whether it has a log folder

# ====================================================================================================================
# BOOT
# ====================================================================================================================


# What both scripts need: the functions that stand in main_wrapper.py too, as the same text
# --------------------------------------------------------------------------------------------------------------------

USER = "hermes"
HOME = "/opt/data"  # of the user, and HERMES_HOME unless that is set
VENV = "/opt/hermes/.venv"
HERMES = f"{VENV}/bin/hermes"
COMMAND_FOLDERS = ("/opt/hermes/bin", f"{VENV}/bin")
COMMAND_PROCESS = "/run/hermes-command"  # pid and start time of the container command, once that has started
SUPERVISOR_PROCESS = "/run/hermes-supervisor"  # and of the fallback init, hermes_boot.py where s6-overlay cannot start
LEFT_IN_RUN = ("hermes-command", "hermes-supervisor", "hermes-setup.failed", "hermes-reconciled")  # by a start of ours
CONTAINER_ENVIRONMENT = "/run/s6/container_environment"
RUNTIME_FOLDER = "/tmp/hermes-runtime"  # XDG_RUNTIME_DIR unless that is set
NOT_EXECUTABLE, NOT_FOUND = 126, 127
SIGPIPE, SIGXFSZ = 13, 25


def content(path: str, limit: int = 1 << 40) -> bytes:
    """Return a file's content, limit bytes and one block at most, in a third of open()'s time: an environment is a file
    a variable; never waits. Raises OSError."""
    fd, parts = os.open(path, os.O_RDONLY | os.O_NONBLOCK), []
    try:
        while limit > 0 and (part := os.read(fd, 1 << 15)):
            limit -= len(part)
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def process_environment() -> dict[str, str]:
    """Return the environment as it was handed over: Python itself may have added LC_CTYPE to os.environ (PEP 538)."""
    try:
        pairs = content("/proc/self/environ").split(b"\0")
    except PermissionError:  # a process that has dropped root may not
        return dict(os.environ)
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def container_environment() -> dict[str, str]:
    """Return the environment that the container was given, for programs that s6-overlay starts with a scrubbed one.

    A file a variable: its value and one newline, which with-contenv takes off again. With S6_KEEP_ENV=1 there is no
    such folder, and the process's own environment is right as it is.
    """
    environment = process_environment()
    try:
        names = os.listdir(CONTAINER_ENVIRONMENT)
    except OSError:
        return environment
    for name in names:
        try:
            environment[name] = os.fsdecode(content(f"{CONTAINER_ENVIRONMENT}/{name}").removesuffix(b"\n"))
        except OSError:
            continue  # removed meanwhile, or not a file: not a variable
    return environment


def switch(value: str) -> bool | None:
    """Return whether a switch is on (1, true, yes, on), None when it is neither that nor off (0, false, no, off)."""
    word = value.strip().lower()
    return True if word in ("1", "true", "yes", "on") else False if word in ("0", "false", "no", "off") else None


def root_home(environment: dict[str, str]) -> str:
    """Return the root profile's HERMES_HOME: <root> where `hermes` has set it to <root>/profiles/<name>."""
    home = environment.get("HERMES_HOME") or HOME
    parent = os.path.dirname(home.rstrip("/"))
    return os.path.dirname(parent) if os.path.basename(parent) == "profiles" else home


def program_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment for a program of the image: HOME, HERMES_HOME, VIRTUAL_ENV, and PATH with our folders
    on it; last on it are the commands that `hermes profile create` and pip make on the volume, which root must not
    find. Unless given: where pip puts packages, a runtime folder, and hermes's name for a UID that has none."""
    path, home = environment.get("PATH") or os.defpath, root_home(environment)
    missing = [folder for folder in COMMAND_FOLDERS if folder not in path.split(":")]
    made = [f"{home}/.local/bin"] if f"{home}/.local/bin" not in path.split(":") else []
    defaults = {
        "USER": USER,
        "LOGNAME": USER,
        "HERMES_LAZY_INSTALL_TARGET": f"{home}/lazy-packages",
        "PYTHONUSERBASE": f"{home}/.local",
        "XDG_RUNTIME_DIR": RUNTIME_FOLDER,
    }
    own = {
        "HOME": home,
        "HERMES_HOME": environment.get("HERMES_HOME") or HOME,
        "PATH": ":".join([*missing, path, *made]),
        "VIRTUAL_ENV": VENV,
    }
    return defaults | environment | own


def umask_of(environment: dict[str, str]) -> int | None:
    """Return the umask that UMASK gives for hermes's processes, in octal, None when it gives none, or one that would
    keep hermes from its own files."""
    value = environment.get("UMASK", "")
    octal = value and len(value) <= 4 and not value.strip("01234567")
    return int(value, 8) if octal and int(value, 8) <= 0o77 else None


def s6_program(name: str) -> str:
    """Return the path of an s6 program: /command is s6-overlay's, and on PATH only below its supervision tree."""
    for folder in ("/command", *os.environ.get("PATH", "").split(":"), "/usr/bin"):
        if folder and os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return f"/command/{name}"


def as_hermes(argv: list[str]) -> list[str]:
    """Return the argv that runs a program as hermes: by s6-setuidgid when we are root, else as it is."""
    return [s6_program("s6-setuidgid"), USER, *argv] if os.geteuid() == 0 else argv


def execute(argv: list[str], environment: dict[str, str]) -> int:
    """Exec a program; return only when that fails: 127 not found, 126 not executable."""
    for number in (SIGPIPE, SIGXFSZ):  # Python ignores these from its start, and an exec'd program would inherit that
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(argv[0], argv, environment)
    except OSError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: cannot run {argv[0]!r}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def execute_as_hermes(argv: list[str], environment: dict[str, str]) -> int:
    """Exec a program as hermes, with hermes's umask; return only when that fails, as execute() does."""
    if (umask := umask_of(environment)) is not None:
        os.umask(umask)
    return execute(as_hermes(argv), environment)


def pid_1() -> str:
    """Return PID 1's name, "" where that is hidden; needs no privilege, unlike /proc/1/exe."""
    try:
        return os.fsdecode(content("/proc/1/comm")).strip()
    except OSError:
        return ""


def s6_is_pid_1() -> bool:
    """Return whether s6-overlay supervises this container. PID 1 may be another container's, where ours has the
    fallback init."""
    ours = os.path.isdir("/run/s6/basedir") and not os.path.lexists(SUPERVISOR_PROCESS)
    return ours and pid_1() == "s6-svscan"


def supervised() -> bool:
    """Return whether s6 keeps this container's gateways, as PID 1 or below another one."""
    return s6_is_pid_1() or read_pid_file(SUPERVISOR_PROCESS) != 0


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the machine did; OSError when there is none. See proc(5)."""
    return content(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19].decode()


def write_pid_file(path: str) -> None:
    """Leave word of who we are, whole; exec keeps the pid. The end goes by it; the rest works without, so no failure
    matters. /run may be everybody's to write, so no file that is there already is written to."""
    try:
        new = f"{path}.{os.getpid()}"
        if os.path.lexists(new):
            os.unlink(new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, f"{os.getpid()} {start_time(os.getpid())}".encode())
        os.close(fd)
        os.rename(new, path)
    except OSError:
        pass


def read_pid_file(path: str) -> int:
    """Return the pid that was left there, by root or by who we are, 0 when that process has ended; the start time
    tells it from a later one of its number."""
    try:
        if os.lstat(path).st_uid not in (0, os.geteuid()):
            return 0
        pid, started = content(path).decode().split()
        return int(pid) if start_time(int(pid)) == started else 0
    except (OSError, ValueError):
        return 0


def account() -> tuple[int, int] | None:
    """Return hermes's UID and GID from /etc/passwd, None when it has no such user."""
    for line in content("/etc/passwd").split(b"\n"):
        fields = line.split(b":")
        if fields[0] == USER.encode() and len(fields) == 7:
            return int(fields[2]), int(fields[3])
    return None


def profile_option(words: list[str]) -> tuple[str | None, list[str]]:
    """Split -p NAME, --profile NAME or --profile=NAME off hermes's arguments, wherever it stands, as the agent does."""
    for at, word in enumerate(words):
        if word == "--":
            break
        if word in ("-p", "--profile") and words[at + 1 :]:
            return words[at + 1], words[:at] + words[at + 2 :]
        if word.startswith("--profile="):
            return word.removeprefix("--profile="), words[:at] + words[at + 1 :]
    return None, words


# Reporting
# --------------------------------------------------------------------------------------------------------------------


TERMINAL_PATIENCE = 1.0  # seconds


class Fatal(Exception):
    """What the boot cannot go on from; its text is the line for the operator."""


class Fault:
    """What is wrong, and what to do about it."""

    def __init__(self, text: str, fix: str = "") -> None:
        self.text, self.fix = text, fix

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


def say(level: str, text: object) -> None:
    """Write `program: level: text` on stderr, where every line of ours goes: stdout is the program's."""
    write_error(f"{os.path.basename(sys.argv[0])}: {level}: {text}\n")


def write_error(text: str) -> None:
    """Write to stderr; a line that nobody takes is lost. On a terminal, whose output hermes can stop, all lines of a
    process together may take TERMINAL_PATIENCE seconds."""
    global TERMINAL_PATIENCE
    data, started, terminal = text.encode(errors="backslashreplace"), time.monotonic(), os.isatty(2)
    try:
        with TimeLimit(max(TERMINAL_PATIENCE, 0.01) if terminal else MAX_SECONDS):
            while data:
                data = data[os.write(2, data) :]
    except OSError:
        TERMINAL_PATIENCE -= time.monotonic() - started


def warn(text: object) -> None:
    """Say what is wrong and what to do about it, and go on."""
    say("warning", text)


class Progress:
    """Says on stderr what a long operation waits for: a line that counts on a terminal, else one every 10 seconds."""

    def __init__(self, *, first: float = 10, quiet: bool = False) -> None:
        """first is when the first line is due elsewhere than on a terminal, in seconds."""
        self.terminal, self.written = os.isatty(2), False
        self.due = float("inf") if quiet else time.monotonic() + (2 if self.terminal else first)

    def tell(self, text: Callable[[], str]) -> None:
        """Say what the function text returns, if it is time to."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + (0.2 if self.terminal else 10)
        if self.terminal:
            line = cut(f"{os.path.basename(sys.argv[0])}: info: {text()}", os.get_terminal_size(2).columns)
            write_error(f"\r{line}\033[K")
            self.written = True
        else:
            say("info", text())

    def end(self) -> None:
        """Clear the terminal's line."""
        if self.written:
            write_error("\r\033[K")


def cut(text: str, width: int) -> str:
    """Return text that fits a line of width columns; 0 is any width."""
    return text if not width or len(text) <= width else text[: width - 1] + "…"


def shown(name: str) -> str:
    """Return a name from the volume fit for one line: as it is when harmless, else quoted, escaped and shortened."""
    harmless = name.isascii() and name.isprintable() and name and not set(name) & set(" \"'\\=")
    text = name if harmless else ascii(name)
    return text if len(text) <= 100 else f"{text[:80]}...({len(name)} characters)"


def printable(text: str) -> str:
    """Return a sentence from the volume fit for one line of a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()[:200]


def reason(error: OSError) -> str:
    """Return an operating system error in words, without the number."""
    return error.strerror or str(error)


def described(error: OSError) -> str:
    """Return what an error says of an entry on the volume, to follow its name."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a link, or not of the kind it should be"
    return reason(error) if reason(error).startswith(("is ", "was ")) else f"cannot be used ({reason(error)})"


def is_full(error: OSError) -> bool:
    """Return whether an error is for want of space."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def guarded(action: Callable[..., int], *arguments: object) -> int:
    """Run an action; turn what it raises into one line and code 1, with a traceback only for the unexpected."""
    try:
        code = action(*arguments)
        sys.stdout.flush()  # the entry stub ends the process without it
        return code
    except Fatal as error:
        say("fatal", str(error))
    except GatewayError as error:
        return report_failures({"": error})
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read has seen enough
        return 128 + SIGPIPE
    except Exception:
        sys.excepthook(*sys.exc_info())
    return 1


# Settings
# --------------------------------------------------------------------------------------------------------------------

IMAGE = "/opt/hermes"
WRAPPER = f"{IMAGE}/docker/main-wrapper.sh"
SCANDIR = "/run/service"
MAX_SECONDS = 86400
TIME_ZONES = "/usr/share/zoneinfo"
SYSTEM_FOLDERS = (IMAGE, *"/command /dev /etc /package /proc /root /run /sys /tmp /usr /var".split())
SWITCHES = (
    "HERMES_BOOT_QUIET GATEWAY_MULTIPLEX_PROFILES HERMES_DASHBOARD HERMES_DOCKER_EXEC_AS_ROOT"
    " HERMES_GATEWAY_NO_SUPERVISE HERMES_RECONCILE HERMES_SEALED HERMES_SKIP_CONFIG_MIGRATION"
).split()
STOP_TIMEOUT, SHUTDOWN_TIMEOUT = "HERMES_GATEWAY_STOP_TIMEOUT", "HERMES_SHUTDOWN_TIMEOUT"
TIMES = {STOP_TIMEOUT: (30, 1), SHUTDOWN_TIMEOUT: (8, 0)}  # seconds: the default, and the least that can be given


class Boot:
    """What every step needs to know: environment, root HERMES_HOME, who hermes is, whether to change anything."""

    def __init__(self, environment: dict[str, str], *, dry_run: bool = False) -> None:
        """Raise Fatal when HERMES_HOME is nothing to boot on."""
        self.environment = environment
        self.home = root_home(environment)
        self.scandir = scandir_of(environment)
        self.owner: Owner = account() or owner_of(self.home)
        uid = os.geteuid()
        if uid not in (0, self.owner[0]) and os.getegid() == 0 and owner_of(first_process())[0] == uid:
            self.owner = uid, 0  # OpenShift's way: any UID, with root's group
        self.dry_run, self.by_root = dry_run, os.geteuid() == 0
        self.quiet = switch(self.setting("HERMES_BOOT_QUIET")) is True  # only warnings are wanted
        self.sealed = self.by_root and switch(self.setting("HERMES_SEALED")) is True  # root keeps the scandir and slots
        self.multiplexes: bool | None = None  # see is_multiplexed; None: not looked up yet
        top = os.path.realpath(self.home).rstrip("/") + "/"
        if not self.home.startswith("/") or any(f"{folder}/".startswith(top) for folder in SYSTEM_FOLDERS):
            raise Fatal(f"HERMES_HOME={self.home!r} is no folder of its own; set it to an absolute path such as {HOME}")

    def setting(self, name: str) -> str:
        """Return a variable that is addressed to us, "" when unset."""
        return self.environment.get(name, "")

    def announce(self, text: str) -> bool:
        """Report a change, and return whether to make it: under --dry-run it is only listed, on stdout."""
        if self.dry_run:
            print(f"would {text}")
        elif not self.quiet:
            say("info", text)
        return not self.dry_run


def take_umask(environment: dict[str, str]) -> int:
    """Take hermes's umask, for what hermes makes on the volume; return it."""
    umask = 0o022 if (given := umask_of(environment)) is None else given
    os.umask(umask)
    return umask


def scandir_of(environment: dict[str, str]) -> str:
    """Return the path of the scandir."""
    return environment.get("S6_PROFILE_GATEWAY_SCANDIR", "").rstrip("/") or SCANDIR


def first_process() -> str:
    """Return the folder in /proc of this container's first process; PID 1 may be another container's."""
    return f"/proc/{read_pid_file(SUPERVISOR_PROCESS) or 1}"


def owner_of(path: str) -> Owner:
    """Return a path's owner, or our own where it is missing: who to act as in an image without a hermes user."""
    try:
        status = os.stat(path)
    except OSError:
        return os.geteuid(), os.getegid()
    return status.st_uid, status.st_gid


def number_in(value: str, least: int, most: int) -> int | None:
    """Return a decimal number within bounds, None for anything else."""
    plain = value.isascii() and value.isdigit() and len(value) <= len(str(most))
    return int(value) if plain and least <= int(value) <= most else None


def check_settings(boot: Boot) -> None:
    """Warn of switches that are neither on nor off, and of a time, an UMASK or a time zone that is none."""
    if boot.setting("UMASK") and umask_of(boot.environment) is None:
        warn(f"UMASK={boot.setting('UMASK')!r} is not an octal number from 0 to 77; using 022")
    for name in SWITCHES:
        if (value := boot.setting(name)).strip() and switch(value) is None:
            warn(f"{name}={value!r} is neither on (1, true, yes, on) nor off (0, false, no, off), so it is ignored")
    for name, (default, least) in TIMES.items():
        if (value := boot.setting(name)) and number_in(value, least, MAX_SECONDS) is None:
            warn(f"{name}={value!r} is not a number of seconds from {least} to {MAX_SECONDS}; using {default}")
    zone = boot.setting("TZ").removeprefix(":")  # a file's path, or as in UTC-2 an offset from UTC
    if zone and not any(map(str.isdigit, zone)) and not os.path.isfile(os.path.join(TIME_ZONES, zone)):
        warn(f"TZ={zone!r} is not a time zone of this image, so it is UTC; give one such as Europe/Berlin")


def seconds(environment: dict[str, str], name: str) -> int:
    """Return the seconds that a variable gives, its default when it gives none."""
    default, least = TIMES[name]
    number = number_in(environment.get(name, ""), least, MAX_SECONDS)
    return default if number is None else number


# Safe files
# --------------------------------------------------------------------------------------------------------------------

UPDATE_TIMEOUT = 2  # seconds that an operator's command waits for another writer


class Opened:
    """An open descriptor, closed at the block's end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


class Folder(Opened):
    """An open directory. Its entries are reached by descriptor, never through a link, never blocking; or OSError."""

    def __init__(self, path: str, at: int | None = None, *, follow: bool = False) -> None:
        self.roots_way = False  # whether nobody but root can put another folder in its place, see trusted_folder
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        super().__init__(os.open(path, flags, dir_fd=at))

    def folder(self, path: str, *, make: bool = False) -> Folder:
        """Open a folder below this one, link-free at every step, making what is missing of it if asked to."""
        parent = self
        for name in path.split("/"):
            try:
                child = Folder(name, parent.fd)  # first: NFS may refuse to make what is there already
            except FileNotFoundError:
                if not make:
                    raise
                child = parent.made(name)
            finally:
                if parent is not self:
                    os.close(parent.fd)
            parent = child
        return child

    def made(self, name: str) -> Folder:
        """Make a folder in this one, unless it is there by now, and open it."""
        try:
            os.mkdir(name, dir_fd=self.fd)
        except FileExistsError:
            pass
        return Folder(name, self.fd)

    def stat(self, name: str, *, follow: bool = False) -> os.stat_result | None:
        """Return what is under a name, None when nothing is."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=follow)
        except FileNotFoundError:
            return None

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open an entry that is not a link, without waiting for anything; return its descriptor."""
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, mode, dir_fd=self.fd)

    def read(self, name: str, limit: int) -> bytes:
        """Return a regular file's content; OSError when it is anything else or longer than limit bytes."""
        data = read_plain(name, limit + 1, self.fd)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"is longer than {limit} bytes")
        return data

    def write(self, name: str, data: bytes, mode: int, *, replace: bool) -> None:
        """Put a file in place whole, or not at all: beside, fsync, rename. Without replace an existing entry stays.

        mode holds from the first instant (it is open's, not a later chmod's), so a secret is never readable by others.
        """
        with Lock(self, name):
            if replace:
                return self.replace(name, data, mode)
            temporary = self.write_beside(name, data, mode)
            try:  # link() decides in the kernel whether something has the name
                os.link(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            except OSError:  # something has it, or there are no hard links, as on CIFS, exFAT and FUSE
                if self.stat(name) is None:
                    os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            self.unlinked(temporary)
            self.sync()

    def sync(self) -> None:
        """Bring the folder's names to disk, where its file system can: virtiofs, vboxsf and old CIFS cannot."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise

    def replace(self, name: str, data: bytes, mode: int, *, sync: bool = True) -> None:
        """Put a file in place whole, whatever has its name, for a caller that holds the lock or needs none. Without
        sync, for what only this boot needs, whole is meant for processes, not for a power cut."""
        os.rename(self.write_beside(name, data, mode, sync=sync), name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        if sync:
            self.sync()

    def update(self, name: str, edit: Callable[[bytes | None], bytes], limit: int) -> None:
        """Replace a file by what edit makes of its content (None when missing), whole. Our own writers are kept out
        by the lock; a program that does not take it is noticed by looking again before the rename, and its change is
        then edited in turn."""
        with Lock(self, name, timeout=UPDATE_TIMEOUT):
            for _ in range(50):
                before = self.stat(name)
                data = self.read(name, limit) if before else None
                new = edit(data)
                if new == data:
                    return
                temporary = self.write_beside(name, new, stat.S_IMODE(before.st_mode) if before else 0o644)
                try:
                    if changes(before) == changes(self.stat(name)):
                        os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                        return self.sync()
                    os.unlink(temporary, dir_fd=self.fd)
                except FileNotFoundError:
                    continue  # we had to do without the lock, and who has it took our file for a dead writer's
            raise OSError(errno.EBUSY, "is being written all the time")

    def write_beside(self, name: str, data: bytes, mode: int, *, sync: bool = True) -> str:
        """Write a file under a temporary name, safely on disk; return that name. Leaves nothing when it fails."""
        temporary = f".{name}.{os.getpid()}-{time.time_ns()}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=self.fd)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                if mode & ~os.fstat(fd).st_mode:  # else it may be another's by the mount's word, as on CIFS
                    os.fchmod(fd, mode)  # what the umask has taken from it
                if sync:
                    os.fsync(fd)
        except OSError:
            self.unlinked(temporary)
            raise
        return temporary

    def is_roots(self) -> bool:
        """Return whether nobody but root can replace what root has put into this folder."""
        status = os.fstat(self.fd)
        return status.st_uid == 0 and (not status.st_mode & 0o022 or status.st_mode & stat.S_ISVTX != 0)

    def link_of_root(self, name: str) -> str:
        """Return where a link that is root's leads, "" for anything else."""
        entry = self.stat(name)
        its_own = entry and entry.st_uid == 0 and entry.st_nlink == 1 and stat.S_ISLNK(entry.st_mode)
        return os.readlink(name, dir_fd=self.fd) if its_own else ""

    def remove_temporaries(self, *names: str) -> None:
        """Remove what killed writers of these names left; only with the lock held is every one of them stale."""
        starts = tuple(f".{name}." for name in names)
        with os.scandir(self.fd) as listing:
            for entry in listing:
                if entry.name.startswith(starts) and entry.name.endswith(".tmp"):
                    try:
                        os.unlink(entry.name, dir_fd=self.fd)
                    except OSError:
                        continue  # a folder of that name is not ours, and in nobody's way

    def remove(self, name: str) -> None:
        """Remove an entry with all below it, however deep. What is mounted there is not ours to remove: EBUSY then."""
        if self.unlinked(name):
            return
        path = os.path.join(os.readlink(f"/proc/self/fd/{self.fd}"), name)
        if any(point.startswith(f"{path}/") for point, _ in mount_points()):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        words = ["rm", "-rf", "--one-file-system", f"/proc/self/fd/0/{name}"]
        streams = [(os.POSIX_SPAWN_DUP2, self.fd, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)]
        os.waitpid(os.posix_spawn("/bin/rm", words, {}, file_actions=streams), 0)
        if self.stat(name):
            raise PermissionError(errno.EPERM, "cannot be removed as a whole")

    def unlinked(self, name: str) -> bool:
        """Remove an entry that is not a folder; return whether none is left."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):
            return False
        return True


def trusted_folder(path: str, *, make: bool = False) -> Folder:
    """Open a folder by an absolute path, making what is missing of it if asked to, as nobody but root decides.

    Root goes through a link only where root made it and nobody else can put anything in its place, be it a folder
    further up. Below any other folder there may be links at every step, whoever has the volume there puts them: OSError
    (ELOOP, ENOTDIR) then. Without root there is nothing to lose, and links are followed.
    """
    if os.geteuid() != 0:
        if make:
            os.makedirs(path, 0o755, exist_ok=True)
        return Folder(path, follow=True)
    folder, names, safe, links = Folder("/"), path.split("/")[::-1], True, 0
    given = len(names)  # of the names left, these are the path's own, which may be made; the others are of links
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        safe = safe and folder.is_roots()
        try:
            missing = make and len(names) < given and folder.stat(name) is None
            child = folder.made(name) if missing else Folder(name, folder.fd)
        except OSError as error:
            links += 1
            is_link = safe and links < 40 and error.errno in (errno.ELOOP, errno.ENOTDIR)
            target = folder.link_of_root(name) if is_link else ""
            if not target:
                os.close(folder.fd)
                raise
            given = min(given, len(names))
            names += target.split("/")[::-1]
            child = Folder("/" if target.startswith("/") else ".", folder.fd)
        os.close(folder.fd)
        folder = child
    folder.roots_way = safe
    return folder


def mount_of(fd: int) -> bytes:
    """Return the mount that an open entry is reached by, which a device does not tell. "" before Linux 3.15."""
    lines = content(f"/proc/self/fdinfo/{fd}").split(b"\n")
    return next((line for line in lines if line.startswith(b"mnt_id:")), b"")


def changes(status: os.stat_result | None) -> tuple[int, int, int] | None:
    """Return what differs once somebody has written, replaced or removed a file."""
    return (status.st_ino, status.st_mtime_ns, status.st_size) if status else None


class Lock(Opened):
    """An exclusive flock on a folder, between containers too, waited for for timeout seconds: a hostile holder must not
    stop a boot. Once it is held, what killed writers of the given names left is removed."""

    def __init__(self, folder: Folder, *names: str, timeout: float = 1) -> None:
        self.folder, self.names, self.timeout, self.fd, self.held = folder, names, timeout, -1, False

    def __enter__(self) -> Lock:
        self.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.folder.fd)
        until(self.tried, self.timeout)
        if self.held and self.names:
            self.folder.remove_temporaries(*self.names)
        return self

    def tried(self) -> bool:
        """Try to get the lock; return whether there is nothing to wait for."""
        import fcntl

        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except BlockingIOError:
            return False
        except OSError:
            pass  # NFS locks no folders; two boots on one volume are then as safe as link() and rename()
        return True


def names_in(folder: str) -> list[str]:
    """Return the names of what is in a folder, in order, as s6-overlay lists it: without dot files."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def read_plain(path: str, limit: int = 4096, at: int | None = None) -> bytes:
    """Return a regular file's first limit bytes, not through a link, never blocking; OSError for anything else."""
    with Opened(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=at)) as file:
        status = os.fstat(file.fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        return os.read(file.fd, min(status.st_size, limit))


# Processes
# --------------------------------------------------------------------------------------------------------------------

SIGKILL, SIGTERM, SIGCONT = 9, 15, 18
MOST_THREADS = 32
MOST_WORDS = 2 << 20  # bytes of a command line, as execve(2) takes; a process can make its own of any length
HELPER_TIMEOUT = 120  # seconds for a program of the agent's that the boot runs
CHILD_TIMEOUT = 600  # seconds for what the boot does as hermes
MOST_STOPS = 20  # that a process which became hermes is woken from
OVERDUE = 124  # the exit code of a process that was ended for its time, as of timeout(1)


class TimeLimit:
    """Raises TimeoutError in its block after so many seconds, out of a system call too; within another one, when that
    one's time is over. It limits nothing in another thread than the main one, which alone gets signals."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        try:
            self.before = _signal.signal(_signal.SIGALRM, self.expire)
        except ValueError:
            self.before = None
            return
        self.started, self.outer = time.monotonic(), _signal.getitimer(_signal.ITIMER_REAL)[0]
        # Again and again: who takes it for another OSError goes on.
        _signal.setitimer(_signal.ITIMER_REAL, min(self.seconds, self.outer or self.seconds), 1)

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            return
        try:
            _signal.setitimer(_signal.ITIMER_REAL, 0)  # first: SIGALRM's default is to end the process
        finally:
            left = max(0.001, self.outer - (time.monotonic() - self.started)) if self.outer else 0
            _signal.signal(_signal.SIGALRM, self.before)
            _signal.setitimer(_signal.ITIMER_REAL, left, left and 1)

    def expire(self, *_: object) -> None:
        """Be the handler of SIGALRM."""
        raise TimeoutError


def end_on_sigterm() -> None:
    """Have SIGTERM end this process and its children at once, with code 143. What they write is put in place whole, and
    what they began is taken up at the next boot, so nothing is left half done."""

    def end(*_: object) -> None:
        for child in families().get(os.getpid(), []):
            send(child, SIGTERM)
            send(child, SIGCONT)  # hermes can stop its own
        os._exit(128 + SIGTERM)

    _signal.signal(SIGTERM, end)


def shell_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 + n where signal n ended the process, which Python calls -n."""
    return code if code >= 0 else 128 - code


def forked(action: Callable[[], int]) -> int:
    """Run an action in a child process, which ends with its code; return the child's pid."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = guarded(action)
        sys.stdout.flush()
        os._exit(code)
    return child


def wait_for(child: int, timeout: float) -> int:
    """Return a child's exit code, 128 + n where signal n ended it. What has become hermes can be stopped by hermes: it
    is told to go on, and after MOST_STOPS of these, or timeout seconds, killed: OVERDUE."""
    try:
        with TimeLimit(timeout):
            for _ in range(MOST_STOPS):
                status = os.waitpid(child, os.WUNTRACED)[1]
                if not os.WIFSTOPPED(status):
                    return shell_code(os.waitstatus_to_exitcode(status))
                send(child, SIGCONT)
    except TimeoutError:
        pass
    except BaseException:
        send(child, SIGKILL)
        raise
    send(child, SIGKILL)
    try:
        with TimeLimit(5):
            os.waitpid(child, 0)
    except TimeoutError:
        pass  # root lacks the capability KILL, or the volume does not answer
    return OVERDUE


def drop_root(owner: Owner) -> None:
    """Become hermes for good, as s6-setuidgid does: groups of /etc/group, then GID, then UID. Raises Fatal."""
    uid, gid = owner
    try:
        os.initgroups(USER, gid)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise Fatal(
            f"root cannot become {USER} ({uid}:{gid}) here: {reason(error)}; add the capabilities SETUID and SETGID,"
            " or give a rootless engine subordinate IDs (/etc/subuid, /etc/subgid)"
        ) from error


def become_hermes() -> None:
    """Drop root for good: what we write is hermes's, and nothing on the volume can use root. Raises Fatal."""
    owner = account()
    if os.geteuid() == 0 and owner:
        drop_root(owner)


def as_owner(owner: Owner, action: Callable[..., int], *arguments: object, timeout: float = CHILD_TIMEOUT) -> int:
    """Run an action as hermes and return its exit code: in a child that drops for good when we are root, for timeout
    seconds at most (see wait_for), else right here."""

    def dropped() -> int:
        drop_root(owner)
        return action(*arguments)

    if os.geteuid() != 0 or owner[0] == 0:
        return guarded(action, *arguments)
    code = wait_for(forked(dropped), timeout)
    if code == OVERDUE:
        say("error", f"what ran as {USER} was stopped by somebody, or took more than {timeout:g} s, so it was ended")
    elif code == 128 + SIGKILL:
        say("error", f"what ran as {USER} was killed; most likely it had too little memory, or {USER} killed it")
    elif code > 128 and code != 128 + SIGPIPE:
        say("error", f"a process of the boot was ended by signal {code - 128}")
    return code


def run_helper(argv: list[str], environment: dict[str, str]) -> int:
    """Run a program as hermes: stdin empty, stdout on stderr, killed after HELPER_TIMEOUT seconds. Returns its code,
    124 when killed.

    It reads what hermes has left on the volume, and may leave a terminal whose output is stopped, and processes, which
    could stop what the boot does as hermes later on: they come to the process that watches it here, and end with it.
    """

    def watch() -> int:
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(2, 1)
        take_umask(environment)
        children = Children()
        try:
            helper = children.start(as_hermes(argv), environment, setsid=True)  # else the terminal could stop it
        except OSError as error:
            say("error", f"cannot run {argv[0]!r}: {reason(error)}")
            return NOT_FOUND
        children.wait(helper, pass_to=lambda: helper, timeout=HELPER_TIMEOUT)
        code = children.codes[helper]
        if not children.end_all(0) and not kill_all_of_hermes():
            warn(f"{argv[-1]} has left processes that do not end; restart the container")
        set_terminal_going()
        return OVERDUE if code is None else shell_code(code)

    return wait_for(forked(watch), HELPER_TIMEOUT + 60)


def kill_all_of_hermes() -> bool:
    """End all that runs as hermes, at once, which no fork outruns; return whether that was done: only at a boot, and
    where the processes that we see are this container's alone."""
    ours = s6_is_pid_1() or read_pid_file(SUPERVISOR_PROCESS) == 1
    owner = account()
    if not ours or read_pid_file(COMMAND_PROCESS) or not owner or os.geteuid() != 0:
        return False

    def kill_all() -> int:
        os.kill(-1, SIGKILL)
        return 0

    return as_owner(owner, kill_all, timeout=5) == 0


def set_terminal_going() -> None:
    """Undo what somebody has done to the terminal with tcflow(3): stopped, it would stop all who write there."""
    if not os.isatty(2):
        return
    import termios

    before = _signal.signal(_signal.SIGTTOU, _signal.SIG_IGN)  # else a process in the background is stopped for it
    try:
        termios.tcflow(2, termios.TCOON)
    except termios.error:
        pass  # hung up
    _signal.signal(_signal.SIGTTOU, before)


def at_once(action: Callable[[str], object], items: list[str]) -> None:
    """Take an action on all items, many at a time, as a disk likes to sync. Raises what an action has raised."""
    if len(items) > 1:
        from concurrent.futures import ThreadPoolExecutor  # 15 ms

        try:
            with ThreadPoolExecutor(MOST_THREADS) as pool:
                list(pool.map(action, items))
                return
        except RuntimeError:
            pass  # the container may have no more processes: then one after the other
    for item in items:
        action(item)


def send(process: int, number: int) -> None:
    """Send a signal to a process, unless it has ended, or we may not, as root without the capability KILL."""
    try:
        os.kill(process, number)
    except OSError:
        pass


def until(condition: Callable[[], bool], timeout: float) -> bool:
    """Poll a condition that s6 has no event for; return whether it came to hold within timeout seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class Children:
    """Our child processes, the container's orphans among them, reaped as they end; the codes of those that we
    started; and whether somebody has asked for the end, by SIGTERM."""

    def __init__(self) -> None:
        """Make this process the one that orphans come to, and take signals one by one from here on."""
        import signal

        names = "SIGTERM SIGINT SIGHUP SIGQUIT SIGUSR1 SIGUSR2 SIGWINCH SIGCHLD SIGTTOU SIGTTIN".split()
        self.signals = {getattr(signal, name) for name in names}
        self.codes: dict[int, int | None] = {}  # None: it runs
        self.asked_to_end = False
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)
        try:
            import ctypes

            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, see prctl(2)
        except (ImportError, OSError):
            warn("this Python has no ctypes, so orphans go to PID 1, which may not reap them")

    def start(self, argv: list[str], environment: dict[str, str], **options: Any) -> int:
        """Start a program in a process group of its own (or with setsid=True, a session), with signals as it expects
        them; options are posix_spawn's. Return its pid. Raises OSError."""
        options = ({} if "setsid" in options else {"setpgroup": 0}) | options
        pid = os.posix_spawnp(argv[0], argv, environment, setsigmask=(), setsigdef=(SIGPIPE, SIGXFSZ), **options)
        self.codes[pid] = None
        return pid

    def reap(self) -> None:
        """Reap all that have ended."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self.codes:
                    self.codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            pass  # none is left

    def wait(self, *pids: int, pass_to: Callable[[], int] | None = None, timeout: float = float("inf")) -> int:
        """Wait until one of these has ended, or timeout seconds; return the pid, or 0. With pass_to, which returns the
        process that signals are passed on to, or 0 for none, SIGTERM ends the wait too."""
        import signal

        deadline = time.monotonic() + timeout
        while True:
            self.reap()
            for pid in pids:
                if self.codes.get(pid) is not None:
                    return pid
            received = signal.sigtimedwait(self.signals, max(0, min(60, deadline - time.monotonic())))
            if received is None and time.monotonic() > deadline:
                return 0
            number = received.si_signo if received else signal.SIGCHLD
            self.asked_to_end = self.asked_to_end or number == signal.SIGTERM
            if pass_to and self.asked_to_end:
                return 0
            if pass_to and number not in (signal.SIGCHLD, signal.SIGTTOU, signal.SIGTTIN) and (process := pass_to()):
                send(process, number)

    def end_all(self, grace: float) -> bool:
        """End every process that is left below us, and nobody else's: SIGTERM to each, SIGKILL once grace seconds are
        over; 5 seconds later the rest is the kernel's. Return whether none is left."""
        told: set[int] = set()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline + 5:
            self.reap()
            if not (left := descendants(os.getpid())):
                return True
            late = time.monotonic() >= deadline
            for pid in left if late else set(left) - told:
                send(pid, SIGKILL if late else SIGTERM)
            told.update(left)
            self.codes |= dict.fromkeys(left)
            self.wait(*left, timeout=0 if late else 0.05)  # what forks all the time is to be killed faster than that
        return False


# Accounts
# --------------------------------------------------------------------------------------------------------------------

PASSWD, GROUP = "/etc/passwd", "/etc/group"
DOCKER_SOCKET, RENDER_NODES = "/var/run/docker.sock", "/dev/dri"
# Secrets, the ones that hermes-agent reads: by their names' ends, as itself tells them, and some others.
SECRET_SUFFIXES = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_PASSWORD_HASH")
SECRETS = frozenset(
    "HERMES_AUTH_JSON_BOOTSTRAP MODAL_TOKEN_ID AWS_ACCESS_KEY_ID AWS_BEARER_TOKEN_BEDROCK GATEWAY_RELAY_ROUTE_KEYS"
    " GOOGLE_CHAT_SERVICE_ACCOUNT_JSON".split()
)
PATHS = ("AZURE_FEDERATED_TOKEN_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE")  # which are read, again and again, by others
MAX_ID = 2**32 - 2  # 2**32 - 1 is chown's "leave it as it is"


def wanted_id(boot: Boot, *names: str) -> int:
    """Return the UID or GID of the first non-empty of these variables, 0 for none; Fatal when it is no such."""
    for name in names:
        if value := boot.setting(name):
            if number := number_in(value, 1, MAX_ID):
                if boot.setting(names[-1]) not in ("", value):
                    warn(f"{names[-1]} is ignored, since {name}={value!r} is set")
                return number
            root = "0 is root, as which the agent never runs; " if value == "0" else ""
            which = f"a number from 1 to {MAX_ID}; {root}unset it, or give the folder's owner (ls -ldn FOLDER)"
            raise Fatal(f"{name}={value!r} is not {which}")
    return 0


def rewrite(path: str, edit: Callable[[list[bytes]], list[bytes]], *, dry_run: bool = False) -> bool:
    """Replace a file of /etc by what edit makes of its lines, atomically, with its mode and owner; return whether
    that changes it. Raises OSError."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        old = file.read()
    new = b"".join(edit(old.splitlines(keepends=True)))
    if new == old or dry_run:
        return new != old
    beside = f"{path}+"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(new)
        file.flush()
        os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))
        os.fsync(fd)
    os.rename(beside, path)
    return True


def with_field(lines: list[bytes], name: bytes, values: dict[int, int | str]) -> list[bytes]:
    """Return the lines of an account file with some fields of one entry set; every other line stays byte for byte."""

    def edited(line: bytes) -> bytes:
        fields = line.split(b":")
        for index, value in values.items():
            fields[index] = os.fsencode(str(value))
        return b":".join(fields)

    return [edited(line) if line.startswith(name + b":") else line for line in lines]


def with_member(lines: list[bytes], member: bytes, groups: list[int]) -> list[bytes]:
    """Return /etc/group's lines with a member in all of these groups, by GID; a group without a line gets one."""
    missing, result = {str(group).encode() for group in groups}, []
    for line in lines:
        fields = line.rstrip(b"\n").split(b":")
        if len(fields) == 4 and fields[2] in missing:
            missing.discard(fields[2])
            members = [name for name in fields[3].split(b",") if name]
            if member not in members:
                line = b":".join([*fields[:3], b",".join([*members, member])]) + b"\n"
        result.append(line)
    if missing and result and not result[-1].endswith(b"\n"):
        result[-1] += b"\n"
    return result + [b"%s-%s:x:%s:%s\n" % (member, group, group, member) for group in sorted(missing)]


def rootless_advice(owner: Owner) -> str:
    """Return what else helps a rootless engine, "" where there is none: Podman can map our UID to hermes's."""
    mapped = content("/proc/self/uid_map").split() != [b"0", b"0", b"4294967295"]
    return f"; with rootless Podman: --userns=keep-id:uid={owner[0]},gid={owner[1]}" if mapped else ""


def remap(boot: Boot) -> None:
    """Give the hermes user the UID and GID that HERMES_UID/HERMES_GID (or PUID/PGID) ask for, editing /etc in place.

    Not by usermod: that walks the user's whole home folder, which here is the volume. Fatal when a value is wrong, or
    when another user has the UID; a GID may be shared (macOS users have 20, NAS users 100).
    """
    uid, gid = wanted_id(boot, "HERMES_UID", "PUID"), wanted_id(boot, "HERMES_GID", "PGID")
    wanted = (uid or boot.owner[0], gid or boot.owner[1])
    if wanted == boot.owner:
        return
    if os.geteuid() != 0:
        text = f"started as UID {os.geteuid()}, so hermes cannot become {wanted[0]}:{wanted[1]}"
        raise Fatal(f"{text}; drop `--user` or the HERMES_UID/HERMES_GID")
    for line in content(PASSWD).split(b"\n"):
        fields = line.split(b":")
        if len(fields) > 3 and fields[0] != USER.encode() and fields[2] == str(wanted[0]).encode():
            user = os.fsdecode(fields[0])
            raise Fatal(f"UID {wanted[0]} belongs to the user {user} in this image; give another HERMES_UID or PUID")
    if boot.announce(f"remap {USER} from {boot.owner[0]}:{boot.owner[1]} to {wanted[0]}:{wanted[1]}"):
        try:
            rewrite(GROUP, lambda lines: with_field(lines, USER.encode(), {2: wanted[1]}))
            rewrite(PASSWD, lambda lines: with_field(lines, USER.encode(), {2: wanted[0], 3: wanted[1]}))
        except OSError as error:
            text = f"cannot write /etc/passwd and /etc/group ({reason(error)}), which the remap needs"
            raise Fatal(f"{text}; make /etc writable, or drop HERMES_UID/HERMES_GID") from error
    boot.owner = wanted


def follow_home(boot: Boot) -> None:
    """Give the hermes user the volume as its home in /etc/passwd, where ssh and the like look for it."""
    if not boot.home.isprintable() or ":" in boot.home:
        return  # nothing that has a place there

    def edit(lines: list[bytes]) -> list[bytes]:
        return with_field(lines, USER.encode(), {5: boot.home})

    try:
        if rewrite(PASSWD, edit, dry_run=True) and boot.announce(f"set the home of {USER} to {boot.home}"):
            rewrite(PASSWD, edit)
    except OSError as error:
        warn(f"cannot write {PASSWD} ({reason(error)}), so ssh and others look for {USER}'s files in another home")


def given_groups() -> list[int]:
    """Return the GIDs of `--group-add`, of a mounted Docker socket and of render nodes, root's excepted."""
    groups: list[int] = []
    try:
        lines = content(f"{first_process()}/status").split(b"\n")
        groups += [int(number) for line in lines if line.startswith(b"Groups:") for number in line.split()[1:]]
    except OSError:
        pass  # hidden from hermes
    nodes = [f"{RENDER_NODES}/{name}" for name in names_in(RENDER_NODES) if name.startswith("renderD")]
    for path in (DOCKER_SOCKET, *nodes):
        try:
            status = os.stat(path)
            if stat.S_ISSOCK(status.st_mode) or stat.S_ISCHR(status.st_mode):
                groups.append(status.st_gid)
        except OSError:
            continue  # not mounted
    return [group for group in dict.fromkeys(groups) if group != 0]


def join_groups(boot: Boot, *, look: bool = False) -> list[int]:
    """Put hermes into the groups that the container was given: s6-setuidgid rebuilds the groups from /etc/group, and
    nothing else. Return these groups where that changed something; with look, where it would."""
    wanted = [group for group in given_groups() if group != boot.owner[1]]
    names = " ".join(map(str, wanted))
    try:
        changed = wanted and rewrite(
            GROUP, lambda lines: with_member(lines, USER.encode(), wanted), dry_run=look or boot.dry_run
        )
    except OSError as error:
        warn(f"cannot write {GROUP} ({reason(error)}), so {USER} is not in the groups {names}; make /etc writable")
        return []
    if changed and not look:
        boot.announce(f"add {USER} to the groups {names}")
    return wanted if changed else []


def secret_of(variable: str) -> str:
    """Return the name of the secret that a variable names the file of, "" when it is no such variable."""
    name = variable.removesuffix("_FILE")
    ours = name != variable and (name.endswith(SECRET_SUFFIXES) or name in SECRETS)
    return name if ours and variable not in PATHS else ""


def read_secrets(boot: Boot) -> None:
    """Export what NAME_FILE names as NAME, to the boot itself and to all that is started with the container's
    environment. Fatal when one cannot be had: without it the agent would fail later, and less clearly."""
    later = read_pid_file(COMMAND_PROCESS) != 0  # NAME is then what the boot has exported
    for variable in sorted(boot.environment):
        name, path = secret_of(variable), boot.environment[variable]
        if not name or not path:
            continue
        if boot.setting(name) and not later:
            raise Fatal(f"{name} and {variable} are both set; unset one")
        if path[0] != "/":  # perhaps the secret itself
            raise Fatal(f"{variable} is not an absolute path; set it to the path of the file that has the secret")
        if not boot.announce(f"read {name} from {shown(path)}"):
            continue
        try:
            value = secret_file(path, 131_000 - len(name)).rstrip(b"\r\n")  # Linux takes 128 KiB a variable
        except OSError as error:
            fix = "let hermes read it" if error.errno == errno.EACCES else "mount it as a file, say /run/secrets/NAME"
            raise Fatal(f"{variable}={path!r} {described(error)}; {fix}") from error
        if not value or b"\0" in value:
            why = "has a NUL byte, which no variable can hold" if value else "is empty"
            raise Fatal(f"{variable}={path!r} {why}; give it the secret alone")
        boot.environment[name] = os.fsdecode(value)
        try:
            with trusted_folder(CONTAINER_ENVIRONMENT) as folder:
                folder.write(name, value + b"\n", 0o600, replace=True)
        except OSError as error:
            why = f"{CONTAINER_ENVIRONMENT} {described(error)}"
            raise Fatal(f"{name} cannot be handed on: {why}; S6_KEEP_ENV must not be 1") from error


def secret_file(path: str, limit: int) -> bytes:
    """Return a file's content, of at most limit bytes. As root only where nobody but root decides what the path
    leads to. Raises OSError."""
    path = path if os.geteuid() == 0 else os.path.realpath(path)
    for _ in range(40):
        parent, _, name = path.rpartition("/")
        with trusted_folder(parent or "/") as folder:
            if os.geteuid() == 0 and not (folder.roots_way and folder.is_roots()):
                raise OSError(errno.EPERM, "is in a folder that others than root can write")
            if not (target := folder.link_of_root(name)):
                return folder.read(name, limit)
        path = os.path.join(parent, target)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


# Ownership
# --------------------------------------------------------------------------------------------------------------------

MANAGED_FOLDERS = (
    "backups cron sessions logs hooks memories skills skins plans workspace home profiles pairing platforms/pairing"
    " lazy-packages"
).split()
VERSION_STAMP = ".hermes-agent-version"
# What hermes-agent makes at the top of its home beside these, and its tools, whose HOME that is too.
MANAGED_TOPS = frozenset(path.partition("/")[0] for path in MANAGED_FOLDERS) | frozenset(
    """
    audio_cache bin browser_auth browser_recordings browser_screenshots byterover cache checkpoints chrome-debug
    dashboard-themes delegation_cache disk-cleanup document_cache gateway google_chat_user_oauth_pending
    google_chat_user_tokens hindsight hook_outputs image_cache images kanban lsp matrix mcp-installs mcp-tokens
    mem0_qdrant moa-traces node node_modules pastes pending pets piper_voices_cache plugins rate_limits runtime
    sandboxes screenshots scripts session-exports shared skill-bundles spawn-trees state state-snapshots
    status_phrases temp_video_files temp_vision_images tmp video_cache web_cache weixin whatsapp whatsapp_cloud
    .local .cache .config .npm .npm-global .codex .honcho .hindsight .cua-driver .ssh
    """.split()
)
MANAGED_FILES = frozenset(
    f"""
    .env SOUL.md active_profile auth.json auth.lock config.yaml gateway.lock gateway.pid gateway_state.json
    processes.json {VERSION_STAMP}
    .anthropic_oauth.json .clean_shutdown .codex_gpt55_autoraise_notice .container-mode .drain_request.json .env.EXAMPLE
    .gateway-planned-stop.json .gateway-takeover.json .hermes_history .install_method .managed .no-bundled-skills
    .op.env .restart_failure_counts .restart_last_processed.json .restart_notify.json .restart_pending.json
    .scratch_tip_shown .skills_prompt_snapshot.json .skip_upstream_prompt .sync.lock .tirith-install-failed
    .update_check .update_exit_code .update_output.txt .update_pending.claimed.json .update_pending.json
    .update_prompt.json .update_response
    channel_aliases.json channel_directory.json context_length_cache.yaml cron.pid desktop-build-stamp.json
    distribution.yaml errors.log feishu_comment_pairing.json feishu_comment_rules.json feishu_seen_message_ids.json
    gateway-starts.log gateway.json gateway_voice_mode.json google_chat_bot_id.json google_chat_thread_counts.json
    google_chat_user_client_secret.json google_chat_user_oauth_pending.json google_chat_user_token.json
    google_token.json honcho.json interrupt_debug.log mem0.json modal_snapshots.json models_dev_cache.json
    ollama_cloud_models_cache.json profile.yaml provider_models_cache.json shell-hooks-allowlist.json
    shell-hooks-allowlist.json.lock singularity_snapshots.json slack-manifest.json slack_tokens.json sticker_cache.json
    supermemory.json teams_pipeline_store.json webhook_subscriptions.json
    """.split()
)
MANAGED_PREFIXES = (  # databases, to which SQLite and the agent add -wal, -shm, .lock and the like, and dated copies
    *"state.db hermes_state.db response_store.db kanban.db projects.db memory_store.db retaindb_queue.db".split(),
    *"verification_evidence.db config.yaml. auth.json. .npm_lock_hash_".split(),
)
SHARED_FOLDERS, SHARED_DEPTH, MOST_SWEEPERS = 64, 6, 4  # folders to share among processes, looked for to this depth
MOST_LEVELS = 2000  # below a managed folder; no path reaches further
MOST_NAMES, MOST_SHARED = 100_000, 8192  # of folders, kept in memory at a time, and of one folder's to share


class Sweep:
    """Hands what hermes manages on the volume back to hermes, and counts it.

    Only wrong owners change. Every change is made on a descriptor opened without following a link, so that no rename
    can turn it on another entry; by name only in a folder that nobody but root can change at that moment (see entries).
    Three kinds of entry are left alone, since root would give away more than the volume: links' targets, device nodes,
    and files with more names than one, of which a name may lie outside (those that belong to hermes's former UIDs
    excepted, which hermes could write anyway). A mount below the volume is the operator's, wherever the engine was led
    to put it by links on the volume: of its entries, too, only those of the former UIDs change, unless it is empty.
    """

    COUNTED = "changed checked linked failed kept deep first failure first_kept".split()  # numbers, then texts

    def __init__(self, boot: Boot, *, former: int = 0, mounted: bool = False) -> None:
        """former is the UID that hermes had before, 0 for none; mounted says whether there are other file systems
        that it could move below a folder that is checked."""
        self.boot, (self.uid, self.gid), self.by_group = boot, boot.owner, not boot.by_root
        self.former = {self.uid, former or self.uid}
        self.home: MountId = (-1, b"")  # where the volume itself is
        self.held = 0  # names of folders in memory
        # Nothing of hermes's runs before the container's command; from then on it can move what is mounted elsewhere.
        self.mounted = mounted or os.path.exists(COMMAND_PROCESS)
        self.progress = Progress(quiet=boot.quiet)
        self.output = -1  # in a process that shares the work: where it tells what it has counted
        self.strangers = self.left_behind = 0
        self.first_stranger = self.first_left_behind = ""
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.changed = self.checked = self.linked = self.failed = self.kept = self.deep = 0
        self.first = self.failure = self.first_kept = ""

    def claim(self, name: str, at: int, *, writable: bool = False) -> None:
        """Give one entry to hermes; with writable, for a file at the top of the volume, which may be mounted there
        by itself, see to it that its owner can read and write it."""
        try:
            with Opened(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=at)) as entry:
                status, path = os.fstat(entry.fd), f"/proc/self/fd/{entry.fd}"
                theirs = self.mounted and self.is_theirs(entry.fd, at, status)
                if not self.may_change(status) or (theirs and self.keep(name, at, status)):
                    return
                if (status.st_uid, status.st_gid) != (self.uid, self.gid):
                    self.give(name, at, status, path)
                status = os.fstat(entry.fd)
                usable = status.st_mode & 0o600 == 0o600 or not stat.S_ISREG(status.st_mode)
                if writable and not usable and status.st_uid == self.uid and not self.boot.dry_run:
                    os.chmod(path, stat.S_IMODE(status.st_mode) | 0o600)
        except FileNotFoundError:
            return  # removed while we looked
        except OSError as error:
            self.fail(name, at, error)

    def give(self, name: str, at: int, status: os.stat_result, opened: str = "") -> None:
        """Give an entry of an open folder (or as "." that itself) to hermes: by the path of its descriptor, or by its
        name where nobody but root can move it. The first wrong owner is shown."""
        try:
            if not self.boot.dry_run:
                os.chown(opened or name, self.uid, self.gid, dir_fd=at, follow_symlinks=bool(opened))
        except OSError as error:
            return self.fail(name, at, error)
        if not (self.by_group and is_groups(status, self.gid)):
            self.changed += 1
            self.first = self.first or f"{path_in(at, name)} belongs to {status.st_uid}:{status.st_gid}"

    def notice(self, entry: os.DirEntry[str]) -> None:
        """Count an entry at the top of the volume that nobody manages, where it is not hermes's."""
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return  # removed while we looked
        if status.st_uid != self.uid and not (self.by_group and is_groups(status, self.gid)):
            self.strangers += 1
            self.first_stranger = self.first_stranger or entry.name
            if status.st_uid in self.former:
                self.left_behind += 1
                self.first_left_behind = self.first_left_behind or entry.name

    def may_change(self, status: os.stat_result) -> bool:
        """Return whether root may act on an entry, by its descriptor's status."""
        kind = stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFDIR and status.st_nlink > 1 and status.st_uid not in self.former:
            self.linked += 1
            return False
        return kind not in (stat.S_IFBLK, stat.S_IFCHR)

    def is_theirs(self, fd: int, at: int, status: os.stat_result) -> bool:
        """Return whether an open entry is of a mount below the volume; an empty file that is one itself is as good as
        new. Its device would say less: overlayfs shows those of its layers."""
        mount, above = mount_of(fd), mount_of(at)
        new = mount != above and stat.S_ISREG(status.st_mode) and status.st_size == 0
        return mount != (self.home[1] or above) and not new

    def keep(self, name: str, at: int, status: os.stat_result) -> bool:
        """Return whether an entry of a mount below the volume stays whose it is, and count it then."""
        if status.st_uid in self.former:
            return False
        self.kept += 1
        if not self.first_kept:
            path = os.path.normpath(os.path.join(os.readlink(f"/proc/self/fd/{at}"), name))
            self.first_kept = shown(holding_mount(path, mount_points())[0].rstrip("/"))
        return True

    def place(self, fd: int) -> MountId:
        """Return where an open folder is, as far as that can differ here."""
        return os.fstat(fd).st_dev, mount_of(fd) if self.mounted else b""

    def fail(self, name: str, at: int, error: OSError) -> None:
        """Count a refusal; the first one stands for all, since a volume that refuses one chown refuses every one."""
        self.failure = self.failure or f"{path_in(at, name)}: {reason(error)}"
        self.failed += 1

    def entries(self, fd: int, place: MountId, room: int) -> list[str]:
        """Check an open folder and every entry of it but the folders, whose names are returned, so many at most.

        The folder itself comes last. Until then, before anything of hermes's runs, nobody but root can rename in a
        folder that is root's and that only its owner may write: there a chown by name does what four calls by
        descriptor would. Another user's becomes root's for that time: a container of that UID may run.
        """
        folders: list[str] = []
        uid, gid, checked = self.uid, self.gid, 0
        own, theirs = os.fstat(fd), place != self.home
        still = not self.mounted and not theirs and own.st_uid != uid and not own.st_mode & 0o022
        if still and own.st_uid and not self.boot.dry_run:
            try:
                os.chown(fd, 0, -1)
            except OSError:
                still = False
        with os.scandir(fd) as listing:
            for entry in listing:
                checked += 1
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if len(folders) < room:
                            folders.append(entry.name)
                        continue
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # removed while we looked
                if status.st_uid == uid and status.st_gid == gid:
                    continue
                if not still:
                    self.claim(entry.name, fd)
                elif self.may_change(status):
                    self.give(entry.name, fd, status)
        self.checked += checked
        self.tell()
        if (own.st_uid != uid or own.st_gid != gid) and not (theirs and self.keep(".", fd, own)):
            self.give(".", fd, own)
        return folders

    def room(self) -> int:
        """Return how many names of folders may be kept of the next listing: a part of what is left for all, so that
        every level has some."""
        return max(16, (MOST_NAMES - self.held) // 4)

    def tell(self) -> None:
        """Say how far we are, when it is time to; to the process whose work we share, every thousand entries."""
        if self.output < 0:
            self.progress.tell(self.so_far)
        elif self.checked >= 1000:
            self.send()

    def so_far(self) -> str:
        """Return what has been done until now; how much there is, the file system knows, with what else it has."""
        home = self.boot.home
        aim = f"giving {shown(home)} to {self.uid}:{self.gid}" if self.changed else f"owners on {shown(home)}"
        files = os.statvfs(home)
        most = f" of at most {files.f_files - files.f_ffree:,}" if files.f_files > files.f_ffree else ""
        return f"{aim}: {self.checked:,}{most} entries"

    def tree(self, folder: Folder, first: list[str] | None = None) -> None:
        """Check an open folder and all below it; it is closed. first are the first of its folders, where its entries
        have been checked. One descriptor at any depth: the way back up is `..`, checked to be where we came from."""
        fd, held = folder.fd, self.held

        def folders(names: list[str] | None = None) -> Iterator[str]:
            """Check the current folder; yield its folders. Where there was no room for all, it is listed again."""
            room, listed = self.room() if names is None else len(names), 0
            names = self.entries(fd, place, room) if names is None else names
            while names:
                full, listed = len(names) >= room, listed + len(names)
                self.held += len(names)
                while names:
                    self.held -= 1
                    yield names.pop()
                if full:
                    room = self.room()
                    names = more_folders(fd, listed, room)

        try:
            place = self.place(fd)
            levels = [(os.fstat(fd).st_ino, folders(first))]
            while levels:
                if name := next(levels[-1][1], ""):
                    if len(levels) >= MOST_LEVELS:
                        self.deep += 1
                    elif child := self.open_folder(fd, name, place):
                        os.close(fd)
                        fd = child.fd
                        levels.append((os.fstat(fd).st_ino, folders()))
                    continue
                levels.pop()
                if levels:
                    up = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                    os.close(fd)
                    fd = up
                    if os.fstat(fd).st_ino != levels[-1][0]:
                        raise OSError(errno.ESTALE, "was moved while it was being swept")
        finally:
            os.close(fd)
            self.held = held

    def open_folder(self, fd: int, name: str, place: MountId | None) -> Folder | None:
        """Open a folder, None when it is gone, unreadable, or elsewhere than in its place: mount() checks that. A
        managed folder, without a place, may be a mount."""
        try:
            child = Folder(name, fd)
        except (FileNotFoundError, NotADirectoryError):
            return None  # removed or replaced while we looked
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link in its place is not ours to follow
                self.claim(name, fd)
                self.fail(name, fd, error)
            return None
        here = self.place(child.fd)
        if here == place or (place is None and not (here != self.home and is_empty(child))):
            return child
        self.mount(child)
        return None

    def mount(self, top: Folder) -> None:
        """Check what is mounted below the volume; it is closed. What belongs to a former UID is hermes's there too, and
        an empty one is as good as new. Without these only its top is looked at: the rest may be a host's whole disk."""
        status, empty = os.fstat(top.fd), is_empty(top)
        if not empty and len(self.former) > 1:
            self.tree(top)
            return
        with top:
            if (status.st_uid, status.st_gid) != (self.uid, self.gid) and (empty or not self.keep(".", top.fd, status)):
                self.give(".", top.fd, status)

    def volume(self, home: Folder, names: list[str]) -> None:
        """Check the managed folders: the upper levels here, the rest by all cores, once there is enough to share."""
        self.checked += len(names)
        waiting = [found for name in names for found in self.below(home, name, None, whole=False)]
        done = 0
        while done < len(waiting) < SHARED_FOLDERS:
            path, place = waiting[done]
            done += 1
            waiting += self.below(home, path, place, whole=path.count("/") >= SHARED_DEPTH)
        if done < len(waiting):
            self.share(home, waiting[done:])

    def opened(self, folder: Folder, path: str) -> list[tuple[str, MountId]]:
        """Check an open folder's entries and close it; return its folders' paths, and where they must be. One with too
        many to share is checked here with all below it."""
        place, room = self.place(folder.fd), min(MOST_SHARED, self.room())
        with folder:
            names = self.entries(folder.fd, place, room)
            if len(names) >= room:
                self.tree(Folder(".", folder.fd), names)
                return []
        self.held += len(names)
        return [(f"{path}/{name}", place) for name in names]

    def below(self, home: Folder, path: str, place: MountId | None, *, whole: bool) -> list[tuple[str, MountId]]:
        """Open a folder of the volume and check it, as a whole or as opened() does; return what that returns. Whatever
        became of the folder since we saw it is counted."""
        parent, _, name = path.rpartition("/")
        try:
            with home.folder(parent or ".") as above:
                folder = self.open_folder(above.fd, name, place)
            if folder and not whole:
                return self.opened(folder, path)
            if folder:
                self.tree(folder)
        except FileNotFoundError:
            pass  # removed while we looked
        except OSError as error:
            self.fail(path, home.fd, error)
        return []

    def share(self, home: Folder, folders: list[tuple[str, MountId]]) -> None:
        """Check folders in as many processes as there are cores. Each takes the number of the next group from one pipe,
        and tells by another what it has counted."""
        import marshal

        count = min(256, len(folders))
        numbers, filled = os.pipe()
        os.write(filled, bytes(range(count)))
        os.close(filled)
        results, output = os.pipe()

        def check(group: int) -> None:
            for path, place in folders[group::count]:
                self.below(home, path, place, whole=True)

        def work() -> int:
            os.close(results)
            self.output = output
            self.reset()
            while group := os.read(numbers, 1):
                check(group[0])
                self.send(group[0])
            return 0

        children: list[int] = []
        try:
            while len(children) < min(MOST_SWEEPERS, len(os.sched_getaffinity(0))):
                children.append(forked(work))
        except OSError:
            pass  # no more processes: what is left, this one does
        os.close(numbers)
        os.close(output)
        left = set(range(count))
        with open(results, "rb") as told:
            while told.peek(1):
                group, counted = marshal.load(told)
                left.discard(group)
                self.add(counted)
                self.tell()
        for child in children:
            os.waitpid(child, 0)
        if left and children:
            warn("a process that checked owners was ended, most likely for want of memory; its work is done again")
        for group in left:
            check(group)

    def send(self, group: int = -1) -> None:
        """Tell the process whose work we share what we have counted since the last time, and which group is done."""
        import marshal

        os.write(self.output, marshal.dumps((group, [getattr(self, name) for name in self.COUNTED])))
        self.reset()

    def add(self, counted: list[Any]) -> None:
        """Add what another process has counted."""
        for name, value in zip(self.COUNTED, counted, strict=True):
            ours = getattr(self, name)
            setattr(self, name, ours or value if isinstance(value, str) else ours + value)

    def kept_fault(self) -> Fault:
        """Return what there is to say of mounts whose entries stay whose they are."""
        found = f"{self.kept} entries of mounts below {shown(self.boot.home)} are not {USER}'s and stay so"
        fix = f"if {USER} is to write there: chown -hR {self.uid}:{self.gid} on the host, in what is mounted"
        return Fault(f"{found}, the first in {self.first_kept}", fix)

    def report(self) -> None:
        """Say what was changed, what could not be, and what was left alone for safety."""
        home = shown(self.boot.home)
        if self.changed:
            total = f"{self.changed} of {self.checked} entries"
            self.boot.announce(f"give {total} on {home} to {self.uid}:{self.gid}")
        if self.failed:
            text = f"{self.failed} entries on {home} could not be given to {self.uid}:{self.gid}"
            why = "since a rootless engine, NFS, a NAS or a read-only mount may refuse that and still work"
            warn(f"{text}, the first: {self.failure}; going on, {why}")
        if self.kept:
            warn(self.kept_fault())
        if self.deep:
            warn(f"{self.deep} folders on {home} are over {MOST_LEVELS} levels down and were left alone")
        if self.left_behind:
            warn(
                f"{USER} was another user before; {self.left_behind} entries at the top of {home} that are"
                f" none of the agent's own stay whose they are, the first: {shown(self.first_left_behind)};"
                f" chown what {USER} needs to {self.uid}:{self.gid} on the host, with the container stopped"
            )
        if self.linked:
            warn(
                f"{self.linked} files on {home} have hard links and another owner, so they were left alone;"
                " copy them (cp FILE NEW; mv NEW FILE) if hermes needs them"
            )


def is_empty(folder: Folder) -> bool:
    """Return whether nothing is in a folder."""
    with os.scandir(folder.fd) as listing:
        return next(listing, None) is None


def more_folders(fd: int, skip: int, room: int) -> list[str]:
    """Return an open folder's next folders' names, so many at most: a listing is read again, not kept."""
    from itertools import islice

    with os.scandir(fd) as listing:
        folders = (entry.name for entry in listing if entry.is_dir(follow_symlinks=False))
        return list(islice(folders, skip, skip + room))


def is_groups(status: os.stat_result, gid: int) -> bool:
    """Return whether a group can use an entry, by its status, as its owner could."""
    wanted = 0o070 if stat.S_ISDIR(status.st_mode) else 0o060
    return stat.S_ISLNK(status.st_mode) or (status.st_gid == gid and status.st_mode & wanted == wanted)


def path_in(folder: int, name: str) -> str:
    """Return the path of an entry of an open folder, for people."""
    return shown(os.path.normpath(os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)))


def mount_points() -> list[tuple[str, str]]:
    """Return the path of every mount, with a slash at its end, and its kind of file system. See proc(5)."""
    result = []
    for line in content("/proc/self/mountinfo").split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        path = before.split(b" ")[4]
        for octal, character in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
            path = path.replace(octal, character)
        result.append((os.fsdecode(path).rstrip("/") + "/", os.fsdecode(after.split(b" ")[0])))
    return result


def holding_mount(path: str, mounts: list[tuple[str, str]]) -> tuple[str, str]:
    """Return the mount that a path is on."""
    real = os.path.realpath(path).rstrip("/") + "/"
    above = [mount for mount in reversed(mounts) if real.startswith(mount[0])]
    return max(above, key=lambda mount: len(mount[0]), default=("/", "unknown"))


def mount_faults(boot: Boot) -> list[Fault]:
    """Return what is wrong with what is mounted where."""
    faults, mounts = [], mount_points()
    if any(point == f"{IMAGE}/" for point, _ in mounts):
        text = f"something is mounted over {IMAGE}, so what runs is not what the image has"
        faults.append(Fault(text, f"remove the mount; put what is to stay on {HOME}"))
    if loses_wal(kind := holding_mount(boot.home, mounts)[1]):
        text = f"{shown(boot.home)} is on {kind}, where SQLite's WAL is not safe, so state.db may be damaged"
        fix = "keep it on a disk of the engine's own, such as a named volume; no setting of hermes-agent 0.19 helps"
        faults.append(Fault(text, fix))
    return faults


def loses_wal(kind: str) -> bool:
    """Return whether a kind of file system does not share memory as SQLite's WAL needs it."""
    return kind.startswith("fuse") or kind in "9p cifs fakeowner nfs nfs4 smb3 smbfs vboxsf virtiofs".split()


def own_volume(boot: Boot) -> None:
    """Hand HERMES_HOME itself and what is managed at its top to hermes. All else there is the user's."""
    try:
        sweep = sweep_volume(boot)
    except (PermissionError, FileNotFoundError) as error:
        warn(f"{shown(boot.home)} cannot be looked into by root ({reason(error)}), so owners stay as they are")
    except OSError as error:
        raise Fatal(f"HERMES_HOME={boot.home!r} {described(error)}; make all on the way to it plain folders") from error
    else:
        sweep.report()


def sweep_volume(boot: Boot) -> Sweep:
    """Check all that hermes manages on the volume, and change wrong owners unless it is a dry run. Who the volume
    belongs to until then is who hermes was before, root excepted."""
    with trusted_folder(boot.home) as home:
        # Else hermes could have put another's folder there, or never was that user: each boot of its leaves logs.
        top = os.fstat(home.fd).st_uid if home.roots_way and home.stat("logs") else 0
        mounts = mount_points()
        holder = holding_mount(boot.home, mounts)[0]
        others = any(point != holder and point.startswith(holder) for point, _ in mounts)  # hermes may move these
        sweep = Sweep(boot, former=top, mounted=others)
        sweep.home = sweep.place(home.fd)
        folders: list[str] = []
        with os.scandir(home.fd) as listing:
            for entry in listing:
                if entry.name in MANAGED_TOPS:
                    folders.append(entry.name)
                elif not is_managed_file(entry.name):
                    sweep.notice(entry)
                elif entry.is_file(follow_symlinks=False):
                    sweep.checked += 1
                    sweep.claim(entry.name, home.fd, writable=True)
        sweep.volume(home, sorted(folders))
        sweep.progress.end()
        sweep.checked += 1
        sweep.claim(".", home.fd)  # last: until then it tells, at the next boot too, who hermes was
    return sweep


def make_home(boot: Boot) -> None:
    """Make HERMES_HOME with its parents, unless it is there. Fatal when that cannot be."""
    if os.path.isdir(boot.home) or not boot.announce(f"make {shown(boot.home)}"):
        return
    try:
        os.close(trusted_folder(boot.home, make=True).fd)
    except PermissionError:
        pass  # root may be refused what hermes is not, on NFS: what hermes finds there says it
    except OSError as error:
        raise Fatal(f"HERMES_HOME={boot.home!r} cannot be made: {reason(error)}; mount a volume there") from error


def is_managed_file(name: str) -> bool:
    """Return whether a top-level file is one that hermes keeps."""
    temporary = name.startswith(".") and name.endswith(".tmp")
    return name in MANAGED_FILES or name.startswith(MANAGED_PREFIXES) or name.endswith("_threads.json") or temporary


# Seeding
# --------------------------------------------------------------------------------------------------------------------

BUILT_IN = {
    "SOUL.md": "You are Hermes, a helpful, curious and honest assistant."
    " Edit this file to make the persona your own.\n",
    ".env": "# Secrets of Hermes Agent, one NAME=value a line. `hermes setup` fills this in.\n",
    "config.yaml": "# Configuration of Hermes Agent. `hermes setup` fills this in; `hermes config` shows all of it.\n",
}
TEMPLATES = (
    (".env", 0o600, ".env.example"),
    ("config.yaml", 0o660, "cli-config.yaml.example"),
    ("SOUL.md", 0o666, "docker/SOUL.md"),
)
STATE_FILE = "gateway_state.json"
BOOTSTRAPS = {"auth.json": "HERMES_AUTH_JSON_BOOTSTRAP", STATE_FILE: "HERMES_GATEWAY_BOOTSTRAP_STATE"}
TO_MIGRATE = 75  # seed's exit code
MIGRATION_LOG = "config-migration.log"
PROBE = "hermes-write-test"


def seeds(boot: Boot) -> list[tuple[str, int, bytes]]:
    """Return (name, mode before the umask, content) of every file that a volume starts with."""
    result = []
    for name, mode, template in TEMPLATES:
        try:
            data = content(f"{IMAGE}/{template}")
        except OSError:
            data = BUILT_IN[name].encode()
        result.append((name, mode, data))
    if auth := boot.environment.get("HERMES_AUTH_JSON_BOOTSTRAP"):
        result.append(("auth.json", 0o600, os.fsencode(auth)))
    if state := boot.setting("HERMES_GATEWAY_BOOTSTRAP_STATE"):
        if state == "running":
            result.append((STATE_FILE, 0o666, b'{"desired_state": "running"}\n'))
        else:
            warn(f"HERMES_GATEWAY_BOOTSTRAP_STATE={state!r} is ignored; the one state to start from is `running`")
    return result


def open_home(boot: Boot) -> Folder:
    """As hermes: open HERMES_HOME. Fatal when hermes may not."""
    try:
        return Folder(boot.home, follow=True)
    except FileNotFoundError:
        raise Fatal(f"HERMES_HOME={boot.home!r} does not exist; mount a volume there, or correct it") from None
    except OSError as error:
        if os.geteuid() != boot.owner[0]:
            raise Fatal(f"UID {os.geteuid()} cannot read {shown(boot.home)}; run this as hermes or root") from error
        where, it = barred(boot.home), "it"
        advice = home_advice(boot, owner_of(where), error)
        if where != os.path.realpath(boot.home):
            it = f"{shown(where)} on the way, which hermes may not enter,"
            advice = "let hermes in, or set HERMES_HOME to a folder elsewhere"
        text = f"{shown(boot.home)} cannot be read by hermes ({boot.owner[0]}:{boot.owner[1]}): {reason(error)}"
        raise Fatal(f"{text}; {it} {owner_and_mode(where)}; {advice}") from error


def home_advice(boot: Boot, found: Owner, error: OSError) -> str:
    """Return what helps on a volume that found owns and hermes cannot use."""
    if error.errno == errno.EROFS:
        return "mount it writable"
    if found[0] == boot.owner[0]:
        return "the host refuses it: with SELinux mount it with `:Z`, else look at its ACLs"
    if boot.owner[1] == 0:
        return f"give it to group 0 (chgrp -R 0, chmod -R g+rwX), or drop `--user` for HERMES_UID={boot.owner[0]}"
    give = f"chown -R {boot.owner[0]}:{boot.owner[1]} it on the host"
    start = f"{'' if boot.by_root else 'drop `--user` and '}start with HERMES_UID={found[0]} HERMES_GID={found[1]}"
    return f"{start}, or {give}" if found[0] else give


def barred(path: str) -> str:
    """As hermes: return the first folder on the way to a path that cannot be entered, else the path itself."""
    real = os.path.realpath(path)
    names = real.split("/")[1:]
    folders = ["/" + "/".join(names[:count]) for count in range(len(names))]
    return next((folder for folder in folders if not os.access(folder, os.X_OK)), real)


def owner_and_mode(path: str, at: int | None = None) -> str:
    """Return to whom an entry belongs and with what mode, in words."""
    try:
        status = os.stat(path, dir_fd=at, follow_symlinks=False)
    except OSError:
        return "is gone by now"
    return f"belongs to {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}"


def seed(boot: Boot) -> int:
    """As hermes: try the volume, make the managed folders, put missing files in place. Never overwrites. Fatal if
    not writable. Returns TO_MIGRATE when the configuration is of an older hermes-agent."""
    umask = take_umask(boot.environment)
    if not boot.dry_run:
        give_access(os.path.realpath(boot.home))
    with open_home(boot) as home:
        if not boot.dry_run:
            try_volume(boot, home)
            make_runtime_folder(boot)
        fresh = home.stat("config.yaml") is None
        for path in MANAGED_FOLDERS:
            seed_folder(boot, home, path)
        for name, mode, data in seeds(boot):
            seed_file(boot, home, name, mode & ~umask, data)
        check_files(home)
        check_packages(boot)
        remove_install_method(boot, home)
        return TO_MIGRATE if wants_migration(boot, home, fresh=fresh) else 0


def give_access(path: str, at: int | None = None) -> None:
    """As hermes: give the owner all rights on a folder of its own, should the agent have taken them."""
    try:
        status = os.stat(path, dir_fd=at, follow_symlinks=False)
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and mode & 0o700 != 0o700:
            os.chmod(path, mode | 0o700, dir_fd=at)
    except OSError:
        pass  # what comes next says it


def check_files(home: Folder) -> None:
    """As hermes: say what others can read, and what hermes cannot."""
    for name in (".env", "config.yaml", "auth.json"):
        found = home.stat(name)
        if not found or not stat.S_ISREG(found.st_mode):
            continue
        if not os.access(name, os.R_OK, dir_fd=home.fd):
            whose = owner_and_mode(name, home.fd)
            warn(f"{name} on the volume cannot be read by hermes: it {whose}; give it to hermes")
        elif found.st_mode & 0o004 and name == ".env":
            mode = stat.S_IMODE(found.st_mode)
            warn(f"{name} on the volume can be read by everyone (mode {mode:04o}); run `hermes-boot doctor --fix`")


def remove_install_method(boot: Boot, home: Folder) -> None:
    """As hermes: remove what older images left: it has the agent tell people to pull another image."""
    name = ".install_method"
    try:
        if home.read(name, 100).strip() == b"docker" and boot.announce(f"remove the stale {name}"):
            os.unlink(name, dir_fd=home.fd)
    except OSError:
        pass  # not there, or none of ours


def probe(home: Folder) -> None:
    """Write a small file on the volume, safely, and remove it, unless somebody else has. Raises OSError."""
    home.unlinked(home.write_beside(PROBE, b"hermes\n", 0o600))


def try_volume(boot: Boot, home: Folder) -> None:
    """Write a file as hermes. A full disk is only said: gateways may still run. A volume that refuses is Fatal."""
    try:
        with Lock(home, PROBE, STATE_FILE, VERSION_STAMP, "auth.json", *BUILT_IN):
            probe(home)
    except OSError as error:
        if is_full(error):
            warn(f"{shown(boot.home)}: {reason(error)}; free some space, or gateways will not start well")
            return
        advice = home_advice(boot, owner_of(boot.home), error) + rootless_advice(boot.owner)
        text = f"{shown(boot.home)} cannot be written by hermes ({boot.owner[0]}:{boot.owner[1]}): {reason(error)}"
        raise Fatal(f"{text}; it {owner_and_mode('.', home.fd)}; {advice}") from error


def make_runtime_folder(boot: Boot) -> None:
    """Make the folder for XDG_RUNTIME_DIR, hermes's alone, unless the container was given another one."""
    if boot.setting("XDG_RUNTIME_DIR") or not supervised():
        return
    try:
        with Folder("/tmp") as parent, parent.made(os.path.basename(RUNTIME_FOLDER)) as folder:
            os.fchmod(folder.fd, 0o700)
    except OSError as error:
        warn(f"{RUNTIME_FOLDER} {described(error)}; give hermes a writable /tmp (--tmpfs /tmp), or set XDG_RUNTIME_DIR")


def check_packages(boot: Boot) -> None:
    """Name the packages that the agent has fetched for another Python; it fetches them anew when they are needed."""
    import _imp

    ours = f"{sys.version_info[0]}.{sys.version_info[1]}:{_imp.extension_suffixes()[0]}"
    path = boot.setting("HERMES_LAZY_INSTALL_TARGET") or f"{boot.home}/lazy-packages"
    try:
        with Folder(path, follow=True) as folder, os.scandir(folder.fd) as listing:
            found = folder.read(".python-abi", 200).decode(errors="replace").strip()
            names = [entry.name.removesuffix(".dist-info") for entry in listing if entry.name.endswith(".dist-info")]
    except OSError:
        return  # nothing was fetched
    if found != ours and names:
        packages = " ".join(shown(name) for name in sorted(names)[:20])
        warn(
            f"{len(names)} packages in {shown(path)} are for Python {shown(found)} and not {ours}: {packages};"
            " the agent fetches them anew when a platform needs one; remove the folder to be rid of them at once"
        )


def seed_folder(boot: Boot, home: Folder, path: str) -> None:
    """Make a managed folder where it is missing."""
    try:
        if boot.dry_run:
            if not os.path.isdir(f"{boot.home}/{path}"):
                boot.announce(f"make the folder {path}")
            return
        give_access(path.partition("/")[0], home.fd)
        os.close(home.folder(path, make=True).fd)
    except OSError as error:
        if not is_full(error):  # else that has been said
            warn(f"{path} on the volume {described(error)}; put a plain folder there")


def seed_file(boot: Boot, home: Folder, name: str, mode: int, data: bytes) -> None:
    """Put a file in place unless something has its name, be that a dangling link."""
    if found := home.stat(name):
        if name in BOOTSTRAPS and not stat.S_ISREG(found.st_mode):
            warn(f"{BOOTSTRAPS[name]} is not used, since {name} on the volume is a link or a folder; remove that")
        return
    if not boot.announce(f"seed {name}"):
        return
    try:
        home.write(name, data, mode, replace=False)
    except OSError as error:
        warn(f"{name} could not be seeded: {reason(error)}; the next boot tries again")


def sync_skills(boot: Boot) -> None:
    """Bring the skills that the image bundles to the volume, with the agent's own tool."""
    bundled = boot.setting("HERMES_BUNDLED_SKILLS") or f"{IMAGE}/skills"
    if not os.path.isdir(bundled):
        return
    environment = program_environment(boot.environment) | {"HERMES_BUNDLED_SKILLS": bundled}
    paths = f"{IMAGE}/tools/skills_sync.py", *installed("tools/skills_sync.py")
    script = next(filter(os.path.exists, paths), "")
    if not script or not boot.announce("sync the bundled skills"):
        return
    if code := run_helper([f"{VENV}/bin/python", script], environment):
        warn(f"skills sync ended with code {code}; run it again with `{VENV}/bin/python {script}`")


def installed(path: str) -> list[str]:
    """Return a path in each site-packages of the venv."""
    pythons = [name for name in names_in(f"{VENV}/lib") if name.startswith("python3")]
    return [f"{VENV}/lib/{python}/site-packages/{path}" for python in pythons]


def image_version() -> str:
    """Return the version of hermes-agent that the image has, from its metadata's folder name, "" when there is none."""
    for folder in installed(""):
        for name in names_in(folder):
            if name.startswith("hermes_agent-") and name.endswith(".dist-info"):
                return name.removeprefix("hermes_agent-").removesuffix(".dist-info")
    return ""


def volume_version(home: Folder) -> str:
    """As hermes: return the version of hermes-agent that last ran on the volume, "" when none was noted."""
    try:
        return home.read(VERSION_STAMP, 100).decode(errors="replace").strip()
    except OSError:
        return ""


VERSION_WORDS = ("dev", "a", "b", "rc", "", "post")  # in PEP 440's order; "" is a version's end; numbers come last


def version_key(version: str) -> list[tuple[int, int]]:
    """Return what sorts versions, in their normal form or with a v, as PEP 440 does; what is none comes first."""
    import re  # 8 ms, so only where two versions differ

    epoch, _, public = version.strip().removeprefix("v").partition("+")[0].rpartition("!")
    key: list[tuple[int, int]] = []
    for part in [epoch or "0", *re.findall(r"[0-9]+|[^0-9.]+", public), ""] if public else []:
        if part.isascii() and part.isdecimal():
            key.append((len(VERSION_WORDS), int(part)))
        elif part not in VERSION_WORDS:
            return []
        else:
            while key and key[-1][1] == 0:
                key.pop()  # 1.0 is 1
            key.append((VERSION_WORDS.index(part), 1))
    return key


def is_newer(version: str, than: str) -> bool:
    """Return whether a version is a later one than another."""
    return version != than and version_key(version) > version_key(than)


def wants_migration(boot: Boot, home: Folder, *, fresh: bool) -> bool:
    """As hermes: return whether the image's agent is newer than the one that last ran on this volume, which a file
    there says; a fresh volume has nothing to migrate."""
    version, last = image_version(), volume_version(home)
    if not version or switch(boot.setting("HERMES_SKIP_CONFIG_MIGRATION")) or not is_newer(version, last):
        return False
    if fresh:
        if not boot.dry_run:
            stamp_version(home, version)
        return False
    return boot.announce(f"migrate the configuration from {shown(last) if last else 'an unknown version'} to {version}")


def migrate_config(boot: Boot) -> int:
    """Become hermes, run `hermes config migrate` for every profile that has a config.yaml of an older version; return
    1 when one was not migrated, which is tried again at the next boot. What the agent says is in logs/."""
    become_hermes()
    take_umask(boot.environment)
    version, code = image_version(), 0
    with open_home(boot) as home, Opened(migration_log(home)) as log:
        for profile, folder in open_profiles(boot, home, None):
            if folder and is_older_config(folder):
                failure = migration_failure(boot, folder, profile.name, log.fd)
                if failure or not boot.quiet:
                    say("warning" if failure else "info", f"{profile.name}: configuration {failure or 'migrated'}")
                code = code or int(bool(failure))
        if not code:
            stamp_version(home, version)
    return code


def migration_log(home: Folder) -> int:
    """Open the log of a migration anew, or /dev/null where hermes has put something else there."""
    try:
        with home.folder("logs", make=True) as logs:
            return logs.open(MIGRATION_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    except OSError as error:
        warn(f"logs/{MIGRATION_LOG} {described(error)}; remove it to have what the agent says of its migration")
        return os.open(os.devnull, os.O_WRONLY)


def is_older_config(folder: Folder) -> bool:
    """Return whether a profile's config.yaml is older than the image, by the number that the agent keeps in it."""
    import re

    try:
        found = re.search(rb"^_config_version:\s*(\d{1,9})\b", folder.read("config.yaml", 16 << 20), re.MULTILINE)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # the migration says it
    for source in (*installed("hermes_cli/config.py"), *installed("hermes_cli/config_defaults.py")):
        latest = re.search(rb'"_config_version":\s*(\d+)', content(source)) if os.path.exists(source) else None
        if found and latest:
            return int(found[1]) < int(latest[1])
    return True


def migration_failure(boot: Boot, folder: Folder, profile: str, log: int) -> str:
    """Back a profile's configuration up and migrate it; return why that was not done, "" when it was."""
    import subprocess

    try:
        back_up_config(folder)
    except OSError as error:
        return f"not migrated, since {error.filename or 'a copy'} {described(error)}"
    words = [HERMES, "-p", profile, "config", "migrate"]
    environment = program_environment(boot.environment) | {"HERMES_HOME": boot.home}
    try:
        done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    except OSError as error:
        return f"not migrated: {HERMES}: {reason(error)}"
    failed = f"migration ended with code {shell_code(done.returncode)}; logs/{MIGRATION_LOG} says why"
    return failed if done.returncode else ""


def back_up_config(folder: Folder) -> None:
    """Keep a copy of a profile's config.yaml and .env in its backups/, with the date that the file is of, so that a
    migration that fails again makes no other. Raises OSError."""
    for name in ("config.yaml", ".env"):
        found = folder.stat(name)
        if found is None:
            continue
        try:
            if name == "config.yaml" and is_fixed(folder, name):
                raise OSError(errno.EROFS, "is mounted by itself and not writable; migrate what is mounted there")
            data = folder.read(name, 16 << 20)
            date = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime(found.st_mtime))
            with folder.folder("backups", make=True) as backups:
                backups.write(f"{name}.{date}", data, 0o600, replace=False)
        except OSError as error:
            error.filename = error.filename or name
            raise


def is_fixed(folder: Folder, name: str) -> bool:
    """Return whether a file can neither be written nor replaced, being a mount."""
    with Opened(os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder.fd)) as file:
        return mount_of(file.fd) != mount_of(folder.fd) and not os.access(name, os.W_OK, dir_fd=folder.fd)


def stamp_version(home: Folder, version: str) -> None:
    """As hermes: note the version that now runs on this volume."""
    try:
        home.write(VERSION_STAMP, f"{version}\n".encode(), 0o644, replace=True)
    except OSError as error:
        warn(f"{VERSION_STAMP} could not be written: {reason(error)}; the next boot tries again")


# Profiles and their state
# --------------------------------------------------------------------------------------------------------------------

STATE_LIMIT = 64 << 10  # bytes; real ones have a few hundred
STALE_FILES = ("gateway.pid", "processes.json")  # of a dead container's processes
PROFILE_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
SLOT_PREFIX, SLOT_NAME_LIMIT = "gateway-", 251
MOST_PROFILES = 20_000
MULTIPLEXED = Fault("multiplex_profiles leaves it to the default gateway")


class Profile:
    """What the reconciler found of one profile, and what it makes of that."""

    def __init__(self, name: str, prior_state: str | None, action: str, fault: Fault | None, prior_exit: str) -> None:
        self.name, self.prior_state, self.action, self.fault = name, prior_state, action, fault
        self.prior_exit, self.state = prior_exit, dict[str, object]()  # all that its state file says

    def why(self) -> str:
        """Return why its gateway starts, or does not."""
        if self.fault:
            return self.fault.text
        return "never started" if self.prior_state is None else shown(self.prior_state)

    def line(self) -> str:
        """Return the profile's line for the boot log."""
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        state = "none" if self.prior_state is None else shown(self.prior_state)
        why = f' reason="{self.fault}"' if self.fault else ""
        end = f" prior_exit={self.prior_exit}" if self.prior_exit else ""
        return f"{date} profile={shown(self.name)} prior_state={state} action={self.action}{why}{end}\n"


def profile_folder(home: Folder, profile: str) -> Folder:
    """Open a profile's folder."""
    return home.folder("." if profile == "default" else f"profiles/{profile}")


def name_fault(name: str) -> Fault | None:
    """Return what keeps a name from being a profile's."""
    if not set(name) <= PROFILE_NAME or name[:1] in ("", "-", "_"):
        return Fault("a profile's name has only a-z 0-9 _ -, and begins with a letter or digit", "rename the folder")
    if len(SLOT_PREFIX + name) > SLOT_NAME_LIMIT:
        return Fault(f"the name is longer than {SLOT_NAME_LIMIT - len(SLOT_PREFIX)} characters", "rename the folder")
    return None


def load_state(data: bytes) -> dict[str, object]:
    """Return a state file's object; ValueError when it is not one."""
    import json  # 7 ms, so only where there is a state to read

    try:
        state = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(state, dict):
        raise ValueError("is not a JSON object")
    return state


def read_state(folder: Folder) -> tuple[dict[str, object], Fault | None]:
    """Return a profile's state, empty when it has none, and what is wrong with the file."""
    advice = "remove it and start the gateway again"
    try:
        return load_state(folder.read(STATE_FILE, STATE_LIMIT)), None
    except FileNotFoundError:
        return {}, None
    except OSError as error:
        return {}, Fault(f"{STATE_FILE} {described(error)}", advice)
    except ValueError:
        return {}, Fault(f"{STATE_FILE} is not a JSON object", advice)


def intent_of(state: dict[str, object]) -> tuple[str | None, Fault | None]:
    """Return the state that a gateway should be in, and what is wrong with it: desired_state, the operator's intent,
    wins; gateway_state is the gateway's own word, in which draining and degraded are ways of running."""
    intent = state.get("desired_state")
    if intent is None:
        intent = state.get("gateway_state")
        if intent in ("draining", "degraded"):
            intent = "running"
    if intent is None or isinstance(intent, str):
        return intent and intent[:1000], None
    return None, Fault(f"{STATE_FILE} has a state that is no string", "start or stop the gateway to set it")


def prior_exit(folder: Folder, state: dict[str, object]) -> str:
    """Return how a gateway ended last: `clean` where it has said so by its state or its marker, which its next start
    removes, `unclean` where it was still at work by its own word, `unknown` where it has said nothing, "" where it
    has no state at all."""
    own = state.get("gateway_state")
    if not state:
        return ""
    if own not in ("starting", "running", "draining", "degraded"):
        return "clean" if own == "stopped" else "unknown"
    try:
        return "clean" if folder.stat(".clean_shutdown") else "unclean"
    except OSError:
        return "unknown"


def soul_fault(folder: Folder) -> Fault | None:
    """Return why a folder is not a profile by its SOUL.md."""
    if folder.stat("SOUL.md") is None:
        return Fault("no SOUL.md, so not a profile")
    try:
        status = folder.stat("SOUL.md", follow=True)
    except OSError:
        status = None
    regular = status and stat.S_ISREG(status.st_mode)
    return None if regular else Fault("SOUL.md is not a file", "make it one, or remove it if this is no profile")


def container_words() -> list[str]:
    """Return the words of hermes's command line that the container was started with. Cont-init scripts do not see them;
    rc.init does, a child of PID 1's, or PID 1 where that runs the wrapper, or the fallback init."""
    fallback = read_pid_file(SUPERVISOR_PROCESS)  # among others' processes, in a shared PID namespace
    for process in [fallback] if fallback else [1, *families().get(1, [])]:
        try:
            line = [os.fsdecode(word) for word in content(f"/proc/{process}/cmdline", MOST_WORDS).split(b"\0")[:-1]]
        except OSError:
            continue  # ended meanwhile, or not ours to read
        if words := wrapped_words(line, process in (1, fallback)):
            return words[2:] if words[1:2] == [USER] else words[1:]
    return []


def wrapped_words(line: list[str], is_init: bool) -> list[str]:
    """Return a command line from the wrapper's name on, [] for none; unless it is PID 1's or the fallback init's, it
    must be rc.init's."""
    names = [os.path.basename(word) for word in line]
    start = 0 if is_init else names.index("rc.init") if "rc.init" in names else len(names)
    return next((line[i:] for i in range(start, len(line)) if names[i] in ("main-wrapper.sh", "main_wrapper.py")), [])


def families() -> dict[int, list[int]]:
    """Return every process's children of this moment."""
    result: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        try:
            if name.isdigit():
                parent = int(content(f"/proc/{name}/stat").rpartition(b")")[2].split()[1])  # see proc(5)
                result.setdefault(parent, []).append(int(name))
        except OSError:
            continue  # ended meanwhile
    return result


def descendants(process: int) -> list[int]:
    """Return all processes of this moment below one."""
    found, children = [process], families()
    for parent in found:
        found += children.get(parent, [])
    return found[1:]


def run_profile(boot: Boot, command: list[str], home: Folder) -> str | None:
    """Return the profile that the container was started to run, as it was done before there was a supervisor."""
    option, words = profile_option(command)
    in_foreground = "--no-supervise" in words or switch(boot.setting("HERMES_GATEWAY_NO_SUPERVISE"))
    if words[:2] != ["gateway", "run"] or in_foreground:
        return None
    return chosen_profile(option, boot.environment, None if is_multiplexed(boot) else home)


def chosen_profile(option: str | None, environment: dict[str, str], home: Folder | None) -> str:
    """Return the profile a `hermes` command is about: -p, else HERMES_HOME=<root>/profiles/<name>, else
    active_profile, else default."""
    if option is not None:
        return option
    path = (environment.get("HERMES_HOME", "") or HOME).rstrip("/")
    if path != root_home(environment).rstrip("/"):
        return os.path.basename(path)
    try:
        first = home.read("active_profile", 4096).decode("utf-8", "replace").splitlines() if home else []
    except OSError:
        first = []
    return (first[0].strip() if first else "") or "default"


def is_multiplexed(boot: Boot, name: str = "") -> bool:
    """Return whether a profile's gateway is left to the default one, which serves all profiles: as the variable says,
    else the root profile's config.yaml."""
    if boot.multiplexes is None:
        boot.multiplexes = switch(boot.setting("GATEWAY_MULTIPLEX_PROFILES"))
    if boot.multiplexes is None:
        try:
            with open_home(boot) as home:
                text = home.read("config.yaml", 16 << 20).decode("utf-8-sig", "replace")
        except (OSError, Fatal):
            text = ""
        boot.multiplexes = switch(yaml_value(text, "multiplex_profiles", "gateway")) is True
    return name != "default" and boot.multiplexes


def yaml_value(text: str, key: str, section: str) -> str:
    """Return what a YAML file has for a key at the top or, unless it is there, in a section, "" for nothing. No more of
    YAML is understood than people write for such a key: block style, a section in braces, quotes and comments."""
    top = nested = None
    inside, indent = False, 0
    for line in text.splitlines() if key in text else ():
        bare = line.strip()
        depth = len(line) - len(line.lstrip(" "))
        name, _, value = f"{bare} ".partition(": ")
        name, value = name.strip("\"' "), value.partition(" #")[0].strip()
        if not bare or bare.startswith("#"):
            continue
        if depth == 0:
            inside, indent = name == section, 0
            top = value if name == key else top
            pairs = value.strip("{}").split(",") if inside and value.startswith("{") else []
        else:
            indent = indent or depth
            pairs = [bare] if inside and depth == indent else []
        for pair in pairs:
            name, _, value = f"{pair} ".partition(": ")
            nested = value.partition(" #")[0] if name.strip("\"' ") == key else nested
    return (top if top is not None else nested or "").strip("\"' ")


def list_profiles(boot: Boot, home: Folder, running: str | None) -> list[Profile]:
    """Return every profile of the volume with what to do about it, default first, then in name order; running is the
    one that the container command starts, should it have no state yet."""
    found = []
    for profile, _ in open_profiles(boot, home, running):
        profile.state = {}  # 20 times its file's size
        found.append(profile)
    return found


def open_profiles(boot: Boot, home: Folder, running: str | None) -> Iterator[tuple[Profile, Folder | None]]:
    """Yield what list_profiles returns, each with its folder, open until the next one (None when skipped)."""
    yield decide(boot, home, "default", running), home
    try:
        with home.folder("profiles") as profiles:
            for name in profile_names(profiles):
                found = inspect(profiles, name)
                if isinstance(found, Folder):
                    with found:
                        yield decide(boot, found, name, running), found
                elif found:
                    yield Profile(name, None, "skipped", found, ""), None
    except FileNotFoundError:
        pass
    except OSError as error:
        warn(f"profiles on the volume {described(error)}, so default alone has a gateway; put a plain folder there")


def profile_names(profiles: Folder) -> list[str]:
    """Return the entries of profiles/ that could be profiles, in name order; of more than MOST_PROFILES only those that
    have a SOUL.md, up to that number, since hermes can make millions."""
    with os.scandir(profiles.fd) as listing:
        entries = (entry.name for entry in listing if entry.is_symlink() or entry.is_dir(follow_symlinks=False))
        names = [name for _, name in zip(range(MOST_PROFILES + 1), entries, strict=False)]
        if len(names) > MOST_PROFILES:
            from heapq import nsmallest
            from itertools import chain

            warn(f"profiles on the volume has over {MOST_PROFILES} entries; those without SOUL.md are not looked at")
            real = (name for name in chain(names, entries) if os.access(f"{name}/SOUL.md", os.F_OK, dir_fd=profiles.fd))
            names = nsmallest(MOST_PROFILES, real, key=os.fsencode)
    return sorted(names, key=os.fsencode)


def inspect(profiles: Folder, name: str) -> Folder | Fault | None:
    """Open a profile's folder; return why an entry of profiles/ is no profile instead, None for what is a file."""
    folder, fault = None, name_fault(name)
    try:
        status = profiles.stat(name)
        if status is None or not (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            return None
        if not fault:
            folder = Folder(name, profiles.fd)
            fault = soul_fault(folder)
        if not fault and name == "default":
            fault = Fault("the name is reserved for the root profile", "rename profiles/default")
        if not fault:
            return folder
    except OSError as error:
        found = f"profiles/{shown(name)} {described(error)}: it {owner_and_mode(name, profiles.fd)}"
        fault = Fault(found, "fix or remove it")
    if folder:
        os.close(folder.fd)
    return fault


def decide(boot: Boot, folder: Folder, name: str, running: str | None) -> Profile:
    """Decide from a profile's state file whether its gateway starts: only `running` does."""
    whole, fault = read_state(folder)
    state, fault = (None, fault) if fault else intent_of(whole)
    if state is None and not fault and name == running:
        state = "running"
    left = state == "running" and is_multiplexed(boot, name)
    action = "started" if state == "running" and not left else "registered"
    profile = Profile(name, state, action, MULTIPLEXED if left else fault, prior_exit(folder, whole))
    profile.state = whole
    return profile


def clean_profile(folder: Folder) -> Fault | None:
    """Remove what a dead container's processes left in a profile; return what could not be removed."""
    for name in STALE_FILES:
        try:
            os.unlink(name, dir_fd=folder.fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            return Fault(f"{name} {described(error)}", "remove it")
    return None


# Slots
# --------------------------------------------------------------------------------------------------------------------

BOOT = "/opt/hermes/bin/hermes-boot"
SLOT_LIMIT = 490  # s6-svscan takes 500 services with loggers, in no order of ours, and the image has some of its own
FULL = Fault(f"s6-svscan takes no more than {SLOT_LIMIT} gateways", "use another container")
SLOT_SPACE, SLOT_GROWTH = 40 << 10, 8 << 10  # bytes of memory that a slot comes to take, and of that while it runs
SPARE_SPACE = 64 << 10  # of it for the container's end: s6-overlay has to write there, or never ends
NO_SPACE = Fault("the scandir has no room for more gateways", "mount a larger /run: --tmpfs /run:exec,size=64m")
EX_CONFIG = 78
ENDING = ".s6-svscan/hermes-ending"  # in the scandir while the container ends
BACK_OFF_LIMIT = 60  # seconds
LOGGER_MEMORY = 16 << 10  # KiB of address space; s6-log keeps all that the container's stderr does not take


def quoted(text: str) -> str:
    """Return text as one word of a shell script."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


FIND_HOME = (  # in shell, what root_home does
    'home="${HERMES_HOME:-' + HOME + '}"',
    'home="${home%"${home##*[!/]}"}"',
    'case "${home%/*}" in */profiles) home="${home%/profiles/*}" ;; esac',
)
# What umask_of does.
TAKE_UMASK = 'case "$UMASK" in [0-7] | [0-7][0-7] | 0[0-7][0-7] | 00[0-7][0-7]) umask "$UMASK" ;; esac'
# s6-log makes its stdout non-blocking, for all who share it: so not the container command's stderr itself, but the same
# file opened anew. Its stderr is that one too: on a stderr that nobody reads, its last words would keep it from ending.
OWN_STDERR = "if [ -w /proc/self/fd/2 ] && [ ! -S /proc/self/fd/2 ]; then exec 1>>/proc/self/fd/2; else exec 1>&2; fi"


def dropping(command: str) -> list[str]:
    """Return the last lines of a slot's script: exec a command as hermes, who we are already without root."""
    return [f'[ "$(id -u)" = 0 ] || exec {command}', f"exec s6-setuidgid {USER} {command}"]


def run_script(profile: str, extra_env: dict[str, str] | None = None) -> str:
    """Return a slot's run: the gateway of a profile. Root only drops here: hermes can restart it at will.

    HERMES_S6_SUPERVISED_CHILD (HERMES_SUPERVISED_CHILD in later agents) keeps hermes-agent from handing the gateway to
    s6 once more, and a sticky active_profile from capturing the slot. `hermes` is main_wrapper.py, which sets what all
    of hermes's programs have. The API_SERVER_ variables are the default gateway's alone: two on one port would loop.
    """
    arguments = "gateway run --replace" if profile == "default" else f"-p {profile} gateway run --replace"
    lines = [
        "#!/command/with-contenv sh",
        "exec 2>&1",
        *FIND_HOME,
        'export HOME="$home" HERMES_HOME="$home" HERMES_S6_SUPERVISED_CHILD=1 HERMES_SUPERVISED_CHILD=1',
        f'case ":$PATH:" in *:{COMMAND_FOLDERS[0]}:*) ;; *) PATH="{COMMAND_FOLDERS[0]}:$PATH" ;; esac',
        'cd "$home" || cd /',
    ]
    if profile != "default":
        gone = f'{{ echo "{profile}: profiles/{profile} is no folder, so its gateway is parked"; exit {EX_CONFIG}; }}'
        folder = f'-d "$home/profiles/{profile}"'  # root may be refused what hermes is not, on NFS
        lines.append(f"[ {folder} ] || s6-setuidgid {USER} test {folder} || {gone}")
        lines.append("unset $(awk 'BEGIN { for (name in ENVIRON) if (name ~ /^API_SERVER_[A-Z0-9_]+$/) print name }')")
    lines += [f"export {name}={quoted(value)}" for name, value in sorted((extra_env or {}).items())]
    return "\n".join([*lines, *dropping(f"hermes {arguments}")]) + "\n"


def finish_script(profile: str) -> str:
    """Return a slot's finish: hermes_boot.py as hermes, see finish(). Not where that would find nothing to do, lest
    hundreds of gateways that end at once start hundreds of Pythons: at the container's end, and where s6 has noted less
    than five deaths, of 14 bytes, and none is left of the gateway's process group ($4)."""
    due = f'[ "$1" = {EX_CONFIG} ] || [ "$(wc -c <supervise/death_tally)" -ge {5 * 14} ] || kill -0 "-$4" 2>/dev/null'
    script = quoted(f'{due} || exit 0; exec {BOOT} finish {profile} "$@"')
    lines = ["#!/bin/sh", f"[ ! -e ../{ENDING} ] || exit 0", f"script={script}"]
    return "\n".join([*lines, *dropping('/bin/sh -c "$script" finish "$@"')]) + "\n"


def log_run_script(profile: str, *, to_folder: bool = True) -> str:
    """Return a slot's log/run: each line to the container's stderr, and with a timestamp to the profile's log
    folder, unless somebody has locked that: a logger that does not come up would stop its gateway."""
    folder = f'"$home/logs/gateways/{profile}"'
    lines = ["#!/command/with-contenv sh", OWN_STDERR, "exec 2>&1", TAKE_UMASK, *FIND_HOME]
    if to_folder:
        lines += [
            f'[ "$(id -u)" = 0 ] && set -- s6-setuidgid {USER} || set --',
            f'"$@" s6-setlock -n {folder}/lock true 2>/dev/null || {{',
            f'  echo "{profile}: logs/gateways/{profile} is locked or cannot be used,'
            " so its log goes to the container's alone; does another container use this volume? hermes-boot doctor\"",
            f'  ulimit -v {LOGGER_MEMORY}; exec "$@" s6-log 1',
            "}",
        ]
    logger = "s6-log 1" + (f" n10 s1000000 T {folder}" if to_folder else "")
    return "\n".join([*lines, f"ulimit -v {LOGGER_MEMORY}", *dropping(logger)]) + "\n"


def slot_files(profile: str, stop_timeout: int, extra_env: dict[str, str] | None, *, to_folder: bool) -> Files:
    """Return a slot's regular files but `down`, for the boot and for run time."""
    return {
        "type": ("longrun\n", 0o644),
        "run": (run_script(profile, extra_env), 0o755),
        "finish": (finish_script(profile), 0o755),
        "timeout-kill": (f"{stop_timeout * 1000}\n", 0o644),
        "timeout-finish": (f"{(BACK_OFF_LIMIT + 5) * 1000}\n", 0o644),
        "log/run": (log_run_script(profile, to_folder=to_folder), 0o755),
    }


def put(folder: Folder, name: str, text: str, mode: int) -> None:
    """Write a file of a slot that nobody reads yet, whole. Raises OSError."""
    data = os.fsencode(text)
    with Opened(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder.fd)) as file:
        if os.write(file.fd, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_skeleton(folder: Folder, path: str, group: int | None) -> None:
    """Make what s6-supervise would make for root alone: found ready and ours, it stays ours, so hermes can control
    its slots. With group, all is root's, and that group may write to the control FIFO."""
    os.mkdir(f"{path}supervise", 0o755, dir_fd=folder.fd)
    for name in ("event", "supervise/event"):
        os.mkdir(path + name, dir_fd=folder.fd)
        os.chmod(path + name, 0o3730, dir_fd=folder.fd)
    make_fifo(folder, f"{path}supervise/control", 0o660, 0o620, group)


def make_fifo(folder: Folder, name: str, mode: int, sealed_mode: int, group: int | None) -> None:
    """Make a FIFO of a slot, ours, or with group root's for that group to use."""
    os.mkfifo(name, 0o600, dir_fd=folder.fd)
    if group is not None:
        os.chown(name, -1, group, dir_fd=folder.fd)
    os.chmod(name, mode if group is None else sealed_mode, dir_fd=folder.fd)


def publish(scandir: Folder, name: str, files: Files, *, start: bool, group: int | None = None) -> None:
    """Put a slot into the scandir. One that is there, and perhaps runs, keeps its folder and its process."""
    found = scandir.stat(name)
    if found and stat.S_ISDIR(found.st_mode):
        return refresh(scandir, name, files, start=start, group=group)
    if found:
        scandir.remove(name)
    build(scandir, name, files, start=start, group=group)


def build(scandir: Folder, name: str, files: Files, *, start: bool, group: int | None = None) -> None:
    """Make a slot that is not there yet: built under a dot name, which s6-svscan ignores, then renamed into place. With
    group it stays ours, and is that group's to control."""
    temporary = f".{name}"[: 255 - len(".tmp")] + ".tmp"
    scandir.remove(temporary)  # a killed boot's
    os.mkdir(temporary, 0o755, dir_fd=scandir.fd)
    with Folder(temporary, scandir.fd) as slot:
        make_skeleton(slot, "", group)
        os.mkdir("log", 0o755, dir_fd=slot.fd)
        make_skeleton(slot, "log/", group)
        for path, (text, mode) in files.items():
            put(slot, path, text, mode)
        make_fifo(slot, "back-off", 0o600, 0o660, group)  # finish reads it
        if not start:
            put(slot, "down", "", 0o644)
    os.rename(temporary, name, src_dir_fd=scandir.fd, dst_dir_fd=scandir.fd)


def refresh(scandir: Folder, name: str, files: Files, *, start: bool, group: int | None = None) -> None:
    """Bring an existing slot's files up to date, each replaced whole; its process, if it has one, goes on. Takes no
    lock: who manages the slot has that."""
    wanted = dict(files) if start else files | {"down": ("", 0o644)}
    with scandir.folder(name) as slot:
        for path, (text, mode) in wanted.items():
            with slot.folder(os.path.dirname(path) or ".", make=True) as folder:
                file = os.path.basename(path)
                try:
                    current = folder.read(file, STATE_LIMIT)
                except OSError:
                    current = None
                if current != text.encode():
                    folder.replace(file, text.encode(), mode)
        if start and slot.stat("down"):
            slot.remove("down")
        if slot.stat("back-off") is None:
            make_fifo(slot, "back-off", 0o600, 0o660, group)


def tell(fifo: str, letters: bytes) -> None:
    """Write control letters to a FIFO that s6-supervise or s6-svscan reads, as s6-svc and s6-svscanctl do, never
    blocking. Raises OSError: ENXIO when nobody reads it."""
    with Opened(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)) as file:
        if not stat.S_ISFIFO(os.fstat(file.fd).st_mode):
            raise OSError(errno.EINVAL, "is not a FIFO")
        os.write(file.fd, letters)


def heard(fifo: str, letters: bytes = b"", *, unknown: bool = False) -> bool:
    """Write control letters; return whether somebody was there to read them, or unknown where we may not write."""
    try:
        tell(fifo, letters)
    except OSError as error:
        return unknown and isinstance(error, PermissionError)
    return True


def is_watched(scandir: str) -> bool:
    """Return whether the scandir is an s6-svscan's."""
    return os.path.exists(f"{scandir}/.s6-svscan/control")


def slot_limit(scandir: str) -> tuple[int, Fault]:
    """Return how many slots a scandir can hold, those that are there included, and why no more. Raises OSError."""
    if not is_watched(scandir):
        return sys.maxsize, FULL
    room, count = os.statvfs(scandir), sum(name.startswith(SLOT_PREFIX) for name in os.listdir(scandir))
    spare = room.f_bavail * room.f_frsize - SPARE_SPACE - count * SLOT_GROWTH
    limit = count + max(0, spare) // SLOT_SPACE if room.f_blocks else SLOT_LIMIT  # ramfs tells nothing
    return (SLOT_LIMIT, FULL) if limit >= SLOT_LIMIT else (limit, NO_SPACE)


def rescan(scandir: str, letters: bytes = b"a") -> None:
    """Let s6-svscan take up new slots (b"an": and let go of removed ones), where one watches this scandir."""
    if is_watched(scandir):
        try:
            tell(f"{scandir}/.s6-svscan/control", letters)
        except OSError as error:
            warn(f"s6-svscan does not take up what changed on {scandir} ({reason(error)}); restart the container")


def make_log_folder(home: Folder, profile: str) -> Fault | None:
    """Make the folder that s6-log writes a profile's log to; return why it cannot be used. A logger that never comes
    up would stop its gateway, once the pipe between them is full."""
    path = f"logs/gateways/{profile}"
    try:
        with home.folder(path, make=True) as folder:
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder.fd):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            for name in ("current", "lock", "state"):
                status = folder.stat(name)
                if status and not stat.S_ISREG(status.st_mode):
                    path += f"/{name}"
                    raise OSError(errno.EINVAL, "is not a regular file")
            if (folder.stat("current") or os.fstat(folder.fd)).st_uid != os.geteuid():
                with Opened(folder.open("current", os.O_WRONLY | os.O_CREAT, 0o744)) as log:
                    # s6-log has to, which is the owner's to do; CIFS shows its mount's user
                    os.fchmod(log.fd, stat.S_IMODE(os.fstat(log.fd).st_mode))
    except OSError as error:
        fix = "free some space" if is_full(error) else f"put plain folders there, {USER}'s own"
        return Fault(f"{path} {described(error)}, so its log goes to the container's alone", fix)
    return None


# Setup and reconcile
# --------------------------------------------------------------------------------------------------------------------

SETUP_FAILED = "/run/hermes-setup.failed"
RECONCILED = "/run/hermes-reconciled"  # by the setup's process; 02-reconcile-profiles, in the Dockerfile, looks for it
CONT_INIT, STATIC_SERVICES = "/etc/cont-init.d", "/etc/s6-overlay/s6-rc.d"
ASKED_LIMIT = 1 << 20  # bytes
OF_THE_RUNNER = ("s6-ipcserverd", "s6-sudod")  # what s6-rc's oneshot runner is made of
BOOT_LOG, BOOT_LOG_LIMIT = "container-boot.log", 256 << 10
CAPABILITIES = {  # by their number in capabilities(7): the name, and what falls without it, "" for the boot
    0: ("CHOWN", "no gateway runs"),
    1: ("DAC_OVERRIDE", ""),
    3: ("FOWNER", "some of hermes's files may stay unreadable"),
    5: ("KILL", "nothing of hermes's can be stopped"),
    6: ("SETGID", ""),
    7: ("SETUID", ""),
}


def check_capabilities(boot: Boot) -> None:
    """Say which capabilities root lacks; Fatal where no gateway can run."""
    with open("/proc/self/status", "rb") as file:
        effective = next((int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:")), -1)
    missing = dict(each for number, each in CAPABILITIES.items() if not effective >> number & 1)
    if "" in missing.values():
        them = " and ".join(missing)
        raise Fatal(f"root lacks {them}; add with --cap-add, or start with `--user {boot.owner[0]}:{boot.owner[1]}`")
    for name, what in missing.items():
        warn(f"root lacks {name}, so {what}; add it with --cap-add")


def setup(boot: Boot) -> int:
    """Remap, own, seed and migrate. Raises Fatal for what the boot cannot work around."""
    euid, image_owner = os.geteuid(), boot.owner
    if euid == 0:
        check_capabilities(boot)
    if euid not in (0, boot.owner[0]):
        raise Fatal(
            f"started as UID {euid}, which is not {USER}'s; drop `--user` and set HERMES_UID={euid}"
            f" HERMES_GID={os.getegid()}, or use `--user {boot.owner[0]}`, or any UID with GID 0 on a volume that"
            f" group 0 may write{rootless_advice(boot.owner)}"
        )
    check_settings(boot)
    for fault in mount_faults(boot):
        warn(fault)
    remap(boot)
    read_secrets(boot)
    if not boot.dry_run:
        close_environment(boot)
    if euid != 0 and switch(boot.setting("HERMES_SEALED")) and not is_sealed(boot.environment):
        warn("HERMES_SEALED seals nothing here: without root, nothing in this container is root's; unset it")
    boot.announce(f"run as {boot.owner[0]}:{boot.owner[1]}")
    if euid == 0:
        follow_home(boot)
        join_groups(boot)
    elif not boot.dry_run:
        who = f"UID {euid} with GID 0" if boot.owner[1] == 0 else f"{USER} itself"
        boot.announce(f"started as {who}, so owners, groups and services stay as they are")
    make_home(boot)
    if boot.dry_run and not os.path.isdir(boot.home):
        return 0  # on a volume that is still to be made
    if euid == 0:
        own_volume(boot)
    reader = image_owner if boot.dry_run else boot.owner  # a dry run has not given the volume to the new one
    code = as_owner(reader, seed, boot)
    if code not in (0, OVERDUE, TO_MIGRATE):
        return code
    sync_skills(boot)
    failed = run_helper([BOOT, "migrate"], program_environment(boot.environment)) if code == TO_MIGRATE else 0
    if failed > 1:  # else it has said why
        warn(f"the configuration was not migrated as a whole (code {failed}); the next boot goes on with it")
    return 0


def close_environment(boot: Boot) -> None:
    """Keep the container's environment, which has its keys, from everybody but root and hermes. s6-overlay opens that
    folder at its start, and reads it as root; with S6_KEEP_ENV=1 there is another."""
    for path in (CONTAINER_ENVIRONMENT, "/run/s6/basedir/env"):
        try:
            with trusted_folder(path) as folder:
                if folder.is_roots() != (os.geteuid() == 0):
                    continue  # root has done it, or cannot
                for name in [*os.listdir(folder.fd), "."]:
                    if os.geteuid() == 0:
                        os.chown(name, 0, boot.owner[1], dir_fd=folder.fd, follow_symlinks=False)
                    os.chmod(name, 0o750 if name == "." else 0o640, dir_fd=folder.fd)
        except FileNotFoundError:
            pass  # no container of ours
        except OSError as error:
            warn(f"{path} {described(error)}, so every user of the container can read its environment")


def setup_phase(boot: Boot) -> int:
    """Run the setup; until it has done well a file says so to the reconciler, which s6-overlay runs regardless."""
    if boot.dry_run or not supervised():  # nothing of ours is written outside of a container of ours
        return guarded(setup, boot)
    if not read_pid_file(COMMAND_PROCESS):  # at a boot, not by `docker exec`
        mark(SETUP_FAILED, there=True)
        try:
            os.chmod("/run/s6-rc/lock", 0o600)  # who can read it can lock it, and s6-rc would wait at the end
        except OSError:
            pass  # no s6-rc, or not root
    code = guarded(setup, boot)
    if code == 0:
        mark(SETUP_FAILED, there=False)
    return code


def reconciles_too(boot: Boot) -> bool:
    """Return whether the setup may do the reconciler's work in one go, which saves the start of a Python: at a boot,
    where no script of somebody's comes between the two."""
    scripts = names_in(CONT_INIT)
    later = scripts[scripts.index("01-hermes-setup") + 1 :] if "01-hermes-setup" in scripts else []
    return is_cont_init(boot) and supervised() and later[:1] == ["02-reconcile-profiles"]


def is_cont_init(boot: Boot) -> bool:
    """Return whether this is one of the boot's scripts: s6-rc tells its oneshots their name."""
    return boot.setting("RC_NAME") == "legacy-cont-init"


def end_boot() -> int:
    """End a boot that is under way, within two seconds: first what would go on to the container's command, then the
    scripts, by SIGTERM and a second later by SIGKILL. The container's exit code is then 143. s6-overlay's rc.shutdown,
    which waits for the end of a boot, calls this first: see the Dockerfile."""
    top, children = read_pid_file(SUPERVISOR_PROCESS) or 1, families()
    near = [child for parent in (top, *children.get(top, [])) for child in children.get(parent, [])]
    found = {os.path.basename(word): process for process in reversed(near) for word in command_of(process)[1]}
    init, runner = found.get(b"rc.init"), found.get(b"s6rc-oneshot-runner", -1)
    if not init:
        return 0
    set_exit_code(128 + SIGTERM)
    for process in [init, *children.get(init, [])]:  # rc.init, and s6-rc, which ends once its scripts have
        send(process, SIGTERM)
    told: list[int] = []  # some are PID 1's children, once their parents have ended
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline + 1:
        # Parents first: else s6-overlay's script, which waits for one of these, goes on with the next one.
        seen = {process: command_of(process) for process in [*told, *descendants(runner)] if process != os.getpid()}
        left = [process for process, (name, words) in seen.items() if words and name not in OF_THE_RUNNER]
        if not left:
            break
        over = time.monotonic() >= deadline
        for process in left:
            if over or process not in told:
                send(process, SIGKILL if over else SIGTERM)
        told = left
        time.sleep(0.05)
    return 0


def command_of(process: int) -> tuple[str, list[bytes]]:
    """Return a process's name and the words of its command line, empty when it has ended."""
    try:
        name = content(f"/proc/{process}/comm").decode(errors="replace").rstrip("\n")
        return name, content(f"/proc/{process}/cmdline", MOST_WORDS).split(b"\0")[:-1]
    except OSError:
        return "", []


def mark(path: str, *, there: bool) -> None:
    """Make or remove a file in /run that one of the boot's scripts leaves for the next."""
    try:
        if there:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644))
        elif os.path.lexists(path):
            os.unlink(path)
    except OSError as error:
        warn(f"{path} {described(error)}; make /run writable")


def no_gateways(boot: Boot, command: list[str]) -> str:
    """Return why this container has none, "" when it has. Two with slots on one volume fight for its log folders."""
    if switch(boot.setting("HERMES_RECONCILE")) is False:
        return "HERMES_RECONCILE is off"
    return "this one's command is the dashboard" if profile_option(command)[1][:1] == ["dashboard"] else ""


def reconcile_phase(boot: Boot) -> int:
    """Give every profile a slot, as hermes, after handing it the scandir."""
    if supervised() and os.path.exists(SETUP_FAILED):
        if os.path.basename(sys.argv[0]) not in ROLES:  # at a boot the setup has just said why
            say("error", f"the last setup failed ({SETUP_FAILED}); run `hermes-boot setup`, or restart the container")
        return 1
    command = container_words()
    if why := no_gateways(boot, command):
        if boot.announce(f"leave the gateways alone, since {why}") and os.geteuid() == 0:
            own_static_services(boot, whole=False)
        return 0
    if boot.dry_run:
        there = os.path.isdir(boot.home)  # else the setup would make it first
        return as_owner(boot.owner, reconcile, boot, command) if there else 0
    if boot.sealed and boot.scandir != SCANDIR:
        raise Fatal(f"HERMES_SEALED cannot seal S6_PROFILE_GATEWAY_SCANDIR={boot.scandir!r}; unset one of the two")
    own_services(boot)
    if boot.sealed:
        code, wanted = asked_by_hermes(boot, reconcile, command)
        publish_for_hermes(boot, wanted)
    else:
        code = as_owner(boot.owner, reconcile, boot, command)
    return 0 if code in (OVERDUE, 128 + SIGKILL) else code  # what it has done stays


def asked_by_hermes(boot: Boot, action: Callable[..., int], *arguments: object) -> tuple[int, Asked]:
    """Run an action as hermes that asks for slots, by ask_for; return its exit code and what it has asked for. That is
    checked, and is all that root takes from hermes."""
    name = f".asked.{os.getpid()}"
    with trusted_folder(boot.scandir) as scandir:
        asked = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=scandir.fd)
        scandir.unlinked(name)  # not a pipe: one of this size the kernel may refuse a root with few capabilities
    code = as_owner(boot.owner, action, boot, *arguments, asked)
    data = os.pread(asked, ASKED_LIMIT, 0)
    os.close(asked)
    lines = (line.partition(" ") for line in data.decode("ascii", "replace").splitlines())
    wanted = {name: ("start" in flags, "log" in flags) for name, _, flags in lines if not name_fault(name)}
    return code, dict([*wanted.items()][:SLOT_LIMIT])


def ask_for(output: int, profile: str, *, start: bool, to_folder: bool) -> None:
    """As hermes: ask root for a slot."""
    os.write(output, f"{profile} {'start' if start else ''} {'log' if to_folder else ''}\n".encode())


def publish_for_hermes(boot: Boot, wanted: Asked) -> None:
    """As root: publish the slots that hermes has asked for, so that hermes can control them and nothing more."""
    timeout = seconds(boot.environment, STOP_TIMEOUT)
    with trusted_folder(boot.scandir) as scandir:
        for profile, (start, to_folder) in wanted.items():
            name, files = SLOT_PREFIX + profile, slot_files(profile, timeout, None, to_folder=to_folder)
            try:
                publish(scandir, name, files, start=start, group=boot.owner[1])
            except OSError as error:
                fix = "give root the capability CHOWN" if error.errno == errno.EPERM else "make space in /run"
                say("error", f"{profile}: its slot could not be made ({reason(error)}); {fix}")
    if not is_cont_init(boot):
        rescan(boot.scandir)


def own_services(boot: Boot) -> None:
    """Let hermes publish slots at run time, by the scandir and s6-svscan's control FIFO, unless that is sealed; what is
    root's there stays so. And let it control the static services."""
    try:
        folder = trusted_folder(boot.scandir, make=True)
    except OSError as error:
        text = f"the scandir {shown(boot.scandir)} {described(error)}, so no gateway can run"
        raise Fatal(f"{text}; make it a writable folder") from error
    with folder as scandir:
        if os.geteuid() != 0:
            return
        try:
            os.fchown(scandir.fd, 0, 0 if boot.sealed else boot.owner[1])
            os.fchmod(scandir.fd, 0o755 if boot.sealed else 0o1775)
            if not boot.sealed:
                with scandir.folder(".s6-svscan") as svscan:
                    svscan.unlinked(os.path.basename(ENDING))  # where the scandir outlives the container
                    os.fchmod(svscan.fd, 0o755)  # an s6-svscan that is not s6-overlay's makes it 0700
                    let_write(boot, svscan, "control")
        except FileNotFoundError:
            pass  # no s6-svscan watches it
        except OSError as error:
            text = f"the scandir {shown(boot.scandir)} {described(error)}"
            warn(f"{text}, so no gateway can be added; give root the capability CHOWN (--cap-add)")
    own_static_services(boot, whole=not boot.sealed)


def let_write(boot: Boot, folder: Folder, fifo: str) -> None:
    """Let hermes write to a FIFO that is root's, and to nothing else that may be in its place. Raises OSError."""
    with Opened(os.open(fifo, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder.fd)) as file:
        status, path = os.fstat(file.fd), f"/proc/self/fd/{file.fd}"
        if stat.S_ISFIFO(status.st_mode) and status.st_uid == 0 and status.st_nlink == 1:
            os.chown(path, 0, boot.owner[1])
            os.chmod(path, 0o620)


def own_static_services(boot: Boot, *, whole: bool) -> None:
    """Let hermes see the image's static services, and control them, main-hermes excepted, which only waits.

    Their supervise folders stay root's, since who owns one can make s6-supervise, which is root, write through a link.
    So can who may write to event/, where others wait for s6's word: hermes can only where it has the scandir too.
    """
    for name in names_in(STATIC_SERVICES):
        try:
            with (
                Folder(f"/run/s6-rc/servicedirs/{name}") as service,
                service.folder("supervise") as supervise,
                service.folder("event") as event,
            ):
                if os.fstat(supervise.fd).st_uid != 0:
                    continue
                os.fchmod(supervise.fd, 0o711)
                if name != "main-hermes":
                    let_write(boot, supervise, "control")
                if whole:
                    os.fchown(event.fd, 0, boot.owner[1])
                    os.fchmod(event.fd, 0o3730)
        except OSError:
            continue  # a bundle or a oneshot, or none of this container's


def take_timezone(environment: dict[str, str]) -> None:
    """Have dates in the container's timezone, as s6-log's and the boot log's are."""
    if "TZ" in environment:
        os.environ["TZ"] = environment["TZ"]
        time.tzset()


def reconcile(boot: Boot, command: list[str], output: int | None = None) -> int:
    """As hermes: find the profiles, publish their slots, or with output ask root to, say and log a line for each."""
    take_umask(boot.environment)
    take_timezone(boot.environment)
    with open_home(boot) as home:
        running = run_profile(boot, command, home)
        if boot.dry_run:
            for profile in list_profiles(boot, home, running):
                profile.prior_exit = ""
                verb = "skip" if profile.action == "skipped" else "publish"
                boot.announce(f"{verb}: {profile.line().split(' ', 1)[1].rstrip()}")
            return 0
        lines, (chosen, full) = [], most_wanted(boot, home, running)
        with Folder(boot.scandir, follow=True) as scandir:
            timeout = seconds(boot.environment, STOP_TIMEOUT)
            for profile, folder in open_profiles(boot, home, running):
                if folder and (chosen is None or profile.name in chosen):
                    register(home, folder, scandir, profile, timeout, output)
                elif folder:
                    profile.action, profile.fault = "skipped", full
                lines.append(profile.line())
        log_boot(boot, home, lines)
        # In sealed mode root does; of s6-overlay's scandir the service hermes-gateways, after cont-init.
        if output is None and not (is_cont_init(boot) and boot.scandir == SCANDIR):
            rescan(boot.scandir)
    return 0


def most_wanted(boot: Boot, home: Folder, running: str | None) -> tuple[set[str] | None, Fault]:
    """Return the profiles that get a gateway where there are more than fit, and why no more do: first default, then
    those that have a slot, then the others; of each those that start first, in name order. None when all fit."""
    limit, full = slot_limit(boot.scandir)
    try:
        with home.folder("profiles") as profiles:
            if len(profile_names(profiles)) < limit:
                return None, full
    except OSError:
        return None, full
    found = [profile for profile in list_profiles(boot, home, running) if profile.action != "skipped"]
    slots = {name.removeprefix(SLOT_PREFIX) for name in os.listdir(boot.scandir)}
    found.sort(key=lambda each: (each.name != "default", each.name not in slots, each.action != "started"))
    return {profile.name for profile in found[:limit]}, full


def register(home: Folder, folder: Folder, scandir: Folder, profile: Profile, timeout: int, output: int | None) -> None:
    """Publish one profile's slot, or with output ask root to; what hinders it or its log becomes its reason."""
    try:
        name = SLOT_PREFIX + profile.name
        status = slot_status(f"/proc/self/fd/{scandir.fd}/{name}")
        if status and status.up:  # these files are a living process's
            profile.prior_exit = ""
        else:
            profile.fault = clean_profile(folder) or profile.fault
        log_fault = make_log_folder(home, profile.name)
        profile.fault = profile.fault or log_fault
        start = profile.action == "started"
        if output is not None:
            return ask_for(output, profile.name, start=start, to_folder=not log_fault)
        publish(scandir, name, slot_files(profile.name, timeout, None, to_folder=not log_fault), start=start)
    except OSError as error:
        profile.action = "skipped"
        fix = "make the scandir writable for hermes, with space left"
        profile.fault = Fault(f"its slot could not be made ({reason(error)})", fix)


def log_boot(boot: Boot, home: Folder, lines: list[str]) -> None:
    """Write the boot's lines to stderr and to logs/container-boot.log, rotated once it is over BOOT_LOG_LIMIT."""
    if not boot.quiet:
        write_error("".join(lines))
    try:
        with home.folder("logs", make=True) as logs:
            found = logs.stat(BOOT_LOG)
            if found and stat.S_ISREG(found.st_mode) and found.st_size >= BOOT_LOG_LIMIT:
                os.rename(BOOT_LOG, f"{BOOT_LOG}.1", src_dir_fd=logs.fd, dst_dir_fd=logs.fd)
            with open(logs.open(BOOT_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), "wb") as file:
                file.write("".join(lines).encode())
    except OSError as error:
        warn(f"logs/{BOOT_LOG} {described(error)}; this boot is only on stderr")


# ====================================================================================================================
# RUNNING
# ====================================================================================================================


# What s6 knows
# --------------------------------------------------------------------------------------------------------------------

TAI_OFFSET = (1 << 62) + 37  # s6 counts TAI seconds since 1970, 37 ahead of UTC since 2017
MOST_DEATHS = 100  # that s6 remembers, unless told otherwise
RESTART_WINDOW = 60  # seconds that a run has to last to be none of a crash loop's
DIED_TOO_OFTEN = "died too often"
BOOTING = "the boot is not over; wait until it is (`docker logs`), then repeat this"
PERMANENT_FAILURE = 125  # s6's word from a finish script for "do not restart"
START_GRACE = 10  # seconds that a wanted gateway may be down, and after which one that is up has come up to stay


def is_booting() -> bool:
    """Return whether the boot of this container is under way: s6-rc is at work, and the command has not started."""
    if os.path.exists(COMMAND_PROCESS) or not supervised():
        return False
    return any(command_of(int(name))[0] == "s6-rc" for name in os.listdir("/proc") if name.isdigit())


def supervisor_answers(scandir: str) -> bool:
    """Return whether an s6-svscan watches the scandir; its FIFO is root's alone if sealed, or without gateways."""
    fifo = f"{scandir}/.s6-svscan/control"
    return heard(fifo) or (heard(fifo, unknown=True) and supervised())


def is_ours(slot: str, profile: str) -> bool:
    """Return whether a slot is as we make it: hermes-agent's own manager has another finish, and no back-off."""
    try:
        return read_plain(f"{slot}/finish") == finish_script(profile).encode()
    except OSError:
        return False


def is_supervised(slot: str) -> bool:
    """Return whether an s6-supervise reads a slot's control FIFO."""
    return heard(f"{slot}/supervise/control")


class SlotStatus:
    """What s6-supervise says of a slot in supervise/status. s6 2.12 put a process group in between; what is read here
    has kept its place, from the start and from the end."""

    def __init__(self, data: bytes) -> None:
        flags = data[-1]
        self.since = moment_of(data)
        self.pid = int.from_bytes(data[24:32])  # 0: none
        self.ended = int.from_bytes(data[-3:-1])  # a wait status, see wait(2)
        self.finishing, self.wanted = bool(flags & 2), bool(flags & 4)
        self.up = self.pid != 0 and not self.finishing  # whether the gateway itself runs


def moment_of(data: bytes) -> float:
    """Return the time that a record of s6's begins with, in seconds since 1970."""
    return int.from_bytes(data[:8]) - TAI_OFFSET + int.from_bytes(data[8:12]) / 1e9


def slot_status(slot: str) -> SlotStatus | None:
    """Return what s6 knows of a slot, None when no s6-supervise watches it. A process for each of hundreds of slots,
    s6-svstat, would take half a second."""
    if not heard(f"{slot}/supervise/control", unknown=True):  # main-hermes's is root's alone
        return None
    try:
        data = read_plain(f"{slot}/supervise/status")
    except OSError:
        return None
    return SlotStatus(data) if len(data) >= 35 else None


def deaths(slot: str) -> list[tuple[float, int]]:
    """Return the last deaths in a slot, oldest first: when, in seconds since 1970, and the wait status."""
    try:
        data = read_plain(f"{slot}/supervise/death_tally")
    except OSError:
        return []
    records = [data[start : start + 14] for start in range(0, len(data) - 13, 14)]
    return [(moment_of(record), int.from_bytes(record[12:])) for record in records]


def death_times(slot: str, tally: list[tuple[float, int]] | None = None) -> list[float]:
    """Return when the last deaths in a slot were, in seconds since 1970, after an operator's last start, since what the
    operator ended is in no crash loop; that start's time is the FIFO back-off's. tally is deaths(), where known. What
    is yet to come, by a clock that was set back or hermes's word, is none."""
    try:
        started = os.stat(f"{slot}/back-off", follow_symlinks=False).st_mtime
    except OSError:
        started = 0.0  # a logger's, or a slot that hermes-agent made
    return [moment for moment, _ in (deaths(slot) if tally is None else tally) if started < moment < time.time() + 1]


def back_off(times: list[float]) -> int:
    """Return how long finish waits after the last of these deaths, in seconds: 2, 4, 8 ... BACK_OFF_LIMIT from the
    fifth in a row on, which a run ends that has lasted a minute longer than the wait before it."""
    delay, row, last = 0, 0, float("-inf")
    for now in times:
        row = row + 1 if now - last <= delay + RESTART_WINDOW else 1
        delay = min(2 ** (row - 4), BACK_OFF_LIMIT) if row > 4 else 0
        last = now
    return delay


def is_looping(status: SlotStatus, times: list[float]) -> bool:
    """Return whether these deaths are a crash loop now; a gateway that is up for longer than its last run, and than
    START_GRACE, is in none."""
    delay, now = back_off(times), time.time()
    if not delay or now - times[-1] > delay + RESTART_WINDOW:
        return False
    last_run = times[-1] - times[-2] - back_off(times[:-1])
    return not status.up or now - status.since <= max(START_GRACE, last_run)


def stray_supervisors(scandir: str) -> list[str]:
    """Return the names of the slots and loggers, `gateway-NAME` and `gateway-NAME/log`, that have a supervisor too
    many: somebody has removed or replaced their folder, and s6-svscan was not told to let go of the old one's. An
    orphan of hermes's that has such a command line is none: it is not the supervisor's user's."""
    children, fallback = families(), 0 if s6_is_pid_1() else read_pid_file(SUPERVISOR_PROCESS) or -1
    svscans = children.get(fallback, []) if fallback else [1]
    strays, seen, user = [], set(), owner_of(f"/proc/{fallback or 1}")
    for process in [child for svscan in svscans for child in children.get(svscan, [])]:
        ours = owner_of(f"/proc/{process}") == user
        program, name = [*map(os.fsdecode, command_of(process)[1] if ours else []), "", ""][:2]
        if program == "s6-supervise" and name.startswith(SLOT_PREFIX):
            if name in seen or not os.path.isdir(f"{scandir}/{name}"):
                strays.append(name)
            seen.add(name)
    return strays


def let_go(scandir: str, left: Callable[[], list[str]], timeout: float) -> bool:
    """Have s6-svscan end the supervisors of a slot that is gone; return whether they have ended. left says which have
    not: "" the gateway's, which has timeout seconds, and "/log" the logger's. That ends with the last writer of its
    pipe; where a child of the gateway's has kept that, a second is enough."""
    rescan(scandir, b"an")
    until(lambda: "" not in left(), timeout)
    if not until(lambda: not left(), 1):
        rescan(scandir, b"aN")
    return until(lambda: not left(), 5)


def end_group(group: str) -> None:
    """End what a gateway has left in its process group: its helpers, which would keep its pipes and ports. What it has
    started in groups of their own (terminals, background commands) may outlive it, and is the next start's to find."""

    def left() -> bool:
        try:
            os.killpg(int(group), 0)
        except OSError:
            return False
        return True

    for number in (SIGTERM, SIGKILL) if number_in(group, 2, 1 << 22) else ():
        if left():  # else the number may be another's by now
            send(-int(group), number)
            until(lambda: not left(), 1)


def finish(profile: str, code: str, group: str = "") -> int:
    """Be a slot's finish, as hermes, in the slot: park after EX_CONFIG, wait after many deaths, else return at once.
    profile is a name for the log; code is the exit code of run, 256 when a signal ended it; group is its process group,
    which s6 names since 2.12. What waits reads the FIFO back-off, so whoever opens that for writing ends the wait."""
    end_group(group)
    if code == str(EX_CONFIG):
        return PERMANENT_FAILURE
    status, delay = slot_status("."), back_off(death_times("."))
    if not delay or status is None or not status.wanted:
        return 0
    print(f"{profile}: {DIED_TOO_OFTEN}, waiting {delay} s before the next start", flush=True)
    wait = f"timeout {delay} cat back-off >/dev/null; exit 0"
    return execute(["/bin/sh", "-c", wait], process_environment())


# The service manager
# --------------------------------------------------------------------------------------------------------------------


class GatewayError(Exception):
    """What kept the manager from doing what it was asked; exit_code is the command line's."""

    exit_code = 1


class NotRegistered(GatewayError):
    """There is no slot for this profile."""

    exit_code = 4


class AlreadyRegistered(GatewayError, ValueError):
    """There is a slot for this profile already."""


class InvalidName(GatewayError, ValueError):
    """The name cannot be a profile's."""

    exit_code = 2


class CommandFailed(GatewayError):
    """What s6 was to bring about did not come about in time."""


class S6ServiceManager:
    """Starts, stops, publishes and removes the gateways' slots, as hermes.

    scandir is s6-svscan's, home the root HERMES_HOME; both default to the container's. Names of services may have the
    prefix `gateway-` or not. Works on slots of its own and on those that hermes-agent's manager made. Timeouts are in
    seconds. Raises GatewayError, by its kinds: NotRegistered, AlreadyRegistered, InvalidName, CommandFailed.
    """

    def __init__(
        self, scandir: str | None = None, home: str | None = None, *, environment: dict[str, str] | None = None
    ) -> None:
        self.environment = environment = container_environment() if environment is None else environment
        self.home = home or root_home(environment)
        self.scandir = str(scandir or scandir_of(environment))
        self.stop_timeout = seconds(environment, STOP_TIMEOUT)
        self.patience = self.stop_timeout + 5  # seconds to wait for an end: a little longer than until s6 kills

    # Names

    def slot(self, name: str) -> str:
        """Return the path of a registered gateway's slot."""
        profile = self.valid(name)
        path = f"{self.scandir}/{SLOT_PREFIX}{profile}"
        if not os.path.isdir(path):
            raise NotRegistered(self.unknown(profile))
        return path

    def own_slot(self, name: str) -> str:
        """Return the path of a slot that we may control."""
        slot = self.slot(name)
        control = f"{slot}/supervise/control"
        if os.path.exists(control) and not os.access(control, os.W_OK):
            raise CommandFailed(f"{name}: UID {os.geteuid()} may not control it; run this as {USER} or root")
        return slot

    def valid(self, name: str) -> str:
        """Return the profile that a name is about: itself where it has a slot, else what follows `gateway-`."""
        bare = name.removeprefix(SLOT_PREFIX)
        paths = f"{self.scandir}/{SLOT_PREFIX}{name}", f"{self.home}/profiles/{name}"
        exact = any(map(os.path.isdir, paths)) or name_fault(bare)
        profile = name if exact and not name_fault(name) else bare
        if fault := name_fault(profile):
            raise InvalidName(f"{shown(profile)}: {fault.text}")
        return profile

    def unknown(self, profile: str) -> str:
        """Return the message for a profile without a slot, with what to do: register it, or mean the nearest name."""
        import difflib

        names, text = self.list_profile_gateways(), f"no such gateway: {profile}; "
        if is_booting():
            return f"{text}{BOOTING}"
        if not names:
            return f"{text}this container has none, and `hermes-boot doctor` says why"
        try:
            with self.profile_folder(profile) as folder:
                fault = None if profile == "default" else soul_fault(folder)
                return text + str(fault or f"its profile has no slot yet: `hermes-boot gateway register -p {profile}`")
        except FileNotFoundError:
            pass  # no such profile either
        except OSError as error:
            return f"{text}it has no slot, and profiles/{profile} {described(error)}"
        if near := difflib.get_close_matches(profile, names, 1):
            return f"{text}did you mean {near[0]}?"
        return f"{text}`hermes-boot status` lists them, `hermes profile create {profile}` makes a new one"

    def list_profile_gateways(self) -> list[str]:
        """Return the profiles with a slot, in name order; folders that hermes gave any other name are none."""
        slots = [name for name in names_in(self.scandir) if name.startswith(SLOT_PREFIX)]
        return [profile for slot in slots if not name_fault(profile := slot.removeprefix(SLOT_PREFIX))]

    # State

    def is_running(self, name: str) -> bool:
        """Return whether a gateway's process is up, by s6."""
        if (status := slot_status(self.slot(name))) is None:
            raise CommandFailed(f"{name}: no supervisor answers; run `hermes-boot doctor`")
        return status.up

    def record(self, name: str, desired: str) -> None:
        """Write the intent to a profile's state file, keeping all other keys."""
        import json

        profile = self.valid(name)

        def edit(data: bytes | None) -> bytes:
            intent = {"desired_state": desired}
            try:
                state = load_state(data) if data else {}
                if data and state.get("desired_state") == desired:
                    return data
                text = json.dumps(state | intent)
            except (ValueError, RecursionError):
                folder.replace(f"{STATE_FILE}.bad", data or b"", 0o600)
                warn(f"{STATE_FILE} of {profile} was no JSON object, and starts anew; the old one is {STATE_FILE}.bad")
                text = json.dumps(intent)
            return text.encode() + b"\n"

        try:
            with self.profile_folder(profile) as folder:
                folder.update(STATE_FILE, edit, STATE_LIMIT)
        except FileNotFoundError:
            return  # a slot whose profile is gone has no intent to keep
        except OSError as error:
            what = f"{STATE_FILE} {described(error)}, so the next boot will not know; repair that, then repeat"
            raise CommandFailed(f"{profile}: done, but {what}") from error

    def state_of(self, profile: str) -> dict[str, object]:
        """Return a profile's state, empty where it has none that can be read."""
        try:
            with self.profile_folder(profile) as folder:
                return read_state(folder)[0]
        except OSError:
            return {}

    def profile_folder(self, profile: str) -> Folder:
        """Open a profile's folder."""
        with Folder(self.home, follow=True) as home:
            return profile_folder(home, profile)

    def announce_stop(self, profile: str) -> None:
        """Tell the gateway that the SIGTERM to come is meant: hermes-agent then ends with code 0 and says so in its
        log. It ends without the signal too, within 0.5 s, so s6 must hear of it at once."""
        try:
            status = slot_status(f"{self.scandir}/{SLOT_PREFIX}{profile}")
            pid = status.pid if status else 0
            written = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
            words = f'"target_pid": {pid}, "target_start_time": {int(start_time(pid))}, "stopper_pid": {os.getpid()}'
            marker = f'{{{words}, "written_at": "{written}"}}\n'  # by hand: json takes as long as the whole stop
            with self.profile_folder(profile) as folder:
                folder.replace(".gateway-planned-stop.json", marker.encode(), 0o644, sync=False)  # waits for no lock
        except OSError:
            pass  # not up, or no profile: then there is nobody to tell

    # Life

    def start(self, name: str, *, timeout: float | None = None) -> None:
        """Start one gateway and record that."""
        self.raise_first(self.carry_out("start", [name], timeout))

    def stop(self, name: str, *, timeout: float | None = None) -> None:
        """Stop one gateway and record that; s6 kills it after its timeout-kill."""
        self.raise_first(self.carry_out("stop", [name], timeout))

    def restart(self, name: str, *, timeout: float | None = None) -> None:
        """Stop and start one gateway, recording that it should run; timeout is for each of the two."""
        self.raise_first(self.carry_out("restart", [name], timeout))

    def raise_first(self, failures: dict[str, GatewayError]) -> None:
        """Raise the failure of a single gateway's command."""
        for error in failures.values():
            raise error

    def carry_out(self, action: str, names: list[str], timeout: float | None = None) -> dict[str, GatewayError]:
        """Start, stop or restart gateways, all at once, and record the intent; return what failed, by name. A start
        publishes slots that are missing.

        One command at a time works on a gateway, so the intent is the last one's. It is written as soon as s6 has been
        told, and once more at the end: the agent writes the same file without our lock, and may have put back what it
        read before. An intent that cannot be written is a failure, but the steps are taken all the same.
        """
        desired = "stopped" if action == "stop" else "running"
        failures: dict[str, GatewayError] = {}
        checks = [self.publish_missing, self.own_slot] if action == "start" else [self.own_slot]
        known = [name for name in dict.fromkeys(names) if all(self.tried(failures, name, check) for check in checks)]
        locks = self.lock_all(known, self.patience + 10, failures)  # what a restart may take

        def able() -> list[str]:
            return [name for name in known if name not in failures]

        try:
            for name in able() if desired == "running" else ():
                self.tried(failures, name, self.make_ours)
            for letters in {"start": (b"U",), "stop": (b"D",), "restart": (b"dU", b"U")}[action]:
                failures |= self.bring(able(), letters, timeout=timeout, desired=desired)
            return failures | self.record_all(able(), desired)
        finally:
            for lock in locks:
                lock.__exit__()

    def lock_all(self, names: list[str], timeout: float, failures: dict[str, GatewayError]) -> list[Lock]:
        """Keep other commands from gateways; return the locks. All of them together are waited for timeout seconds."""
        locks, deadline = [], time.monotonic() + timeout
        for name in sorted(names):
            try:
                with Folder(self.slot(name)) as slot:
                    locks.append(Lock(slot, timeout=max(0, deadline - time.monotonic())).__enter__())
                if not locks[-1].held:  # by hermes then, who can lock what it can read: the operator's word counts
                    warn(f"{name}: somebody has locked its slot for {timeout:g} s, longer than any command; going on")
            except (OSError, GatewayError) as error:
                failures[name] = CommandFailed(f"{name}: its slot cannot be used: {error}")
        return locks

    def tried(
        self, failures: dict[str, GatewayError], name: str, action: Callable[..., object], *arguments: object
    ) -> bool:
        """Return whether an action on a gateway succeeds; keep what it raises."""
        try:
            action(name, *arguments)
        except GatewayError as error:
            failures[name] = error
        return name not in failures

    def record_all(self, names: list[str], desired: str) -> dict[str, GatewayError]:
        """Record the intent for gateways; return what failed, by name."""
        failures: dict[str, GatewayError] = {}
        at_once(lambda name: self.tried(failures, name, self.record, desired), names)
        return {name: failures[name] for name in names if name in failures}

    def bring(
        self, names: list[str], letters: bytes, *, timeout: float | None, desired: str = ""
    ) -> dict[str, GatewayError]:
        """Tell s6 to bring slots up (U) or down (D), or down and then up by itself (dU), all in parallel, record what
        is desired, if anything, and wait until s6 has done it, for dU the first half, timeout seconds at most; return
        what failed, by name. A supervisor that is not there yet is waited for: s6-svscan takes seconds for hundreds."""
        up = letters == b"U"
        timeout = timeout if timeout is not None else START_TIMEOUT if up else self.patience
        waiting = {name: f"{self.scandir}/{SLOT_PREFIX}{self.valid(name)}" for name in names}
        untold = set(names)
        failures: dict[str, GatewayError] = {}
        began, deadline = time.time(), time.monotonic() + timeout
        progress = Progress(first=2 if len(names) > 1 else 10)
        aim = "come up" if up else "end"
        while waiting:
            for name in sorted(untold):
                if not up:
                    self.announce_stop(self.valid(name))
                if self.told(waiting[name], letters):
                    untold.discard(name)
            if desired:
                self.record_all(names, desired)
                desired = ""
            for name, slot in [*waiting.items()]:
                heard(f"{slot}/back-off")  # wakes a finish that waits
                told = name not in untold or not os.path.isdir(slot)  # or removed by somebody
                if told and self.settled(name, letters, began, failures):
                    untold.discard(name)
                    del waiting[name]
            if not waiting or time.monotonic() > deadline or (untold and not supervisor_answers(self.scandir)):
                break
            some = ", ".join([*waiting][:3]) + (", ..." if len(waiting) > 3 else "")
            progress.tell(lambda: f"waiting for {len(waiting)} of {len(names)} gateways to {aim}: {some}")  # noqa: B023
            time.sleep(0.005 if len(waiting) < 20 and time.time() - began < 1 else 0.05)
        progress.end()
        for name, slot in waiting.items():
            status = slot_status(slot)
            if name in untold or status is None:
                what = f"no supervisor answers within {timeout:g} s; run `hermes-boot doctor`"
                failures[name] = CommandFailed(f"{name}: {what}")
            elif not (up and status.up):  # else it takes its time, which is no failure
                failures[name] = CommandFailed(f"{name}: did not {aim} within {timeout:g} s")
        return failures

    def told(self, slot: str, letters: bytes) -> bool:
        """Tell a slot's s6-supervise, and its next start, what to do; return whether one was there to be told."""
        try:
            if b"U" in letters:
                os.utime(f"{slot}/back-off", follow_symlinks=False)  # what died until now is no crash loop
        except OSError:
            pass  # hermes-agent's own slots have no back-off
        return heard(f"{slot}/supervise/control", letters)

    def settled(self, name: str, letters: bytes, began: float, failures: dict[str, GatewayError]) -> bool:
        """Return whether a slot is where it was told to be, or will not get there, which is a failure; began is when
        it was told, in seconds since 1970. A gateway is up once it says so, or has been up for START_SECONDS."""
        try:
            slot = self.slot(name)
        except GatewayError as error:  # somebody has removed it
            failures[name] = error
            return True
        if (status := slot_status(slot)) is None:
            return False  # s6-supervise can be told before it has said anything
        if letters != b"U":
            return status.pid == 0 or (letters == b"dU" and status.up and status.since >= began)
        ends = [ended for when, ended in deaths(slot) if when >= began]
        parked = bool(ends) and not status.up and not status.wanted  # else it has not been started yet
        if parked or len(ends) > 1:
            how = ending(ends[-1])
            what = f"ended with {how} and is parked" if parked else f"is in a crash loop, last end: {how}"
            failures[name] = CommandFailed(f"{name}: {what}; `hermes-boot logs -p {name} -n 20` says why")
            return True
        return status.up and state_of(status, self.state_of(self.valid(name)), [], True) == "up"

    # Registration

    def publish_missing(self, name: str) -> None:
        """Publish the slot of a profile that came by import, rename or from outside; `slot` says what else is wrong."""
        profile = self.valid(name)
        if os.path.isdir(f"{self.scandir}/{SLOT_PREFIX}{profile}") or not os.access(self.scandir, os.W_OK):
            return
        try:
            with self.profile_folder(profile) as folder:
                if profile == "default" or not soul_fault(folder):
                    self.register_profile_gateway(profile, start_now=False)
        except (OSError, AlreadyRegistered):
            pass  # not a profile that we can see, or somebody else has published it meanwhile

    def make_ours(self, name: str) -> None:
        """Bring a slot that hermes-agent's own manager has made to what the boot makes of it."""
        slot, profile = self.slot(name), self.valid(name)
        if is_ours(slot, profile) or not is_supervised(slot):
            return
        try:
            with Folder(self.home, follow=True) as home, Folder(self.scandir, follow=True) as scandir:
                files = slot_files(profile, self.stop_timeout, None, to_folder=not make_log_folder(home, profile))
                refresh(scandir, os.path.basename(slot), files, start=True)
            tell(f"{slot}/log/supervise/control", b"t")  # the logger too has a new run
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise CommandFailed(f"{profile}: its slot could not be brought up to date: {reason(error)}") from error

    def register_profile_gateway(
        self, profile: str, *, extra_env: dict[str, str] | None = None, start_now: bool = True
    ) -> None:
        """Publish a profile's slot, whole or not at all, and wait until s6 supervises it. extra_env is exported to the
        gateway; without start_now the slot waits for `start`."""
        self.valid(profile)
        self.check_rights("register", profile)
        for name, value in (extra_env or {}).items():
            if not name.isascii() or not name.isidentifier() or "\0" in value:
                raise InvalidName(f"extra_env: {name!r} cannot be a variable; use letters, digits and _")
        files = slot_files(profile, self.stop_timeout, extra_env, to_folder=self.made_ready(profile))
        self.publish(profile, files, start=start_now)

    def check_rights(self, action: str, profile: str) -> None:
        """Raise CommandFailed where only root may publish and remove slots."""
        if os.geteuid() != 0 and is_sealed(self.environment):
            command = f"docker exec CONTAINER hermes-boot gateway {action} -p {profile}"
            raise CommandFailed(f"{profile}: HERMES_SEALED leaves that to root: `{command}`")

    def made_ready(self, profile: str) -> bool:
        """Remove what a dead process has left in a profile, make its log folder; return whether that can be used."""
        self.check_free(profile)
        left = None
        try:
            with Folder(self.home, follow=True) as home:
                log_fault = make_log_folder(home, profile)
                try:
                    with profile_folder(home, profile) as folder:
                        left = clean_profile(folder)
                except OSError:
                    pass  # the gateway says what it thinks of that
        except OSError as error:
            raise CommandFailed(f"{profile}: {shown(self.home)} cannot be used: {reason(error)}") from error
        for fault in filter(None, (log_fault, left)):
            warn(f"{profile}: {fault}")
        return not log_fault

    def check_free(self, profile: str) -> None:
        """Raise AlreadyRegistered where a profile has a slot."""
        if os.path.lexists(f"{self.scandir}/{SLOT_PREFIX}{profile}"):
            raise AlreadyRegistered(f"{profile}: has a gateway already; see `hermes-boot status`")

    def publish(self, profile: str, files: Files, *, start: bool, group: int | None = None) -> None:
        """Put a profile's slot into the scandir and wait until s6 supervises it. group is for root, see build."""
        name = SLOT_PREFIX + profile
        limit, full = slot_limit(self.scandir)
        if len(self.list_profile_gateways()) >= limit:
            raise CommandFailed(f"{profile}: {full}")
        self.end_strays(name)
        try:
            with Folder(self.scandir, follow=True) as scandir, Lock(scandir):
                self.check_free(profile)
                build(scandir, name, files, start=start, group=group)
        except OSError as error:
            raise CommandFailed(f"{profile}: its slot could not be made: {reason(error)}") from error
        rescan(self.scandir)
        if not until(lambda: slot_status(f"{self.scandir}/{name}") is not None, 5) and is_watched(self.scandir):
            self.withdraw(profile)
            raise CommandFailed(f"{profile}: s6-svscan did not take up its slot within 5 s")

    def end_strays(self, name: str) -> None:
        """End what runs in a slot of this name whose folder somebody has removed: the new one would run beside it."""

        def left() -> list[str]:
            strays = stray_supervisors(self.scandir)
            return [stray.removeprefix(name) for stray in strays if stray in (name, f"{name}/log")]

        if left() and not let_go(self.scandir, left, self.patience):
            raise CommandFailed(f"{name}: a gateway without a slot runs on after {self.patience} s; end it by its pid")

    def unregister_profile_gateway(self, profile: str, *, timeout: float | None = None) -> None:
        """Stop a gateway, and once it has ended remove its slot, supervisors and logger included."""
        profile = self.valid(profile)
        self.check_rights("unregister", profile)
        locks = self.lock_all([profile], self.patience + 10, {})
        try:
            self.end(profile, timeout)
            self.withdraw(profile)
        finally:
            for lock in locks:
                lock.__exit__()

    def end(self, profile: str, timeout: float | None = None) -> None:
        """Stop a gateway that is to be removed."""
        if is_supervised(self.own_slot(profile)):
            self.raise_first(self.bring([profile], b"D", timeout=timeout))

    def withdraw(self, profile: str) -> None:
        """Remove a slot whose gateway is down, and its supervisors."""
        name = SLOT_PREFIX + profile
        removed = f".{name}"[:230] + f".{time.time_ns():x}"
        try:
            with Folder(self.scandir, follow=True) as scandir:
                with Lock(scandir):
                    os.rename(name, removed, src_dir_fd=scandir.fd, dst_dir_fd=scandir.fd)
                path = f"{self.scandir}/{removed}"
                if not let_go(self.scandir, lambda: [own for own in ("", "/log") if is_supervised(path + own)], 10):
                    raise CommandFailed(f"{profile}: its supervisors did not end within 10 s")
                try:
                    scandir.remove(removed)
                except PermissionError:
                    pass  # some of it is root's; s6-svscan does not look at its name
        except FileNotFoundError:
            raise NotRegistered(f"no such gateway: {profile}; somebody else has just removed it") from None
        except OSError as error:
            raise CommandFailed(f"{profile}: its slot could not be removed: {reason(error)}") from error


START_TIMEOUT = 10  # seconds; a gateway that is up by then takes its time, which is no failure
DONE = {"start": "started", "stop": "stopped", "restart": "restarted"}


def is_sealed(environment: dict[str, str]) -> bool:
    """Return whether the scandir is root's alone because HERMES_SEALED is on."""
    try:
        status = os.stat(scandir_of(environment))
    except OSError:
        return False
    return switch(environment.get("HERMES_SEALED", "")) is True and status.st_uid == 0 and not status.st_mode & 0o022


def by_hermes(timeout: float, action: Callable[..., int], *arguments: object) -> int:
    """Run an operator's command as hermes, who can stop it: so root ends it after timeout seconds. Return its code."""
    code = as_owner(account() or (0, 0), action, *arguments, timeout=timeout)
    return 1 if code == OVERDUE else code


def command_timeout(environment: dict[str, str], *, waits: bool) -> int:
    """Return an operator's command's time in seconds; one that waits may have to wait for another one first."""
    stop = seconds(environment, STOP_TIMEOUT)
    return 2 * (stop + 15) + 10 if waits else stop + 10


def control_as_root(boot: Boot, action: str, profile: str | None) -> int:
    """In sealed mode: give a profile its slot, for `start` and `restart` only if it has none, or with `unregister`
    remove it, after hermes has looked at it."""
    code, wanted = asked_by_hermes(boot, ask_for_profile, action, profile)
    manager = S6ServiceManager(environment=boot.environment)
    for name, (start, to_folder) in wanted.items():
        if action == "unregister":
            manager.withdraw(name)
            print(f"{name}: unregistered")
        else:
            files = slot_files(name, manager.stop_timeout, None, to_folder=to_folder)
            manager.publish(name, files, start=start, group=boot.owner[1])
            print(f"{name}: registered{', started' if start else ''}", flush=True)
    return 1 if code == OVERDUE else code


def ask_for_profile(boot: Boot, action: str, option: str | None, output: int) -> int:
    """As hermes: ask root for one profile's slot, or to remove it once its gateway has ended."""
    take_umask(boot.environment)
    manager = S6ServiceManager(environment=boot.environment)
    profile, start, to_folder = named_profile(manager, option), False, False
    if action != "register":
        profile = manager.valid(profile)
    if action == "unregister":
        manager.lock_all([profile], manager.patience + 10, {})  # until this process ends
        manager.end(profile)
    elif action in DONE and profile in manager.list_profile_gateways():
        return 0
    else:
        start = starts_by_itself(manager, profile) and action not in DONE
        to_folder = manager.made_ready(profile)
    ask_for(output, profile, start=start, to_folder=to_folder)
    return 0


def named_profile(manager: S6ServiceManager, option: str | None) -> str:
    """Return the profile that a command is about."""
    try:
        with Folder(manager.home, follow=True) as home:
            return chosen_profile(option, manager.environment, home)
    except OSError:
        return chosen_profile(option, manager.environment, None)


def report_failures(failures: dict[str, GatewayError]) -> int:
    """Say what failed; return the exit code: the failures' own where they have the same one, else 1."""
    for error in failures.values():
        say("error", str(error))
    codes = {error.exit_code for error in failures.values()}
    return codes.pop() if len(codes) == 1 else int(bool(codes))


def starts_by_itself(manager: S6ServiceManager, profile: str) -> bool:
    """Return whether the next boot would start a profile's gateway. Raises InvalidName, NotRegistered."""
    manager.valid(profile)
    try:
        with manager.profile_folder(profile) as folder:
            if profile != "default" and (fault := soul_fault(folder)):
                raise NotRegistered(f"no such profile: {profile}: {fault}")
            return decide(Boot(manager.environment), folder, profile, None).action == "started"
    except OSError:
        raise NotRegistered(f"no such profile: {profile}; make it with `hermes profile create {profile}`") from None


def gateway_command(boot: Boot, action: str, profile: str | None, every: bool) -> int:
    """Run `hermes_boot.py gateway ...`. Where root alone can give a profile its slot, or take it, that comes first."""
    if action in ("start", "restart", "register") and (why := no_gateways(boot, container_words())):
        raise GatewayError(f"this container has no gateways, since {why}")
    if os.geteuid() == 0 and is_sealed(boot.environment) and not every:
        if action.endswith("register"):
            return control_as_root(boot, action, profile)
        if action in ("start", "restart") and (code := control_as_root(boot, action, profile)):
            return code
    timeout = command_timeout(boot.environment, waits=action not in ("status", "list"))
    return by_hermes(timeout, gateway_as_hermes, boot, action, profile, every)


def gateway_as_hermes(boot: Boot, action: str, profile: str | None, every: bool) -> int:
    """As hermes: run `gateway ...`, say what became of each gateway, and go on past a failure. `status` is about all
    that have a slot, unless a profile is given; it returns 0 when they are up, else 3. Raises GatewayError."""
    take_umask(boot.environment)
    manager = S6ServiceManager(environment=boot.environment)
    if action == "list":
        print("".join(f"{name}\n" for name in manager.list_profile_gateways()), end="")
        return 0
    if action == "status":
        if profile is not None:
            manager.slot(profile)
        rows = [row for row in rows_of(boot, profile) if row.state != "no slot"]
        print(table(rows, []))
        return 0 if all(row.state in ("up", "starting") for row in rows) else 3
    names = manager.list_profile_gateways() if every else [named_profile(manager, profile)]
    if every and not names and action != "stop":
        raise CommandFailed("this container has no gateways; `hermes-boot doctor` says why")
    if action in ("start", "restart") and is_multiplexed(boot):
        if not every and manager.valid(names[0]) != "default":
            raise CommandFailed(
                f"{names[0]}: default serves it (multiplex_profiles); `hermes -p default gateway restart`"
            )
        names = ["default"]
    if action in DONE:
        failures = manager.carry_out(action, names)
        for name in names:
            if name not in failures:
                print(f"{name}: {DONE[action]}")
        return report_failures(failures)
    if action == "register":  # as the next boot would: started if its state says so
        start = starts_by_itself(manager, names[0])
        manager.register_profile_gateway(names[0], start_now=start)
        print(f"{names[0]}: registered{', started' if start else ''}")
    else:
        manager.unregister_profile_gateway(names[0])
        print(f"{names[0]}: unregistered")
    return 0


def to_json(value: object) -> str:
    """Return a value as JSON for people and programs."""
    import json

    return json.dumps(value, indent=2)


# Shutdown
# --------------------------------------------------------------------------------------------------------------------

EXIT_CODE, HALT = "/run/s6-linux-init-container-results/exitcode", "/run/s6/basedir/bin/halt"  # s6-overlay's


def shut_down(environment: dict[str, str]) -> int:
    """End every gateway and the container command, all at once, and return when the last is gone, or
    HERMES_SHUTDOWN_TIMEOUT seconds are over. Run by s6-overlay from cont-finish.d, before its final kill; by the
    fallback init itself where it cannot run s6-overlay's rc.shutdown. No intent is recorded, so what ran comes back at
    the next boot."""
    patience = seconds(environment, SHUTDOWN_TIMEOUT)
    deadline = time.monotonic() + patience
    set_terminal_going()
    command = read_pid_file(COMMAND_PROCESS)
    chosen = exit_code()  # by a service that has called `halt` then; at first it is 0
    if command:
        set_exit_code(chosen or 128 + SIGTERM)  # should it outlive us; if it ends in time, its own code comes after
        send(command, SIGTERM)  # while we are root: it may not be hermes yet
    try:
        with trusted_folder(scandir_of(environment)) as scandir, scandir.folder(".s6-svscan") as svscan:
            put(svscan, os.path.basename(ENDING), "", 0o644)
    except OSError:
        pass  # then every finish does its work
    try:
        with TimeLimit(patience + 1):
            if os.geteuid() == 0 and (owner := account()):
                # As hermes to files, but still root's process, which hermes cannot stop; a limit could deny us another.
                os.setegid(owner[1])
                os.seteuid(owner[0])
            end_gateways(environment, deadline)
    except TimeoutError:
        pass  # a file system that does not answer
    os.seteuid(os.getuid())
    if command and chosen:
        until(lambda: exit_code() != chosen, 0.5)  # the command's comes
        set_exit_code(chosen)
    return 0


def exit_code() -> int | None:
    """Return the exit code that somebody has left for s6-overlay, None for none."""
    try:
        return number_in(content(EXIT_CODE).decode().strip(), 0, 255)
    except (OSError, ValueError):
        return None  # no s6-overlay, or no text


def set_exit_code(code: int) -> None:
    """Leave the exit code for s6-overlay: of a container command that lives on, nobody else tells it."""
    try:
        fd = os.open(EXIT_CODE, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
        os.write(fd, b"%d\n" % code)
        os.close(fd)
    except OSError:
        pass  # no s6-overlay


def end_gateways(environment: dict[str, str], deadline: float) -> None:
    """Bring all slots down, and wait for them and the container command until the monotonic clock's deadline."""
    manager = S6ServiceManager(environment=environment)
    slots = [f"{manager.scandir}/{SLOT_PREFIX}{name}" for name in manager.list_profile_gateways()]
    for slot in slots:
        heard(f"{slot}/supervise/control", b"d")

    def all_ended() -> bool:
        for slot in slots:
            heard(f"{slot}/back-off")  # wakes a finish that waits
        slots[:] = [slot for slot in slots if (status := slot_status(slot)) and status.pid]
        return not slots

    until(all_ended, deadline - time.monotonic())
    until(lambda: not read_pid_file(COMMAND_PROCESS), deadline - time.monotonic())


# Fallback init: where s6-overlay cannot start
# --------------------------------------------------------------------------------------------------------------------

STAGES = "/package/admin/s6-overlay/etc/s6-linux-init/skel"  # s6-overlay's scripts that boot and end a container


def fallback_init(why: str, words: list[str]) -> int:
    """Be what s6-linux-init is to s6-overlay, where that cannot start for the reason why; return the exit code.

    s6-svscan itself needs no PID 1. All else is s6-overlay's own: rc.init boots, runs the container command and leaves
    its exit code; rc.shutdown ends what s6-rc has started, by which the scripts of cont-finish.d run.
    """
    sys.argv = ["/init"]
    boot = Boot(process_environment())
    kept = number_in(boot.setting("S6_KEEP_ENV"), 1, MAX_SECONDS)
    folders = (boot.setting("PATH") or os.defpath).split(":")
    missing = [folder for folder in ("/command", "/usr/bin", "/bin") if folder not in folders]  # as s6-overlay's init
    boot.environment["PATH"] = path = ":".join([*missing, *folders])
    lay_out_run({} if kept else boot.environment)
    children = Children()
    environment = boot.environment if kept else {"PATH": path}
    no_stdin = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]  # that is the command's
    try:
        svscan = children.start([s6_program("s6-svscan"), SCANDIR], environment, file_actions=no_stdin)
        until(lambda: heard(f"{SCANDIR}/.s6-svscan/control"), 5)
        stage_2 = children.start([f"{STAGES}/rc.init", "top", *(words or [WRAPPER])], environment)
    except OSError as error:
        text = f"{error.filename} cannot be run ({reason(error)})"
        raise Fatal(f"{text}; use the image as it was built") from error
    try:
        os.tcsetpgrp(0, stage_2)
        os.kill(stage_2, SIGCONT)  # it may have asked for the terminal before it had it
    except OSError:
        pass  # no terminal
    if not boot.quiet:
        say("info", f"s6-svscan runs as PID {svscan}, below this init ({why}); gateways are supervised all the same")
    if children.wait(stage_2, svscan, pass_to=lambda: read_pid_file(COMMAND_PROCESS)) == svscan:
        say("error", "s6-svscan has died; the container ends, so that the engine can start it anew")
    try:
        children.wait(children.start([f"{STAGES}/rc.shutdown"], environment))
    except OSError as error:
        warn(f"s6-overlay's end cannot be run ({reason(error)}); only gateways and the command have time to end")
        shut_down(boot.environment)  # needs no other process
    send(svscan, SIGTERM)  # not by its control file, which is hermes's: root does not open that
    children.wait(svscan, timeout=0.5)
    children.wait(stage_2, timeout=0.1)  # the command has ended, and rc.init notes its code
    code = exit_code()
    grace = number_in(boot.setting("S6_KILL_GRACETIME"), 1, MAX_SECONDS * 1000) or 3000
    children.end_all(grace / 1000)
    return shell_code(children.codes[stage_2] or 0) if code is None else code


def lay_out_run(variables: dict[str, str]) -> None:
    """Make /run as s6-overlay's first stages leave it, with a file a variable. Fatal where it cannot."""
    try:
        with trusted_folder("/run") as run:
            if os.geteuid() == 0 and (not run.is_roots() or os.fstat(run.fd).st_mode & 0o022):
                os.fchown(run.fd, 0, 0)  # else others could rename what root puts there
                os.fchmod(run.fd, 0o755)
            for name in os.listdir(run.fd):
                if name in ("s6", "service") or name.startswith((*LEFT_IN_RUN, "s6-")):
                    run.remove(name)  # an earlier start's
            for path in (f"{SCANDIR}/.s6-svscan", os.path.dirname(HALT), os.path.dirname(EXIT_CODE)):
                os.makedirs(path)
            with run.folder(CONTAINER_ENVIRONMENT.removeprefix("/run/"), make=True) as files:
                os.fchmod(files.fd, 0o750)
                for name, value in variables.items():
                    if "/" in name or name in (".", "..") or len(os.fsencode(name)) > 255:
                        warn(f"the variable {shown(name)} cannot be a file's name, so gateways lack it; rename it")
                        continue
                    put(files, name, f"{value}\n", 0o640)
            put(run, HALT, f"#!/bin/sh\nkill {os.getpid()}\n", 0o755)
            put(run, EXIT_CODE, "", 0o644)
            put(run, "s6/workdir", ".\n", 0o644)  # rc.init is there already
    except OSError as error:
        advice = f"give it a tmpfs that UID {os.geteuid()} can write (--tmpfs /run:exec)"
        raise Fatal(f"/run cannot be written ({reason(error)}); {advice}") from error
    write_pid_file(SUPERVISOR_PROCESS)


# Dashboard and gateway run: what the image itself starts beside the gateways
# --------------------------------------------------------------------------------------------------------------------

DASHBOARD_PORT = "9119"


def dashboard(environment: dict[str, str]) -> int:
    """Be the static service dashboard: the agent's where HERMES_DASHBOARD is on, else a process that only waits."""
    if not switch(environment.get("HERMES_DASHBOARD", "")):
        return execute(["/bin/sleep", "infinity"], environment)
    environment = program_environment(environment)
    environment["HERMES_HOME"] = home = root_home(environment)
    try:
        os.chdir(home)
    except OSError:
        os.chdir("/")  # the agent says what it thinks of that
    address = environment.get("HERMES_DASHBOARD_HOST") or "127.0.0.1"
    port = environment.get("HERMES_DASHBOARD_PORT") or DASHBOARD_PORT
    if number_in(port, 1, 65535) is None:  # Kubernetes gives tcp://... for a service named hermes-dashboard
        warn(f"HERMES_DASHBOARD_PORT={port!r} is not a number from 1 to 65535; using {DASHBOARD_PORT}")
        port = DASHBOARD_PORT
    return execute_as_hermes([HERMES, "dashboard", "--host", address, "--port", port, "--no-open"], environment)


def gateway_run(words: list[str], environment: dict[str, str]) -> int:
    """Be the container command `hermes [-p NAME] gateway run` where s6 keeps the gateways: see to it, then only wait.

    One that was stopped stays so, while hermes-agent would start it. Any other is hermes-agent's to start, by s6 where
    that is PID 1; below another one it does not see s6, and of multiplexing it knows nothing here, so we do it. Where
    there are no gateways by HERMES_RECONCILE, it runs in the foreground.
    """
    option, rest = profile_option(words)
    become_hermes()
    if switch(environment.get("HERMES_RECONCILE", "")) is False:
        environment = environment | {"HERMES_GATEWAY_NO_SUPERVISE": "1"}
    if {"-h", "--help", "--no-supervise"} & set(rest) or switch(environment.get("HERMES_GATEWAY_NO_SUPERVISE", "")):
        return execute_as_hermes([HERMES, *words], environment)
    sys.stdout = sys.stderr  # stdout is the program's
    boot, manager = Boot(environment), S6ServiceManager(environment=environment)
    multiplexed = is_multiplexed(boot)
    profile = chosen_profile(option, environment, None) if multiplexed else named_profile(manager, option)
    known = profile in manager.list_profile_gateways()
    stopped = known and manager.state_of(profile).get("desired_state") == "stopped"
    if not stopped and not (known and (multiplexed or not s6_is_pid_1())):
        return execute_as_hermes([HERMES, *words], environment)
    if stopped:
        say("info", f"{profile} was stopped and stays so; start it with `hermes -p {profile} gateway start`")
    else:
        guarded(gateway_as_hermes, boot, "start", profile, False)  # what fails is said, and s6's to try again
    return execute(["/bin/sleep", "infinity"], environment)


# Status
# --------------------------------------------------------------------------------------------------------------------

START_SECONDS = 3  # a gateway up for less is still starting, unless it has said more


class Row:
    """What `status` says of a gateway or a static service, and as JSON all of it; times are seconds since 1970,
    restarts those of the last minute, and waits_until is when a crash loop's next start is."""

    def __init__(self, name: str, slot: str, state: dict[str, object], starts: bool, why: str, line: str = "") -> None:
        """state is what the profile's state file says; starts, whether the next boot starts it, and why."""
        status, tally = slot_status(slot), deaths(slot)
        times = death_times(slot, tally)
        recent = sum(1 for moment in times if time.time() - moment <= RESTART_WINDOW)
        last = 1 if status and not status.wanted else 0  # no start followed
        self.name = name
        self.state = state_of(status, state, times, os.path.isdir(slot))
        self.since = round(status.since, 3) if status else None
        self.pid = status.pid if status and status.up else None
        self.restarts = max(0, recent - last)
        self.wanted = status.wanted if status else None
        self.last_exit = ending(tally[-1][1]) if tally else None
        self.autostart, self.why, self.last_line = starts, why, line
        self.waits_until = round(times[-1] + back_off(times)) if self.state == "crash loop" and not self.pid else None
        self.restarts_since_boot = max(0, len(tally) - last)
        self.memory = resident(self.pid) if self.pid else None
        self.platforms = platforms_of(state, status)


def rows_of(boot: Boot, profile: str | None = None) -> list[Row]:
    """Return a row for every profile of the volume and for every slot, default first; or for one, if it is there."""
    boot.multiplexes = None  # looked up anew, under --watch
    with open_home(boot) as home:
        names = {"default", *S6ServiceManager(environment=boot.environment).list_profile_gateways()}
        if profile is None or profile not in names:
            names |= unregistered(home, names)
        if profile is not None:
            names &= {profile if profile in names else profile.removeprefix(SLOT_PREFIX)}  # or a service's name
        return [row_of(boot, home, name) for name in sorted(names, key=lambda name: (name != "default", name))]


def unregistered(home: Folder, registered: set[str]) -> set[str]:
    """Return the volume's profiles that are not among the registered ones."""
    result: set[str] = set()
    try:
        with home.folder("profiles") as profiles:
            for name in profile_names(profiles):
                if name not in registered and isinstance(found := inspect(profiles, name), Folder):
                    os.close(found.fd)
                    result.add(name)
    except OSError:
        pass  # none, or none that hermes can look into
    return result


def row_of(boot: Boot, home: Folder, name: str) -> Row:
    """Return what there is to say of one gateway."""
    state: dict[str, object] = {}
    starts, why = False, "no such profile"
    try:
        with profile_folder(home, name) as folder:
            profile = decide(boot, folder, name, None)
            state, starts, why = profile.state, profile.action == "started", profile.why()
    except FileNotFoundError:
        pass  # a slot whose profile is gone
    except OSError as error:
        why = f"profiles/{name} {described(error)}: it {owner_and_mode(f'profiles/{name}', home.fd)}"
    line = (last_lines(home, name, 1) or [""])[0]
    return Row(name, f"{boot.scandir}/{SLOT_PREFIX}{name}", state, starts, why, line)


def resident(pid: int) -> int | None:
    """Return a process's resident memory in bytes, None when that cannot be seen."""
    try:
        return int(content(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def platforms_of(state: dict[str, object], status: SlotStatus | None) -> dict[str, dict[str, str]] | None:
    """Return state, error_code and error_message of each messaging platform, by a running gateway's own word, None
    where it has said nothing; so does what one that has ended has left there."""
    platforms = state.get("platforms")
    if not isinstance(platforms, dict) or status is None or not status.up or state.get("pid") != status.pid:
        return None
    fields = ("state", "error_code", "error_message")
    return {
        printable(name): {field: printable(str(entry.get(field) or "")) for field in fields}
        for name, entry in platforms.items()
        if isinstance(entry, dict)
    }


def failure_of(platform: dict[str, str]) -> str:
    """Return what is wrong with a messaging platform, "" when nothing is."""
    failed = platform["error_code"] or platform["state"] in ("fatal", "retrying")
    return (platform["error_code"] or platform["error_message"] or platform["state"]) if failed else ""


def state_of(status: SlotStatus | None, state: dict[str, object], times: list[float], registered: bool) -> str:
    """Return a gateway's state in one word or two."""
    if status is None:
        return "no supervisor" if registered else "no slot"
    if status.wanted and is_looping(status, times):
        return "crash loop"
    if status.up:
        own_word = state.get("gateway_state") if state.get("pid") == status.pid else None
        young = time.time() - status.since < START_SECONDS and own_word != "running"
        return "stopping" if not status.wanted else "starting" if young or own_word == "starting" else "up"
    if status.wanted:
        return "starting"
    if status.finishing:
        return "stopping"
    parked = status.ended == EX_CONFIG << 8 and state.get("desired_state") != "stopped"
    return "parked" if parked else "down"


def ending(wait_status: int) -> str:
    """Return how a process ended, by its wait status: `code 1` or the signal's name."""
    if not os.WIFSIGNALED(wait_status):
        return f"code {os.WEXITSTATUS(wait_status)}"
    import signal

    try:
        return signal.Signals(os.WTERMSIG(wait_status)).name
    except ValueError:
        return f"signal {os.WTERMSIG(wait_status)}"


DROPPED = ("WANTED", "RESTARTS", "LAST EXIT", "MEMORY", "PLATFORMS")  # in this order where a terminal is narrow
WIDE = 120  # columns of a terminal from which on cells are whole
RED, GREEN, YELLOW = 31, 32, 33
COLOURS = {
    **dict.fromkeys(("up", "pass"), GREEN),
    **dict.fromkeys(("starting", "stopping", "warn"), YELLOW),
    **dict.fromkeys(("crash loop", "parked", "no slot", "no supervisor", "fail"), RED),
}


def cells(row: Row, width: int) -> dict[str, str]:
    """Return a row's columns as text, short where a terminal's width is."""
    brief = 0 < width < WIDE
    waits = f"next start at {time.strftime('%H:%M:%S', time.localtime(row.waits_until))}: " if row.waits_until else ""
    next_boot = "starts" if row.autostart else "stays down"
    platforms = row.platforms or {}
    failed = {name: failure for name, platform in platforms.items() if (failure := failure_of(platform))}
    return {
        "PROFILE": row.name,
        "STATE": ", ".join([row.state, *(f"{name}: {cut(failure, width // 4)}" for name, failure in failed.items())]),
        "SINCE": "-" if row.since is None else duration(time.time() - row.since),
        "PID": str(row.pid or "-"),
        "MEMORY": "-" if row.memory is None else f"{row.memory >> 20} MiB",
        "RESTARTS": f"{row.restarts_since_boot}{'+' if row.restarts_since_boot >= MOST_DEATHS - 1 else ''}",
        "WANTED": {True: "up", False: "down", None: "-"}[row.wanted],
        "LAST EXIT": row.last_exit or "-",
        "NEXT BOOT": row.why if row.why == "service" else next_boot if brief else f"{next_boot} ({row.why})",
        "PLATFORMS": " ".join(name for name in platforms if name not in failed),
        "LAST LOG LINE": f"{waits}{row.last_line}",
    }


def duration(seconds_past: float) -> str:
    """Return a time span in its two largest units."""
    past = max(0, int(seconds_past))
    parts = {"d": past // 86400, "h": past // 3600 % 24, "m": past // 60 % 60, "s": past % 60}
    return " ".join([f"{count}{unit}" for unit, count in parts.items() if count][:2]) or "0s"


def terminal_width() -> int:
    """Return how many columns the terminal has that stdout is, 0 for another file."""
    return os.get_terminal_size(1).columns if os.isatty(1) else 0


def coloured(text: str, word: str) -> str:
    """Return text with the first of a word in its colour, on a terminal, unless NO_COLOR is set."""
    plain = not terminal_width() or os.environ.get("NO_COLOR")
    colour = None if plain else COLOURS.get(word, YELLOW if ", " in word else None)
    return text.replace(word, f"\033[{colour}m{word}\033[0m", 1) if colour else text


def table(rows: list[Row], services: list[Row]) -> str:
    """Return the rows aligned, and how many gateways are in which state. A terminal's width is kept: the last log line
    of a gateway that is not well stands below it, any other is cut, and columns are left out."""
    width, states = terminal_width(), [row.state for row in rows]
    lines = [cells(row, width) for row in (*rows, *services)]
    if not lines:
        return "0 gateways"
    header = {name: name for name in lines[0]}
    sizes = {name: max(len(line[name]) for line in (header, *lines)) + 2 for name in header}
    columns = [name for name in header if name != "LAST LOG LINE" and any(line[name] for line in lines)]
    for name in DROPPED:
        if name in columns and 0 < width < sum(sizes[name] for name in columns):
            columns.remove(name)
    room = max(0, width - sum(sizes[name] for name in columns))
    result = []
    for line in (header, *lines):
        first, last = line["PROFILE"].ljust(sizes["PROFILE"]), line["LAST LOG LINE"]
        text = "".join(line[name].ljust(sizes[name]) for name in columns[1:])
        below = width and last and COLOURS.get(line["STATE"]) == RED
        text += "" if below or (width and not room) else cut(last, room)
        result.append(first + coloured(cut(text.rstrip(), max(0, width - len(first))), line["STATE"]))
        result += [cut(f"    {last}", width)] if below else []
    by_number = sorted(dict.fromkeys(states), key=states.count, reverse=True)
    counts = ", ".join(f"{states.count(state)} {state}" for state in by_number)
    return "\n".join([*result, "", f"{len(rows)} gateway{'s' * (len(rows) != 1)}: {counts}"])


def service_rows(boot: Boot) -> list[Row]:
    """Return a row for each of the image's static services that hermes may control."""
    rows = []
    for name in names_in(STATIC_SERVICES):
        slot = f"{boot.scandir}/{name}"
        if os.access(f"{slot}/supervise/control", os.W_OK):
            row = Row(name, slot, {}, True, "service")
            off = name == "dashboard" and not switch(boot.setting("HERMES_DASHBOARD"))
            if row.state in ("up", "starting") and row.pid:  # it has no state file to say more
                row.state, row.wanted = ("off", False) if off else ("up", True)
            rows.append(row)
    return rows


def show_status(boot: Boot, profile: str | None, as_json: bool, watch: float | None) -> int:
    """Print the table or JSON, again and again with watch, in seconds; return 0, or 4 when there is no such profile."""
    while True:
        rows = rows_of(boot, profile)
        if not rows:
            raise NotRegistered(f"no such profile: {shown(profile or '')}; `hermes-boot status` lists them")
        if not as_json and (why := no_gateways(boot, container_words())):
            warn(f"this container has no gateways, since {why}")
        elif not as_json and is_booting():
            warn(BOOTING)
        elif not as_json and not supervisor_answers(boot.scandir):
            warn(f"no supervisor answers on {boot.scandir}; `hermes-boot doctor` says why")
        services = [] if profile or as_json else service_rows(boot)
        text = to_json([vars(row) for row in rows]) if as_json else table(rows, services)
        print(f"\033[H\033[J{text}" if watch and sys.stdout.isatty() else text, flush=True)
        if not watch:
            return 0
        time.sleep(watch)


# Health
# --------------------------------------------------------------------------------------------------------------------

HEALTH_TIMEOUT = 4  # seconds; the image's HEALTHCHECK has 5


def health(environment: dict[str, str], live: bool) -> int:
    """Return 0 when the supervisor answers and every gateway that should be up is, or is about to be, else 1; print one
    line. With live the supervisor alone counts: who restarts the container upon it would take good gateways down for a
    bad one. For probes, so it takes no more than it must: no JSON unless a gateway is down, no command line parser."""
    boot = Boot(environment)
    if not supervisor_answers(boot.scandir):
        print(f"unhealthy: no supervisor answers on {boot.scandir}")
        return 1
    if live:
        print("live: the supervisor answers")
        return 0
    manager = S6ServiceManager(environment=environment)
    names = manager.list_profile_gateways()
    statuses = {name: slot_status(f"{boot.scandir}/{SLOT_PREFIX}{name}") for name in names}
    reasons = {name: unhealthy_reason(manager, name, status) for name, status in statuses.items()}
    reasons |= dict.fromkeys(wanted_without_slot(boot, statuses), "no slot")
    ill = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why)
    wanted = sum(1 for status in statuses.values() if status and status.wanted)
    print(f"unhealthy: {ill}" if ill else f"healthy: {wanted} up, {len(names) - wanted} not wanted")
    return int(bool(ill))


def unhealthy_reason(manager: S6ServiceManager, profile: str, status: SlotStatus | None) -> str:
    """Return why a gateway that should be up is not, "" when it is, or need not be, or has just been told to start."""
    if status is None:
        return "no supervisor"
    if not status.wanted:
        parked = not status.up and status.ended == EX_CONFIG << 8
        stopped = parked and manager.state_of(profile).get("desired_state") == "stopped"
        return f"parked after code {EX_CONFIG}" if parked and not stopped else ""
    slot = f"{manager.scandir}/{SLOT_PREFIX}{profile}"
    if is_looping(status, death_times(slot)):
        return "crash loop"
    if (age := time.time() - status.since) <= START_GRACE:
        return ""
    if not status.up:
        return f"down for {duration(age)}"
    logger = slot_status(f"{slot}/log")
    silent = logger is None or (not logger.up and time.time() - logger.since > START_GRACE)
    return "no logger" if silent and os.path.isdir(f"{slot}/log") else ""


def wanted_without_slot(boot: Boot, registered: dict[str, SlotStatus | None]) -> list[str]:
    """Return the profiles that should run and have no slot, with room for one. No other one's files are read."""
    try:
        with open_home(boot) as home:
            names = unregistered(home, set(registered)) | ({"default"} - set(registered))
            if not names or len(registered) >= slot_limit(boot.scandir)[0] or no_gateways(boot, container_words()):
                return []
            return [name for name in sorted(names)[:SLOT_LIMIT] if row_of(boot, home, name).autostart]
    except (OSError, Fatal):
        return []  # the volume cannot be read, which is for doctor to say


# Logs
# --------------------------------------------------------------------------------------------------------------------

LINE_LIMIT = 64 << 10  # bytes; s6-log's own lines have 8 KiB
MOST_ARCHIVES = 100  # files; s6-log keeps ten


def open_log(logs: Folder, name: str) -> BinaryIO | None:
    """Open a log file of s6-log's, None when it is not there or is no plain file."""
    try:
        fd = logs.open(name, os.O_RDONLY)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return open(fd, "rb")
    os.close(fd)
    return None


def unread_logs(logs: Folder, last: int) -> list[BinaryIO]:
    """Open the log files after the one with the inode last (0: from the oldest), oldest first. current is opened before
    the archives are listed: when s6-log rotates in between, it is found among them, and what is newer comes with the
    next call. So nothing is read twice or missed."""
    import heapq

    current = open_log(logs, "current")
    with os.scandir(logs.fd) as listing:
        archived = heapq.nlargest(MOST_ARCHIVES, (entry.name for entry in listing if entry.name[0] == "@"))
    archives = [open_log(logs, name) for name in reversed(archived)]
    files = [file for file in (*archives, current) if file]
    inodes = [os.fstat(file.fileno()).st_ino for file in files]
    start = inodes.index(last) + 1 if last in inodes else 0
    end = inodes.index(inodes[-1]) + 1 if current else len(files)
    for file in files[:start] + files[end:]:
        file.close()
    return files[start:end]


def last_files(files: list[BinaryIO], count: int) -> list[BinaryIO]:
    """Return those of a log's files, oldest first, that its last count lines are in, the first of them placed where
    these begin, or before; the others are closed. A log's size costs no time: no line takes more than LINE_LIMIT."""
    for index in range(len(files) - 1, -1, -1):
        file = files[index]
        start = max(0, os.fstat(file.fileno()).st_size - (count + 2) * LINE_LIMIT)  # both ends may be parts of lines
        if not start:
            count -= sum(block.count(b"\n") for block in iter(lambda: file.read(LINE_LIMIT), b""))  # noqa: B023
        file.seek(start)
        if start or count <= 0:
            for older in files[:index]:
                older.close()
            return files[index:]
    return files


def log_lines(logs: Folder, *, count: int | None, follow: bool) -> Iterator[bytes | None]:
    """Yield a log's lines as bytes, archives and current in order; with follow, go on for ever, over rotations, with
    None in pauses. With a count, start where at least as many lines are left, unless there are fewer."""
    last: BinaryIO | None = None
    while True:
        files = unread_logs(logs, os.fstat(last.fileno()).st_ino if last else 0)
        if last:
            yield from whole_lines(last)
        for file in files if last or count is None else last_files(files, count):
            if last:
                last.close()
            last = file
            yield from whole_lines(last)
        if not follow:
            return
        yield None


def whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield what a log file has more; a line that s6-log has only begun is left for the next time."""
    while line := file.readline(LINE_LIMIT):
        if not line.endswith(b"\n") and len(line) < LINE_LIMIT:
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield line


def last_lines(home: Folder, profile: str, count: int) -> list[str]:
    """Return the last lines with letters of a gateway's log, without timestamps, each fit for a terminal's line."""
    lines: list[str] = []
    try:
        with home.folder(f"logs/gateways/{profile}") as logs:
            if file := open_log(logs, "current"):
                with file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                    lines = file.read(4096).decode(errors="replace").splitlines()
    except OSError:
        pass  # no log that can be read
    texts = [printable(line.partition("  ")[2]) for line in lines]
    return [
        text
        for text in texts
        if any(map(str.isalpha, text)) and not text.startswith("│") and DIED_TOO_OFTEN not in text
    ][-count:]


def since_when(text: str) -> str:
    """Return the timestamp, as s6-log writes it, that 30s, 10m, 2h, 1d or a date is. Raises argparse's error."""
    import argparse

    size = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    if size and (number := number_in(text[:-1], 0, 10**9)) is not None:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(0, time.time() - number * size)))
    for layout in ("%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S"):
        try:
            return time.strftime(layout, time.strptime(text.replace("T", " "), layout))
        except ValueError:
            continue
    kinds = "a time span (30s, 10m, 2h, 1d) nor a date (2026-05-21, 2026-05-21T06:18)"
    raise argparse.ArgumentTypeError(f"{text!r} is neither {kinds}")


def show_logs(boot: Boot, profile: str | None, count: int | None, since: str | None, follow: bool, raw: bool) -> int:
    """Print a gateway's log, its last count lines of those from since on; return 0, or 4 when there is none. On a
    terminal, unless raw, nothing in it can act on that."""
    become_hermes()
    manager = S6ServiceManager(environment=boot.environment)
    name, after = manager.valid(named_profile(manager, profile)), (since or "").encode()
    harmless = not raw and sys.stdout.isatty()
    try:
        with Folder(boot.home, follow=True) as home, home.folder(f"logs/gateways/{name}") as logs:
            found = log_lines(logs, count=count, follow=follow)
            lines = (line for line in found if line is None or line[: len(after)] >= after)
            past = iter(lines.__next__, None)  # up to the first pause
            write_lines(past if count is None else [*past][-count:], harmless)
            for line in lines:
                write_lines([line], harmless) if line else time.sleep(0.2)
    except FileNotFoundError:
        raise NotRegistered(
            f"{name}: no log here; `hermes-boot status` lists gateways, `docker logs` has the rest"
        ) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        what = f"{'stdout' if is_full(error) else f'logs/gateways/{name}'} {described(error)}"
        raise GatewayError(f"{what}; `hermes-boot doctor` looks further") from error
    return 0


def write_lines(lines: Iterable[bytes], harmless: bool) -> None:
    """Write log lines to stdout, as they are or harmless to a terminal, and at once."""
    sys.stdout.buffer.writelines(map(visible, lines) if harmless else lines)
    sys.stdout.buffer.flush()


def visible(line: bytes) -> bytes:
    """Return a line with its text as it is, and as `cat -v` shows it what is no text, or turns or hides that (bidi)."""

    def notation(byte: int) -> str:
        low = byte & 0x7F
        return ("M-" if byte > 0x7F else "") + (f"^{chr(low ^ 0x40)}" if low < 0x20 or low == 0x7F else chr(low))

    text = line.decode("utf-8", "surrogateescape")
    return "".join(
        letter if letter.isprintable() or letter in "\t\n\u3000" else "".join(map(notation, os.fsencode(letter)))
        for letter in text
    ).encode()


# Doctor
# --------------------------------------------------------------------------------------------------------------------

SLOW_WRITE = 0.5  # seconds for a small file, synced


class Check:
    """One line of `doctor`: pass, warn or fail, what was looked at, what was found, and the command that fixes it."""

    def __init__(
        self, level: str, what: str, found: str, fix: str = "", repair: Callable[[], str] | None = None
    ) -> None:
        """repair is what --fix calls, where fixing is safe; it returns what it did, in words."""
        self.level, self.what, self.found, self.fix, self.repair = level, what, found, fix, repair

    def text(self, width: int) -> str:
        """Return the check for people: one line and, if any, lines of a log; on a terminal of a width in colour, and
        filled, with what fixes it on a line of its own."""
        line = f"{self.level:4}  {self.what}: "
        if not width:
            return f"{line}{Fault(self.found, self.fix)}"
        fix, *said = self.fix.split("\n")
        text = filled(f"{line}{self.found}", width)
        text += f"\n      {filled(fix, width) if '`' in fix else fix}" if fix else ""
        return "\n".join([coloured(text, self.level), *(cut(line, width) for line in said)])


def filled(text: str, width: int) -> str:
    """Return text in lines for a terminal, six columns in. A command in backticks stays whole, for people to paste."""
    import re

    lines = [""]
    for word in re.findall(r"(?:`[^`]*`|\S)+", text):
        if lines[-1] and len(lines[-1]) + len(word) + 7 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return "\n      ".join(lines)


def doctor(boot: Boot, *, as_json: bool, fix: bool) -> int:
    """Look at everything that goes wrong in such a container, with fix after what is safe to fix has been; return 1
    when a check fails. Owners come first, as root, who alone sees and fixes them; all else is done as hermes."""
    if fix and os.geteuid() == 0:
        try:
            sweep = sweep_volume(boot)
            if sweep.changed:
                given = f"gave {sweep.changed} entries to {boot.owner[0]}:{boot.owner[1]}"
                say("fixed", f"owners: {given}, the first: {sweep.first}")
        except OSError:
            pass  # what keeps it from that, the checks say
        if is_sealed(boot.environment) and not no_gateways(boot, container_words()):
            boot.quiet = True
            reconcile_phase(boot)
    timeout = CHILD_TIMEOUT if fix else command_timeout(boot.environment, waits=False)
    return by_hermes(timeout, doctor_as_hermes, boot, owner_checks(boot), as_json, fix)


def doctor_as_hermes(boot: Boot, owners: list[Check], as_json: bool, fix: bool) -> int:
    """As hermes: look at all that needs no root, fix it with fix, and print these checks after those of the owners."""
    take_umask(boot.environment)
    checks = all_checks(boot)
    repairs = [(check.what, check.repair) for check in checks if fix and check.repair]
    for what, repair in repairs:
        try:
            say("fixed", f"{what}: {repair()}")
        except (OSError, GatewayError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            say("error", f"{what}: could not be fixed: {why}")
    checks = [*supervisor_checks(boot), *owners, *(all_checks(boot) if repairs else checks)]
    if as_json:
        print(to_json([{"level": c.level, "check": c.what, "found": c.found, "fix": c.fix} for c in checks]))
    else:
        print("\n".join(check.text(terminal_width()) for check in checks))
    return int(any(check.level == "fail" for check in checks))


def all_checks(boot: Boot) -> list[Check]:
    """Return the checks that need no root."""
    checks = [*volume_checks(boot), *version_checks(boot), *group_checks(boot)]
    try:
        with Folder(boot.home, follow=True) as home:
            rows = rows_of(boot)
            checks += [*profile_checks(boot, home), *secret_checks(boot, home, rows)]
            if not supervisor_answers(boot.scandir):
                return checks  # the supervisor's own check says it all
            checks += dashboard_checks(boot)
            if why := no_gateways(boot, container_words()):
                return [*checks, Check("pass", "gateways", f"none here, since {why}")]
            if is_booting():
                return [*checks, Check("warn", "gateways", BOOTING)]
            limit, fault = slot_limit(boot.scandir)
            full = fault if sum(row.state != "no slot" for row in rows) >= limit else None
            checks += stray_checks(boot)
            for row in rows:
                checks += [gateway_check(boot, home, row, full), *logger_checks(boot, home, row.name)]
                checks += [*platform_checks(row, rows), *foreign_checks(boot, row)]
    except OSError as error:
        found = f"{shown(boot.home)} cannot be read: {reason(error)}"
        checks.append(Check("fail", "volume", found, "mount it, or correct HERMES_HOME"))
    return checks


def group_checks(boot: Boot) -> list[Check]:
    """Look for groups that the container was given and hermes is not in."""
    missing = join_groups(boot, look=True)
    found = f"{USER} is not in all of the groups {' '.join(map(str, missing))}"
    return [Check("warn", "groups", found, "restart the container with a writable /etc")] if missing else []


def supervisor_checks(boot: Boot) -> list[Check]:
    """Look for the supervisor."""
    if not supervisor_answers(boot.scandir):
        fix = "start the container with the image's ENTRYPOINT, not with a platform's own in its place"
        return [Check("fail", "supervisor", f"no s6-svscan answers on {boot.scandir}", fix)]
    if s6_is_pid_1():
        return [Check("pass", "supervisor", "s6 is PID 1")]
    if read_pid_file(SUPERVISOR_PROCESS) == 1:
        return [Check("pass", "supervisor", "s6-svscan runs below our own PID 1")]
    found = f"s6-svscan answers on {boot.scandir}, below another PID 1 ({shown(pid_1() or 'hidden')}), which works too"
    fix = "drop `--init` (compose: `init: true`) where you can, so that s6 is PID 1"
    return [Check("warn", "supervisor", found, fix)]


def owner_checks(boot: Boot) -> list[Check]:
    """Look for entries on the volume that are not hermes's; without root, some may be out of sight."""
    uid, gid = owner_of(boot.home)
    ours = f"{boot.owner[0]}:{boot.owner[1]}"
    if not os.path.isdir(boot.home):
        return []  # the volume's own check says it
    checks = []
    shared = not boot.by_root and is_groups(os.stat(boot.home), boot.owner[1])
    if (uid, gid) != boot.owner and not shared:
        fix = "restart the container to give it to hermes"
        fix = f"start with HERMES_UID={uid} HERMES_GID={gid}, or {fix}" if uid else fix
        checks.append(Check("warn", "owner", f"{shown(boot.home)} belongs to {uid}:{gid}, hermes is {ours}", fix))
    boot.dry_run = True
    try:
        sweep = sweep_volume(boot)
    except OSError as error:
        return [*checks, Check("warn", "owners", f"could not be checked: {reason(error)}", "run it as root")]
    finally:
        boot.dry_run = False
    if sweep.strangers and not shared:
        found = f"{sweep.strangers} entries at the top of {shown(boot.home)} are neither {USER}'s nor the agent's own"
        fix = f"move them off the volume, where {USER} can put them among its own, or chown -hR {ours} them on the host"
        checks.append(Check("warn", "owner", f"{found}, the first: {shown(sweep.first_stranger)}", fix))
    if sweep.kept:
        fault = sweep.kept_fault()
        checks.append(Check("warn", "owner", fault.text, fault.fix))
    fix = "restart the container, or run `hermes-boot doctor --fix` as root"
    if sweep.changed:
        found = f"{sweep.changed} of {sweep.checked} entries are not hermes's, the first: {sweep.first}"
        checks.append(Check("fail", "owners", found, fix))
    if sweep.failed:
        found = f"{sweep.failed} folders cannot be read, the first: {sweep.failure}"
        checks.append(Check("fail", "owners", found, fix))
    group = ", or for its group" if shared else ""
    return checks or [Check("pass", "owners", f"{sweep.checked} entries are {ours}'s{group}")]


def volume_checks(boot: Boot) -> list[Check]:
    """Look at the volume: its kind, its space, whether and how fast it takes a write."""
    checks = [Check("warn", "volume", fault.text, fault.fix) for fault in mount_faults(boot)]
    kind = holding_mount(boot.home, mount_points())[1]
    try:
        free = os.statvfs(boot.home)
        space = free.f_bavail * free.f_frsize
        if space < 64 << 20:
            checks.append(Check("warn", "volume", f"only {space >> 20} MiB are free", "free some space"))
        started = time.monotonic()
        with Folder(boot.home, follow=True) as home:
            probe(home)
    except OSError as error:
        known = {errno.EROFS: "mount it writable", errno.ENOSPC: "free some space"}
        known[errno.ENOENT] = "mount a volume there, or correct HERMES_HOME"
        found = f"{shown(boot.home)} ({kind}) cannot be written: {reason(error)}"
        fix = known.get(error.errno or 0, "`hermes-boot doctor --fix` as root")
        return [*checks, Check("fail", "volume", found, fix)]
    if (took := time.monotonic() - started) > SLOW_WRITE:
        found, fix = f"writing a file took {took * 1000:.0f} ms ({kind})", "keep HERMES_HOME on a local volume"
        checks.append(Check("warn", "volume", found, fix))
    return checks or [
        Check("pass", "volume", f"{kind}, {space >> 20} MiB free, a file written in {took * 1000:.0f} ms")
    ]


def version_checks(boot: Boot) -> list[Check]:
    """Compare the image's agent with the one that last ran on the volume."""
    image, volume, fixed = image_version(), "", False
    try:
        with Folder(boot.home, follow=True) as home:
            volume = volume_version(home)
            fixed = is_fixed(home, "config.yaml")
    except OSError:
        pass  # the volume's own check says it; without a config.yaml there is none to migrate
    if image and volume and is_newer(volume, image):
        found = f"hermes-agent {shown(volume)} has run on this volume, the image has {image}"
        return [Check("warn", "versions", found, f"use an image of {shown(volume)} or later")]
    if image and is_newer(image, volume) and not switch(boot.setting("HERMES_SKIP_CONFIG_MIGRATION")):
        found = f"the configuration is of {shown(volume) if volume else 'an unknown version'}, the image has {image}"
        fix = "restart the container, which migrates it; its log says what hinders that"
        if fixed:
            fix = "config.yaml is mounted read-only: migrate what is mounted, or set HERMES_SKIP_CONFIG_MIGRATION=1"
        return [Check("warn", "versions", found, fix)]
    found = f"hermes-agent {image or 'missing'} in the image, {shown(volume) if volume else 'none'} on the volume"
    return [Check("pass", "versions", found)]


def profile_checks(boot: Boot, home: Folder) -> list[Check]:
    """Look for folders of profiles/ that are no profiles."""
    skipped = [profile for profile in list_profiles(boot, home, None) if profile.action == "skipped"]
    return [Check("warn", f"profiles/{shown(profile.name)}", *skipped_fix(boot, profile)) for profile in skipped]


def skipped_fix(boot: Boot, profile: Profile) -> tuple[str, str]:
    """Return why a folder is no profile, and what fixes it: a command, where the name is fit for one."""
    fault, path = profile.fault or Fault(""), f"{boot.home}/profiles/{profile.name}"
    drop = f"{s6_program('s6-setuidgid')} {USER} " if boot.by_root else ""  # root does nothing there: SECURITY.md
    if fault.fix == "rename the folder" and path.isprintable():
        return fault.text, f"{drop}mv {quoted(path)} {quoted(f'{boot.home}/profiles/NEW-NAME')}"
    if "no SOUL.md" in fault.text and path.isprintable():
        return fault.text, f"{drop}touch {quoted(f'{path}/SOUL.md')} to make it one, else {drop}rm -r {quoted(path)}"
    return fault.text, fault.fix


def secret_checks(boot: Boot, home: Folder, rows: list[Row]) -> list[Check]:
    """Look for secrets that others can read."""
    return [
        Check("warn", row.name, f"{name} can be read by everyone", "hermes-boot doctor --fix", fix)
        for row in rows
        for name in (".env", "auth.json")
        if (fix := closing(boot, home, row.name, name))
    ]


def closing(boot: Boot, home: Folder, profile: str, name: str) -> Callable[[], str] | None:
    """Return what keeps others from reading a profile's file, None where they cannot."""

    def fix() -> str:
        with Folder(boot.home, follow=True) as volume, profile_folder(volume, profile) as folder:
            fd = folder.open(name, os.O_RDONLY)
        os.fchmod(fd, 0o600)
        mode = os.fstat(fd).st_mode
        os.close(fd)
        if mode & 0o004:
            raise OSError(errno.EPERM, "the mount gives its files this mode; mount it with another (file_mode, umask)")
        return f"chmod 600 {name}"

    try:
        with profile_folder(home, profile) as folder:
            status = folder.stat(name)
    except OSError:
        return None  # a slot without a profile
    return fix if status and stat.S_ISREG(status.st_mode) and status.st_mode & 0o004 else None


CAUSES = (  # words of a log in small letters, what they mean, and what to do
    (("address already in use",), "its port is taken", "set another API_SERVER_PORT in its .env"),
    (("no space left",), "the volume is full", "free some space"),
    (("permission denied", "read-only file system"), "it may not use its files", "`hermes-boot doctor --fix` as root"),
    (
        ("api key", "api_key", "unauthorized", "credential", "no model", "provider"),
        "no model or authentication",
        "`hermes -p {} setup`",
    ),
)


def gateway_check(boot: Boot, home: Folder, row: Row, full: Fault | None) -> Check:
    """Return what a gateway's state means, and the way out of it; full: why there is no room for another slot."""
    name, start = row.name, f"`hermes -p {row.name} gateway start`"

    def unregister() -> str:
        S6ServiceManager(environment=boot.environment).unregister_profile_gateway(name)
        return "removed its slot"

    if row.why == "no such profile":
        fix, found = f"`hermes-boot gateway unregister -p {name}`", "has a slot, but its profile is gone"
        return Check("warn", name, found, fix, None if is_sealed(boot.environment) else unregister)
    if row.state == "no slot" and full:
        return Check("warn", name, f"has no slot, since {full.text}", full.fix)
    if row.state in ("no slot", "no supervisor"):
        found = "it has no slot" if row.state == "no slot" else "s6-supervise is not running for it"
        return Check("fail", name, found, "hermes-boot doctor --fix", lambda: repair_slot(boot, name))
    if row.state in ("crash loop", "parked"):
        lines = last_lines(home, name, 20)
        cause, fix = likely_cause(row, lines)
        often = f", {row.restarts_since_boot} restarts since the boot, last" if row.state == "crash loop" else ""
        said = "".join(f"\n      | {line}" for line in lines[-3:])
        return Check("fail", name, f"{row.state}{often} after {row.last_exit}; {cause}", f"{fix}, then {start}{said}")
    if row.state == "down" and row.autostart:
        return Check("warn", name, "is down, though it should run", start)
    if row.state == "down" and row.why == MULTIPLEXED.text:
        return Check("pass", name, f"down, since {MULTIPLEXED.text}")
    if row.state == "down":
        return Check("pass", name, f"down, as it was left ({row.why}); to have it up: {start}")
    found, fix = f"{row.state} for {duration(time.time() - (row.since or time.time()))}", ""
    if row.platforms == {} and row.state == "up":  # which may be meant so: it has cron jobs
        found, restart = f"{found}, with no messaging platform", f"`hermes -p {name} gateway restart`"
        fix = f"`hermes -p {name} setup` adds one, then {restart}"
    return Check("pass", name, found, fix)


def stray_checks(boot: Boot) -> list[Check]:
    """Look for supervisors whose slot somebody has removed."""
    names = stray_supervisors(boot.scandir)

    def fix() -> str:
        for name in {name.removesuffix("/log") for name in names}:
            S6ServiceManager(environment=boot.environment).end_strays(name)
        return "ended them"

    found = f"{' '.join(names)}: supervised, and perhaps running, though their slots are gone"
    return [Check("fail", "supervisors", found, "hermes-boot doctor --fix", fix)] if names else []


def foreign_checks(boot: Boot, row: Row) -> list[Check]:
    """Look for a slot of hermes-agent's own manager's in use: no back-off, the wrong HOME, a root logger."""
    slot = f"{boot.scandir}/{SLOT_PREFIX}{row.name}"
    if row.state == "down" or is_ours(slot, row.name) or not os.path.isdir(slot):
        return []
    found = "its slot is not as the boot makes it; a restart brings it up to date"
    return [Check("warn", row.name, found, f"`hermes -p {row.name} gateway restart`")]


def platform_checks(row: Row, rows: list[Row]) -> list[Check]:
    """Look for messaging platforms that have failed, and for who else has a platform's token."""
    checks = []
    for platform, said in (row.platforms or {}).items():
        if not failure_of(said):
            continue
        code, message = said["error_code"], said["error_message"]
        found, fix = f"{platform}: {message or code or 'failed'}", f"`hermes-boot logs -p {row.name} -n 50`"
        if code.endswith("_lock") or code == "lock_conflict":
            number = message.partition("PID ")[2].partition(")")[0]
            other = next((each.name for each in rows if number and str(each.pid) == number), f"process {number or '?'}")
            found = f"{platform}: {other} has its token or account ({code})"
            fix = f"give each profile one of its own: `hermes -p {row.name} setup`"
        checks.append(Check("fail", row.name, found, fix))
    return checks


def likely_cause(row: Row, lines: list[str]) -> tuple[str, str]:
    """Return the likely cause of a gateway's deaths, by its log's last lines, and what to do against it."""
    if row.last_exit == "SIGKILL":
        return "most likely for want of memory", "raise the container's memory limit"
    text = "\n".join(lines).lower()
    for words, cause, fix in CAUSES:
        if any(word in text for word in words):
            return f"most likely {cause}", fix.format(row.name)
    if row.last_exit == f"code {EX_CONFIG}":
        return "its configuration is wrong", f"`hermes -p {row.name} setup`"
    return "its log says why", f"`hermes-boot logs -p {row.name} -n 50`"


def dashboard_checks(boot: Boot) -> list[Check]:
    """Look whether the dashboard runs, where it should."""
    if not switch(container_environment().get("HERMES_DASHBOARD", "")):
        return [Check("pass", "dashboard", "off (HERMES_DASHBOARD)")]
    slot = f"{boot.scandir}/dashboard"
    status = slot_status(slot)
    if status and status.up and not is_looping(status, death_times(slot)):
        return [Check("pass", "dashboard", f"up for {duration(time.time() - status.since)}")]
    fix = "`docker logs` says why (any host but 127.0.0.1 needs a login); then `s6-svc -u /run/service/dashboard`"
    return [Check("fail", "dashboard", "does not run", fix)]


def repair_slot(boot: Boot, name: str) -> str:
    """Have s6-svscan look again, else publish the slot anew, as the next boot would. Raises GatewayError."""
    slot, manager = f"{boot.scandir}/{SLOT_PREFIX}{name}", S6ServiceManager(environment=boot.environment)
    if os.path.lexists(slot):
        rescan(boot.scandir)
        if until(lambda: slot_status(slot) is not None, 1):
            return "s6-svscan has taken up its slot"
        manager.withdraw(name)
    start = starts_by_itself(manager, name)
    manager.register_profile_gateway(name, start_now=start)
    return f"published its slot ({'started' if start else 'registered'})"


def logger_checks(boot: Boot, home: Folder, name: str) -> list[Check]:
    """Look for a logger that does not come up, or does without its folder, as another container has it locked."""
    slot, folder = f"{boot.scandir}/{SLOT_PREFIX}{name}/log", f"logs/gateways/{name}"
    status = slot_status(slot)
    if status is None or not (is_looping(status, death_times(slot)) or time.time() - status.since > START_SECONDS):
        return []
    holder, logger = lock_holder(home, folder), status.pid if status.up else -1
    if holder == logger or (holder is None and not status.wanted):
        return []
    if holder == 0:
        fix = "give each container a volume of its own, or all but one HERMES_RECONCILE=0"
        return [Check("fail", name, f"{folder} is locked by another container; its log goes to this one's alone", fix)]
    if not status.up:
        fix = f"make {folder} on the volume a plain folder that hermes can write"
        return [Check("fail", name, "its logger dies again and again", fix)]
    why = f"{folder} is locked by a logger without a supervisor (PID {holder})" if holder else f"{folder} is not used"
    found, fix = f"{why}, so its log goes to the container's alone", "hermes-boot doctor --fix"
    return [Check("fail", name, found, fix, lambda: renew_logger(boot, name))]


def renew_logger(boot: Boot, name: str) -> str:
    """End a logger without a supervisor that has a gateway's log folder, and start the gateway's own anew."""
    folder = f"logs/gateways/{name}"
    with open_home(boot) as home:
        if fault := make_log_folder(home, name):  # people remove it to make space
            raise GatewayError(str(fault))
        holder = lock_holder(home, folder) or 0
        for number in (SIGTERM, SIGKILL) if holder else ():
            send(holder, number)
            if until(lambda: lock_holder(home, folder) != holder, 2):
                break
    tell(f"{boot.scandir}/{SLOT_PREFIX}{name}/log/supervise/control", b"t")
    return "started its logger anew"


def lock_holder(home: Folder, folder: str) -> int | None:
    """Return the pid that holds s6-log's lock, 0 for another container's, None for nobody; does not take it."""
    import fcntl
    import struct

    layout = "hhqqi4x"  # struct flock: type, whence, start, length, pid
    try:
        with home.folder(folder) as logs, open(logs.open("lock", os.O_RDWR), "rb+", buffering=0) as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return None  # an NFS without locks among them
    kind, *_, pid = struct.unpack(layout, answer)
    return None if kind == fcntl.F_UNLCK else max(0, pid)


# Command line
# --------------------------------------------------------------------------------------------------------------------

ROLES = {
    "10-hermes-shutdown": "shutdown",
    "01-hermes-setup": "setup",
    "stage2-hook.sh": "setup",
    "02-reconcile-profiles": "reconcile",
    "entrypoint.sh": "setup",
}
EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong usage, 3 not running (gateway status), 4 no such gateway"


def main(argv: list[str]) -> int:
    """Run what our name or the first argument asks for; return the exit code, see EXIT_CODES."""
    sys.argv = argv
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed, by `>&-`
    os.umask(0o022)
    name, words = os.path.basename(argv[0]), argv[1:]
    if name in ROLES:
        words = [ROLES[name]]
    if name == "entrypoint.sh":
        warn("docker/entrypoint.sh is deprecated; use the image's ENTRYPOINT, /init")
        # The container's start, else `docker exec`, which has no parent here.
        if argv[1:] or 1 in (os.getpid(), os.getppid()):
            return execute(["/init", WRAPPER, *argv[1:]], process_environment())
    if name == "hermes-boot":
        words = words or ["--help"]  # whoever types that wants to look, not to boot
    return guarded(dispatch, words)


def dispatch(words: list[str]) -> int:
    """Run a command. What the image itself calls pays for no parser; people's commands get one."""
    command, rest = words[0] if words else "", words[1:]
    if words in ([], ["setup"], ["reconcile"], ["shutdown"]):
        return run_phases(command, dry_run=False)
    if words == ["migrate"]:
        return migrate_config(Boot(process_environment()))
    if command == "finish" and len(rest) >= 2:
        return finish(*rest[0:2], *rest[4:5])
    if words == ["end-boot"]:
        return end_boot()
    if command == "init" and rest:
        return fallback_init(rest[0], rest[1:])
    if command == "container-command":
        return gateway_run(rest, process_environment())
    if command == "dashboard" and not rest:
        return dashboard(process_environment())
    environment = container_environment() | process_environment()  # with what a login shell has scrubbed from ours
    take_timezone(environment)  # before the command line is read, for --since
    return run_command(without_parser(words) or parse(words), environment)


def without_parser(words: list[str]) -> Any:
    """Return what the parser makes of the most used forms, None for others: it takes as long as all the rest."""
    found: Any = type(sys.implementation)(**dict.fromkeys("action profile json watch since follow raw".split()))
    found.command, *rest = words
    found.live, found.lines = words == ["health", "--live"], number_in(words[-1], 1, 10**9)
    if (found.command == "health" and (found.live or not rest)) or (found.lines and words[:-1] == ["logs", "-n"]):
        return found
    if found.command == "gateway" and rest and rest[0] in (*DONE, "status"):
        found.action = rest.pop(0)
    found.all = found.action in DONE and rest == ["--all"]
    found.profile = rest[1] if rest[:-1] == ["-p"] and rest[1][:1] != "-" else None
    usual = found.command == "status" or found.action
    return found if usual and (not rest or found.all or found.profile) else None


def run_phases(role: str, *, dry_run: bool) -> int:
    """Run setup, reconcile or shutdown, or with an empty role setup and reconcile."""
    if role == "shutdown":
        return shut_down(container_environment())
    boot = Boot(container_environment(), dry_run=dry_run)
    end_on_sigterm()
    code = setup_phase(boot) if role != "reconcile" else 0
    if code or (role == "setup" and not reconciles_too(boot)):
        return code
    if role == "setup":
        sys.argv[0] = "02-reconcile-profiles"
    code = guarded(reconcile_phase, boot)
    if role == "setup":
        mark(RECONCILED, there=True)
    return code


def run_command(arguments: argparse.Namespace, environment: dict[str, str]) -> int:
    """Run an operator's command."""
    command = arguments.command or ""
    if command in ("", "setup", "reconcile"):
        return run_phases(command, dry_run=getattr(arguments, "dry_run", False))
    end_on_sigterm()  # else what runs as hermes would go on
    if command == "health":
        return by_hermes(HEALTH_TIMEOUT, health, environment, arguments.live)
    boot = Boot(environment)
    if command == "gateway":
        return gateway_command(boot, arguments.action, arguments.profile, arguments.all)
    if command == "status":
        if arguments.watch:
            become_hermes()
        timeout = command_timeout(boot.environment, waits=False)
        return by_hermes(timeout, show_status, boot, arguments.profile, arguments.json, arguments.watch)
    if command == "logs":
        return show_logs(boot, arguments.profile, arguments.lines, arguments.since, arguments.follow, arguments.raw)
    return doctor(boot, as_json=arguments.json, fix=arguments.fix)


COMMANDS = {  # what it does, and examples
    "status": ("show every gateway in a table", "status", "status -p coder --json", "status --watch 5"),
    "doctor": ("say what is wrong, and the command that fixes it", "doctor", "doctor --fix"),
    "health": ("for health checks: end with 0 if each gateway that should be up is, else 1", "health", "health --live"),
    "logs": ("print a gateway's log", "logs -p coder -f", "logs -p coder --since 10m", "logs -n 50"),
    "gateway": (
        "start, stop, restart or list gateways; register gives a profile its slot, unregister takes it away",
        *("gateway start -p coder", "gateway restart --all", "gateway list"),
    ),
    "setup": ("set hermes's IDs, give it its files, add missing ones, migrate the configuration", "setup --dry-run"),
    "reconcile": ("give every profile a slot, which is where s6 runs its gateway", "reconcile --dry-run"),
}


def parse(words: list[str]) -> argparse.Namespace:
    """Return the parsed command line; wrong usage ends the process with code 2."""
    import argparse

    program = os.path.basename(sys.argv[0])
    layout: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}

    def epilog(*examples: str) -> str:
        lines = "".join(f"  {program} {example}\n" for example in examples)
        return f"examples:\n{lines}\n{EXIT_CODES}" if examples else EXIT_CODES

    parser = argparse.ArgumentParser(
        prog=program,
        description="Show this container's gateways, start and stop them, and find what is wrong."
        " The image runs setup and reconcile itself.",
        epilog=epilog("status", "doctor", "gateway restart -p coder"),
        **layout,
    )
    version = f"%(prog)s {VERSION}, hermes-agent {image_version() or 'missing'}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--dry-run", action="store_true", help="list what would change, change nothing")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (text, *examples) in COMMANDS.items():
        description = f"{text[0].upper()}{text[1:]}."
        command = commands.add_parser(name, help=text, description=description, epilog=epilog(*examples), **layout)
        add_options(command, name)
    arguments = parser.parse_args(words)
    if arguments.dry_run and arguments.command not in (None, "setup", "reconcile"):
        parser.error("--dry-run is for setup and reconcile")
    if arguments.command == "gateway" and arguments.all and arguments.profile is not None:
        parser.error("-p NAME or --all, not both")
    if arguments.command == "gateway" and arguments.all and arguments.action.endswith("register"):
        parser.error("register and unregister take one profile")
    return arguments


def add_options(command: argparse.ArgumentParser, name: str) -> None:
    """Add the options of the command of this name."""
    import argparse

    def add(commands: str, *flags: str, **settings: Any) -> None:
        if name in commands.split():
            command.add_argument(*flags, **settings)

    def flag(commands: str, *flags: str, help: str, **settings: Any) -> None:
        add(commands, *flags, action="store_true", help=help, **settings)

    # with a default this one would undo --dry-run in front of the command
    flag("setup reconcile", "--dry-run", default=argparse.SUPPRESS, help="list what would change, change nothing")
    flag("health", "--live", help="only whether the supervisor answers, for checks that restart the container")
    actions = [*DONE, "status", "list", "register", "unregister"]
    waits = "start, stop, restart: wait until done, and hold at the next boot; restart starts what is down too"
    add("gateway", "action", choices=actions, help=waits)
    flag("gateway", "--all", help="all registered gateways; one failure does not stop the others")
    profile = "the profile; default: the active one (status: all)"
    add("status logs gateway", "-p", "--profile", metavar="NAME", help=profile)
    flag("status doctor", "--json", help="print JSON")
    again = {"nargs": "?", "type": whole, "const": 2, "metavar": "SECONDS"}
    add("status", "-w", "--watch", help="repeat every SECONDS (2)", **again)
    flag("doctor", "--fix", help="fix what is safe to fix, and say each step")
    flag("logs", "-f", "--follow", help="print new lines as they come, until Ctrl-C")
    add("logs", "-n", "--lines", type=whole, metavar="N", help="only the last N lines")
    flag("logs", "--raw", help="on a terminal too, print control characters as they are")
    span = "only from then on: 30s, 10m, 2h, 1d (ago) or a date"
    add("logs", "--since", type=since_when, metavar="TIME", help=span)


def whole(text: str) -> int:
    """Return a positive number of an option. Raises argparse's error."""
    import argparse

    if (number := number_in(text, 1, 10**9)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return number


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
