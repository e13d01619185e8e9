#!/usr/bin/python3 -IBScimport os,sys;sys.path.insert(0,os.path.dirname(os.path.realpath(sys.argv[1])));import hermes_boot;sys.exit(hermes_boot.main(sys.argv[1:]))
"""Prepare the container's volume and accounts, and give every profile's gateway a slot that s6 supervises.

Run by s6-overlay from /etc/cont-init.d, as root (or as the UID of `--user`), without arguments and with a scrubbed environment:
as 01-hermes-setup it remaps the hermes user, mends ownership and seeds the volume; as 02-reconcile-profiles it publishes one
service directory per profile. People and tests run `hermes_boot.py setup|reconcile [--dry-run]`.

Everything below $HERMES_HOME may have been written by the agent. So root only ever changes owners there, on descriptors opened
without following links; all else, reading included, is done by a child that has become hermes for good.
One bad profile never costs another its gateway: what is wrong is said in one line, and the boot goes on. It stops (exit 1) only
for what it cannot work around: a wrong UID or GID, a UID that is not ours, a volume that hermes cannot write.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time

if __name__ == "__main__":  # run by path, under -I: see main_wrapper's first line for the usual way
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

import main_wrapper as wrapper
from main_wrapper import HOME, USER, VENV, setting, truthy

IMAGE = "/opt/hermes"
SCANDIR = "/run/service"
STATIC_SERVICES = "/etc/s6-overlay/s6-rc.d"
SETUP_FAILED = "/run/hermes-setup.failed"
PASSWD, GROUP = "/etc/passwd", "/etc/group"
DOCKER_SOCKET = "/var/run/docker.sock"
MAX_ID = 2**32 - 2  # 2**32 - 1 is chown's "leave it as it is"

MANAGED_FOLDERS = (
    "backups cron sessions logs hooks memories skills skins plans workspace home profiles pairing platforms/pairing lazy-packages"
).split()
MANAGED_FILES = frozenset(
    "config.yaml .env SOUL.md auth.json auth.lock hermes_state.db gateway.pid gateway.lock gateway_state.json processes.json"
    " active_profile".split()
)
MANAGED_PREFIXES = ("state.db", "response_store.db")  # SQLite puts -wal and -shm beside each
VERSION_STAMP = ".hermes-agent-version"

STATE_FILE = "gateway_state.json"
STATE_LIMIT = 4 << 20  # bytes; real ones have a few hundred
STALE_FILES = ("gateway.pid", "processes.json")  # of a dead container's processes
BOOT_LOG, BOOT_LOG_LIMIT = "container-boot.log", 256 << 10
PROFILE_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
SLOT_PREFIX, SLOT_NAME_LIMIT = "gateway-", 251
EX_CONFIG = 78
SIGTERM = 15
PERMANENT_FAILURE = 125  # s6's word from a finish script for "do not restart"
STOP_TIMEOUT = 30  # seconds until SIGKILL, unless HERMES_GATEWAY_STOP_TIMEOUT says otherwise
SHUTDOWN_TIMEOUT = 8  # seconds for all at the container's end, unless HERMES_SHUTDOWN_TIMEOUT says otherwise
MAX_SECONDS = 86400
BACK_OFF_LIMIT = 60  # seconds
HELPER_TIMEOUT = 120  # seconds for a program of the agent's that the boot runs

Owner = tuple[int, int]  # UID, GID


# Reporting


class Fatal(Exception):
    """What the boot cannot go on from; its text is the line for the operator."""


def say(level: str, text: str) -> None:
    """Write `program: level: text` on stderr, where every line of ours goes: stdout is the program's."""
    print(f"{os.path.basename(sys.argv[0])}: {level}: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Say what is wrong and what to do about it, and go on."""
    say("warning", text)


def shown(name: str) -> str:
    """Return a name from the volume fit for one line: as it is when harmless, else quoted, escaped and shortened."""
    harmless = name.isascii() and name.isprintable() and name and not set(name) & set(" \"'\\=")
    text = name if harmless else ascii(name)
    return text if len(text) <= 100 else f"{text[:80]}...({len(name)} characters)"


def reason(error: OSError) -> str:
    """Return an operating system error in words, without the number."""
    return error.strerror or str(error)


def fault(error: OSError) -> str:
    """Return what an error says of an entry on the volume, to follow its name."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "is a link, or not of the kind it should be"
    return reason(error) if reason(error).startswith(("is ", "was ")) else f"cannot be used ({reason(error)})"


def guarded(action, *arguments) -> int:
    """Run an action that returns an exit code; turn what it raises into one line and code 1, a traceback only for the unexpected."""
    try:
        return action(*arguments)
    except Fatal as error:
        say("fatal", str(error))
    except KeyboardInterrupt:
        return 130
    except Exception:
        sys.excepthook(*sys.exc_info())
    return 1


# Safe file access


class Folder:
    """An open directory. What lies in it is reached by descriptor, never through a link, never blocking; errors are OSError."""

    __slots__ = ("fd",)

    def __init__(self, path: str, at: int | None = None, *, follow: bool = False) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        self.fd = os.open(path, flags, dir_fd=at)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def folder(self, path: str) -> Folder:
        """Open a folder below this one, link-free at every step."""
        parent = self
        for name in path.split("/"):
            try:
                child = Folder(name, parent.fd)
            finally:
                if parent is not self:
                    os.close(parent.fd)
            parent = child
        return child

    def make(self, path: str) -> Folder:
        """Open a folder below this one, making what is missing of it with mode 0755."""
        name, _, rest = path.partition("/")
        try:
            os.mkdir(name, 0o755, dir_fd=self.fd)
        except FileExistsError:
            pass
        if not rest:
            return Folder(name, self.fd)
        with Folder(name, self.fd) as parent:
            return parent.make(rest)

    def stat(self, name: str, *, follow: bool = False) -> os.stat_result | None:
        """Return what is under a name, None when nothing is."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=follow)
        except FileNotFoundError:
            return None

    def read(self, name: str, limit: int) -> bytes:
        """Return a regular file's content; OSError when it is anything else or longer than limit bytes."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=self.fd)
        with open(fd, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"is longer than {limit} bytes")
        return data

    def write(self, name: str, data: bytes, mode: int, *, replace: bool) -> bool:
        """Put a file in place whole, or not at all: beside, fsync, rename. Without replace an existing entry stays; False then.

        mode holds from the first instant (it is open's, not a later chmod's), so a secret is never readable by others.
        """
        with Lock(self, name):
            temporary = self.write_beside(name, data, mode)
            if replace:
                os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            elif not self.reserve(temporary, name):
                os.unlink(temporary, dir_fd=self.fd)
                return False
            os.fsync(self.fd)
        return True

    def update(self, name: str, edit, limit: int) -> None:
        """Replace a file by what edit makes of its content (None when missing), whole. Our own writers are kept out by the lock;
        a program that does not take it is noticed by looking again before the rename, and its change is then edited in turn."""
        with Lock(self, name):
            for _ in range(10):
                before = self.stat(name)
                data = self.read(name, limit) if before else None
                new = edit(data)
                if new == data:
                    return
                temporary = self.write_beside(name, new, stat.S_IMODE(before.st_mode) if before else 0o644)
                after = self.stat(name)
                if before is after is None or (before and after and changes(before) == changes(after)):
                    break
                os.unlink(temporary, dir_fd=self.fd)
            else:
                raise OSError(errno.EBUSY, "is being written all the time")
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)

    def write_beside(self, name: str, data: bytes, mode: int) -> str:
        """Write a file under a temporary name, safely on disk; return that name. Leaves nothing when it fails."""
        temporary = f".{name}.{os.getpid()}-{time.time_ns()}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=self.fd)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
        except OSError:
            os.unlink(temporary, dir_fd=self.fd)
            raise
        return temporary

    def reserve(self, temporary: str, name: str) -> bool:
        """Give a finished file its name unless something has it; link() decides that in the kernel, where the volume has it."""
        try:
            os.link(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
            os.unlink(temporary, dir_fd=self.fd)
        except FileExistsError:
            return False
        except OSError:  # CIFS, exFAT and FUSE may have no hard links
            if self.stat(name):
                return False
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        return True

    def remove_temporaries(self, *names: str) -> None:
        """Remove what killed writers of these names left; only with the lock held is every one of them stale."""
        starts = tuple(f".{name}." for name in names)
        for entry in os.listdir(self.fd):
            if entry.startswith(starts) and entry.endswith(".tmp"):
                try:
                    os.unlink(entry, dir_fd=self.fd)
                except OSError:
                    continue  # a folder of that name is not ours, and in nobody's way

    def remove(self, name: str) -> None:
        """Remove an entry with all below it, if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            with Folder(name, self.fd) as below:
                for entry in os.listdir(below.fd):
                    below.remove(entry)
            os.rmdir(name, dir_fd=self.fd)


def changes(status: os.stat_result) -> tuple[int, int, int]:
    """Return what differs once somebody has written or replaced a file."""
    return status.st_ino, status.st_mtime_ns, status.st_size


class Lock:
    """An exclusive flock on a folder, between containers too. Given up on after a second: a hostile holder must not stop a boot.

    Once it is held, what killed writers of the given names left is removed.
    """

    __slots__ = ("folder", "names", "fd")

    def __init__(self, folder: Folder, *names: str) -> None:
        self.folder, self.names, self.fd = folder, names, -1

    def __enter__(self) -> None:
        self.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.folder.fd)
        if self.acquired() and self.names:
            self.folder.remove_temporaries(*self.names)

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def acquired(self) -> bool:
        """Try for a second to get the lock; say whether we have it."""
        import fcntl

        for _ in range(50):
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break  # NFS locks no folders; two boots on one volume are then as safe as link() and rename() make them
        return False


# Where the boot works


class Boot:
    """What every step needs to know: the environment, the root HERMES_HOME, who hermes is, and whether to change anything."""

    __slots__ = ("environment", "home", "scandir", "owner", "dry_run")

    def __init__(self, environment: dict[str, str], *, dry_run: bool = False) -> None:
        """Raise Fatal when HERMES_HOME is nothing to boot on."""
        self.environment = environment
        self.home = wrapper.root_home(environment)
        self.scandir = setting(environment, "S6_PROFILE_GATEWAY_SCANDIR") or SCANDIR
        self.owner: Owner = wrapper.account() or owner_of(self.home)
        self.dry_run = dry_run
        if not self.home.startswith("/") or os.path.realpath(self.home) == "/":
            raise Fatal(f"HERMES_HOME={self.home!r} is not a folder of its own; set it to an absolute path such as {HOME}")

    def setting(self, name: str) -> str:
        """Return a variable that is addressed to us, "" when unset."""
        return setting(self.environment, name)

    def does(self, text: str) -> bool:
        """Report a change, and say whether to make it: under --dry-run it is only listed, on stdout."""
        if self.dry_run:
            print(f"would {text}")
        elif not self.quiet:
            say("info", text)
        return not self.dry_run

    @property
    def quiet(self) -> bool:
        """Say whether only warnings are wanted."""
        return self.setting("S6_VERBOSITY") == "0"


def owner_of(path: str) -> Owner:
    """Return a path's owner, or our own where it is missing: who to act as in an image without a hermes user."""
    try:
        status = os.stat(path)
    except OSError:
        return os.geteuid(), os.getegid()
    return status.st_uid, status.st_gid


def in_child(action, *arguments) -> int:
    """Run an action in a child process; return its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = guarded(action, *arguments)
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_owner(owner: Owner, action, *arguments) -> int:
    """Run an action as hermes and return its exit code: in a child that drops for good when we are root, else right here."""

    def dropped() -> int:
        wrapper.drop(*owner)
        return action(*arguments)

    if os.geteuid() != 0 or owner[0] == 0:
        return guarded(action, *arguments)
    return in_child(dropped)


def run_helper(argv: list[str], environment: dict[str, str]) -> int:
    """Run a program as hermes: stdin empty, stdout on stderr, killed by SIGALRM after HELPER_TIMEOUT seconds. Returns its code."""

    def become_program() -> int:
        import _signal

        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(2, 1)
        _signal.alarm(HELPER_TIMEOUT)  # survives exec
        return wrapper.run_as_hermes(argv, environment)

    return in_child(become_program)


def number_in(value: str, least: int, most: int) -> int | None:
    """Return a decimal number within bounds, None for anything else."""
    plain = value.isascii() and value.isdigit() and len(value) <= len(str(most))
    return int(value) if plain and least <= int(value) <= most else None


def seconds(environment: dict[str, str], name: str, default: int, least: int) -> int:
    """Return the seconds that a variable gives, or with a warning the default when it gives none."""
    value = setting(environment, name)
    number = number_in(value, least, MAX_SECONDS) if value else default
    if number is None:
        warn(f"{name}={value!r} is not a number of seconds from {least} to {MAX_SECONDS}; using {default}")
    return default if number is None else number


# Accounts


def wanted_id(boot: Boot, *names: str) -> int | None:
    """Return the UID or GID that the first non-empty of these variables asks for, None when none does; Fatal when it is not one."""
    for name in names:
        value = boot.setting(name)
        if not value:
            continue
        if (number := number_in(value, 1, MAX_ID)) is None:
            raise Fatal(f"{name}={value!r} is not a number from 1 to {MAX_ID}; unset it or give your host's (id -u, id -g)")
        return number
    return None


def rewrite(path: str, edit) -> bool:
    """Replace a file of /etc by what edit makes of its lines, atomically, with its mode and owner; say whether that changed it."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        old = file.read()
    new = b"".join(edit(old.splitlines(keepends=True)))
    if new == old:
        return False
    beside = f"{path}+"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            file.write(new)
            file.flush()
            os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            os.fsync(fd)
        os.rename(beside, path)
    except OSError as error:
        raise Fatal(
            f"cannot write {path} ({reason(error)}), which the remap or a group needs; make /etc writable, or drop HERMES_UID/HERMES_GID"
        ) from error
    return True


def with_field(lines: list[bytes], name: bytes, changes: dict[int, int]) -> list[bytes]:
    """Return the lines of an account file with some fields of one entry set; every other line stays byte for byte."""

    def edited(line: bytes) -> bytes:
        fields = line.split(b":")
        for index, number in changes.items():
            fields[index] = str(number).encode()
        return b":".join(fields)

    return [edited(line) if line.startswith(name + b":") else line for line in lines]


def remap(boot: Boot) -> None:
    """Give the hermes user the UID and GID that HERMES_UID/HERMES_GID (or PUID/PGID) ask for, editing /etc in place.

    Not by usermod: that walks the user's whole home folder, which here is the volume. Fatal when a value is wrong, or when another
    user has the UID; a GID may be shared (macOS users have 20, NAS users 100).
    """
    uid = wanted_id(boot, "HERMES_UID", "PUID")
    gid = wanted_id(boot, "HERMES_GID", "PGID")
    wanted = (boot.owner[0] if uid is None else uid, boot.owner[1] if gid is None else gid)
    if wanted == boot.owner:
        return
    if os.geteuid() != 0:
        raise Fatal(
            f"started as UID {os.geteuid()}, so hermes cannot become {wanted[0]}:{wanted[1]}; drop `--user` or the HERMES_UID/HERMES_GID"
        )
    with open(PASSWD, "rb") as file:
        for line in file:
            fields = line.split(b":")
            if len(fields) > 3 and fields[0] != USER.encode() and fields[2] == str(wanted[0]).encode():
                raise Fatal(f"UID {wanted[0]} belongs to the user {os.fsdecode(fields[0])} in this image; choose another HERMES_UID")
    if boot.does(f"remap {USER} from {boot.owner[0]}:{boot.owner[1]} to {wanted[0]}:{wanted[1]}"):
        rewrite(GROUP, lambda lines: with_field(lines, USER.encode(), {2: wanted[1]}))
        rewrite(PASSWD, lambda lines: with_field(lines, USER.encode(), {2: wanted[0], 3: wanted[1]}))
    boot.owner = wanted


def given_groups() -> list[int]:
    """Return the GIDs that the container was started with (`--group-add`) and that of a mounted Docker socket, root's excepted."""
    groups: list[int] = []
    with open("/proc/1/status", "rb") as file:
        for line in file:
            if line.startswith(b"Groups:"):
                groups = [int(number) for number in line.split()[1:]]
    try:
        status = os.stat(DOCKER_SOCKET)
        if stat.S_ISSOCK(status.st_mode):
            groups.append(status.st_gid)
    except OSError:
        pass  # not mounted
    return [group for group in dict.fromkeys(groups) if group != 0]


def join_groups(boot: Boot) -> None:
    """Put hermes into the groups that the container was given: s6-setuidgid rebuilds the groups from /etc/group, and nothing else."""
    wanted = [group for group in given_groups() if group != boot.owner[1]]
    member = USER.encode()

    def edit(lines: list[bytes]) -> list[bytes]:
        missing, result = {str(group).encode() for group in wanted}, []
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

    try:
        if wanted and not boot.dry_run and rewrite(GROUP, edit):
            boot.does(f"add {USER} to the groups {' '.join(map(str, wanted))}")
    except Fatal as error:
        warn(f"{error}: {USER} is not in the groups {wanted}")


# Ownership


class Sweep:
    """Hands what hermes manages on the volume back to hermes, and counts it.

    Only wrong owners change. Every change is made on a descriptor (O_PATH, opened without following a link), so that no rename can
    turn it on another file. Four kinds of entry are left alone, since root would give away more than the volume: links' targets,
    other file systems mounted below, device nodes, and files with more names than one, of which a name may lie outside (those
    that belong to hermes's former UIDs excepted, which hermes could write anyway).
    """

    __slots__ = ("uid", "gid", "dry_run", "former", "mounts", "changed", "checked", "linked", "failure", "failed")

    def __init__(self, boot: Boot, *, former: int = 0, mounts: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.uid, self.gid = boot.owner
        self.dry_run = boot.dry_run
        self.former = {former, self.uid}
        self.mounts = mounts
        self.changed = self.checked = self.linked = self.failed = 0
        self.failure = ""

    def claim(self, name: str, at: int, *, writable: bool = False) -> None:
        """Give one entry to hermes; with writable, see to it that its owner can read and write it."""
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=at)
        except FileNotFoundError:
            return  # removed while we looked
        try:
            status = os.fstat(fd)
            if not self.may_change(status):
                return
            path = f"/proc/self/fd/{fd}"
            if (status.st_uid, status.st_gid) != (self.uid, self.gid):
                if not self.dry_run:
                    os.chown(path, self.uid, self.gid)
                self.changed += 1
            if writable and stat.S_ISREG(status.st_mode) and status.st_mode & 0o600 != 0o600 and not self.dry_run:
                os.chmod(path, stat.S_IMODE(os.fstat(fd).st_mode) | 0o600)
        except OSError as error:
            self.fail(name, error)
        finally:
            os.close(fd)

    def may_change(self, status: os.stat_result) -> bool:
        """Say whether root may act on an entry, by its descriptor's status."""
        mode = status.st_mode
        if stat.S_ISREG(mode) and status.st_nlink > 1 and status.st_uid not in self.former:
            self.linked += 1
            return False
        return not stat.S_ISBLK(mode) and not stat.S_ISCHR(mode)

    def fail(self, name: str, error: OSError) -> None:
        """Count a refusal; the first one stands for all, since a volume that refuses one chown refuses every one."""
        self.failure = self.failure or f"{shown(name)}: {reason(error)}"
        self.failed += 1

    def entries(self, fd: int) -> list[str]:
        """Check every entry of an open folder, and return the names of its folders."""
        uid, gid, folders = self.uid, self.gid, []
        with os.scandir(fd) as listing:
            for entry in listing:
                self.checked += 1
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # removed while we looked
                folder = entry.is_dir(follow_symlinks=False)
                if status.st_uid == uid and status.st_gid == gid and not folder:
                    continue
                if (status.st_dev, status.st_ino) in self.mounts:
                    continue
                if status.st_uid != uid or status.st_gid != gid:
                    self.claim(entry.name, fd)
                if folder:
                    folders.append(entry.name)
        return folders

    def tree(self, name: str, at: int) -> None:
        """Check all below a folder. One descriptor at any depth: the way back up is `..`, checked to be where we came from."""
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        try:
            status = os.fstat(fd)
            device = status.st_dev
            above = [(status.st_ino, self.entries(fd))]
            while True:
                _, folders = above[-1]
                if folders:
                    fd = self.descend(fd, folders.pop(), device, above)
                    continue
                above.pop()
                if not above:
                    return
                fd = replace_fd(fd, os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd))
                if os.fstat(fd).st_ino != above[-1][0]:
                    raise OSError(errno.ESTALE, "was moved while it was being swept")
        finally:
            os.close(fd)

    def descend(self, fd: int, name: str, device: int, above: list[tuple[int, list[str]]]) -> int:
        """Check a folder's entries and make it the current one, unless it is gone, unreadable or another file system."""
        try:
            child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return fd  # removed or replaced while we looked
        except OSError as error:
            if error.errno != errno.ELOOP:  # a link in its place is not ours to follow
                self.fail(name, error)
            return fd
        status = os.fstat(child)
        if status.st_dev != device or (status.st_dev, status.st_ino) in self.mounts:
            os.close(child)
            return fd
        above.append((status.st_ino, self.entries(child)))
        return replace_fd(fd, child)

    def report(self, boot: Boot) -> None:
        """Say what was mended, what could not be, and what was left alone for safety."""
        if self.changed:
            boot.does(f"give {self.changed} of {self.checked} entries on {shown(boot.home)} to {self.uid}:{self.gid}")
        if self.failed:
            warn(
                f"{self.failed} entries on {shown(boot.home)} could not be given to {self.uid}:{self.gid}, the first: {self.failure};"
                " going on, since a rootless engine, NFS, a NAS or a read-only mount may refuse that and still work"
            )
        if self.linked:
            warn(
                f"{self.linked} files on {shown(boot.home)} have hard links and another owner, so they were left alone;"
                " copy them (cp FILE NEW; mv NEW FILE) if hermes needs them"
            )


def replace_fd(old: int, new: int) -> int:
    """Close one descriptor and return another."""
    os.close(old)
    return new


def mounts_below(home: str) -> frozenset[tuple[int, int]]:
    """Return (device, inode) of every mount point below a folder: of a bind mount from the same disk the device alone says nothing."""
    below = os.path.realpath(home).rstrip("/") + "/"
    result = set()
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            path = line.split(b" ")[4]
            for octal, character in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
                path = path.replace(octal, character)
            if path.startswith(os.fsencode(below)):
                try:
                    status = os.lstat(path)
                except OSError:
                    continue  # hidden below another mount
                result.add((status.st_dev, status.st_ino))
    return frozenset(result)


def own_volume(boot: Boot, former: int) -> None:
    """Hand HERMES_HOME itself, the managed folders and the managed top-level files to hermes. All else there is the user's."""
    if not os.path.isdir(boot.home):
        if not boot.does(f"make {shown(boot.home)}"):
            return
        make_home(boot)
    sweep = Sweep(boot, former=former, mounts=mounts_below(boot.home))
    with Folder(boot.home, follow=True) as home:
        sweep.claim(".", home.fd)
        with os.scandir(home.fd) as listing:
            files = [entry.name for entry in listing if is_managed_file(entry.name) and entry.is_file(follow_symlinks=False)]
        sweep.checked += 1 + len(files)
        for name in files:
            sweep.claim(name, home.fd, writable=True)
        for path in MANAGED_FOLDERS:
            own_folder(sweep, home, path)
    sweep.report(boot)


def make_home(boot: Boot) -> None:
    """Make HERMES_HOME with its parents. Fatal when that cannot be."""
    try:
        os.makedirs(boot.home, 0o755, exist_ok=True)
    except OSError as error:
        raise Fatal(f"HERMES_HOME={boot.home!r} cannot be made a folder: {reason(error)}; mount a volume there") from error


def is_managed_file(name: str) -> bool:
    """Say whether a top-level file is one that hermes keeps."""
    return name in MANAGED_FILES or name.startswith(MANAGED_PREFIXES)


def own_folder(sweep: Sweep, home: Folder, path: str) -> None:
    """Hand one managed folder and all below it to hermes; a link or a file in its place is said and left alone."""
    parent, _, name = path.rpartition("/")
    try:
        with home.folder(parent or ".") as above:
            if parent:
                sweep.claim(".", above.fd)
            sweep.claim(name, above.fd)
            sweep.checked += 2 if parent else 1
            sweep.tree(name, above.fd)
    except FileNotFoundError:
        return  # made later, by hermes
    except OSError as error:
        warn(f"{path} on the volume {fault(error)}; its owners were not checked; put a plain folder there")


def own_static_services(boot: Boot) -> None:
    """Let hermes see and control the image's static services, as it does its slots: s6 made their supervise folders for root alone."""
    sweep = Sweep(boot)
    try:
        names = [name for name in os.listdir(STATIC_SERVICES) if os.path.exists(f"{STATIC_SERVICES}/{name}/run")]
    except FileNotFoundError:
        return
    for name in names:
        for folder in (f"/run/s6-rc/servicedirs/{name}", f"{boot.scandir}/{name}"):
            try:
                with Folder(folder) as service:
                    for path in ("event", "supervise"):
                        sweep.claim(path, service.fd)
                    with service.folder("supervise") as supervise:
                        for path in ("control", "event"):
                            sweep.claim(path, supervise.fd)
            except OSError:
                continue  # not supervised here, or s6-rc's link to the other folder


# Seeding


BUILT_IN = {
    "SOUL.md": "You are Hermes, a helpful, curious and honest assistant. Edit this file to make the persona your own.\n",
    ".env": "# Secrets of Hermes Agent, one NAME=value a line. `hermes setup` fills this in.\n",
    "config.yaml": "# Configuration of Hermes Agent. `hermes setup` fills this in; `hermes config` shows all of it.\n",
}
TEMPLATES = ((".env", 0o600, ".env.example"), ("config.yaml", 0o640, "cli-config.yaml.example"), ("SOUL.md", 0o644, "docker/SOUL.md"))


def seeds(boot: Boot) -> list[tuple[str, int, bytes]]:
    """Return (name, mode, content) of every file that a volume starts with."""
    result = []
    for name, mode, template in TEMPLATES:
        try:
            with open(f"{IMAGE}/{template}", "rb") as file:
                content = file.read()
        except OSError:
            content = BUILT_IN[name].encode()
        result.append((name, mode, content))
    if auth := boot.environment.get("HERMES_AUTH_JSON_BOOTSTRAP"):
        result.append(("auth.json", 0o600, os.fsencode(auth)))
    if state := boot.setting("HERMES_GATEWAY_BOOTSTRAP_STATE"):
        if state == "running":
            result.append((STATE_FILE, 0o644, b'{"desired_state": "running"}\n'))
        else:
            warn(f"HERMES_GATEWAY_BOOTSTRAP_STATE={state!r} is ignored; the one state to start from is `running`")
    return result


def open_home(boot: Boot) -> Folder:
    """As hermes: open HERMES_HOME. Fatal when hermes may not."""
    try:
        return Folder(boot.home, follow=True)
    except OSError as error:
        uid, gid = owner_of(boot.home)
        raise Fatal(
            f"{shown(boot.home)} cannot be read by hermes ({boot.owner[0]}:{boot.owner[1]}): {reason(error)}; it belongs to {uid}:{gid}"
        ) from error


def seed(boot: Boot) -> int:
    """As hermes: try the volume, make the managed folders, put missing files in place. Never overwrites. Fatal if not writable."""
    with open_home(boot) as home:
        if not boot.dry_run:
            try_volume(boot, home)
        for path in MANAGED_FOLDERS:
            seed_folder(boot, home, path)
        for name, mode, content in seeds(boot):
            seed_file(boot, home, name, mode, content)
        secrets = home.stat(".env")
        if secrets and stat.S_ISREG(secrets.st_mode) and secrets.st_mode & 0o004:
            warn(f".env on the volume can be read by everyone (mode {stat.S_IMODE(secrets.st_mode):04o}); chmod 600 it")
    return 0


def try_volume(boot: Boot, home: Folder) -> None:
    """Write a file as hermes. A full disk is only said: gateways may still run. A volume that refuses is Fatal."""
    probe = "hermes-write-test"
    try:
        with Lock(home, probe, STATE_FILE, VERSION_STAMP, "auth.json", *BUILT_IN):
            os.unlink(home.write_beside(probe, b"hermes\n", 0o600), dir_fd=home.fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            warn(f"{shown(boot.home)}: {reason(error)}; free some space, or gateways will not start well")
            return
        status = os.fstat(home.fd)
        advice = f"start with HERMES_UID={status.st_uid} HERMES_GID={status.st_gid}" if status.st_uid else "chown it on the host"
        if error.errno == errno.EROFS:
            advice = "mount it writable"
        raise Fatal(
            f"{shown(boot.home)} cannot be written by hermes ({boot.owner[0]}:{boot.owner[1]}): {reason(error)}; it belongs to"
            f" {status.st_uid}:{status.st_gid}, mode {stat.S_IMODE(status.st_mode):04o}; {advice}"
        ) from error


def seed_folder(boot: Boot, home: Folder, path: str) -> None:
    """Make a managed folder where it is missing."""
    try:
        if boot.dry_run:
            if not os.path.isdir(f"{boot.home}/{path}"):
                boot.does(f"make the folder {path}")
            return
        with home.make(path):
            pass
    except OSError as error:
        warn(f"{path} on the volume {fault(error)}; put a plain folder there")


def seed_file(boot: Boot, home: Folder, name: str, mode: int, content: bytes) -> None:
    """Put a file in place unless something has its name, be that a dangling link."""
    if home.stat(name) or not boot.does(f"seed {name}"):
        return
    try:
        home.write(name, content, mode, replace=False)
    except OSError as error:
        warn(f"{name} could not be seeded: {reason(error)}")


def sync_skills(boot: Boot) -> None:
    """Bring the skills that the image bundles to the volume, with the agent's own tool."""
    bundled = boot.setting("HERMES_BUNDLED_SKILLS") or f"{IMAGE}/skills"
    if not os.path.isdir(bundled):
        return
    environment = wrapper.program_environment(boot.environment) | {"HERMES_BUNDLED_SKILLS": bundled}
    script = next((path for path in (f"{IMAGE}/tools/skills_sync.py", *installed("tools/skills_sync.py")) if os.path.exists(path)), "")
    if not script or not boot.does("sync the bundled skills"):
        return
    if code := run_helper([f"{VENV}/bin/python", script], environment):
        warn(f"skills sync ended with code {code}; run it again with `{VENV}/bin/python {script}`")


def installed(pattern: str) -> list[str]:
    """Return a path in each site-packages of the venv."""
    try:
        return [f"{VENV}/lib/{name}/site-packages/{pattern}" for name in os.listdir(f"{VENV}/lib") if name.startswith("python3")]
    except OSError:
        return []


def image_version() -> str:
    """Return the version of hermes-agent that the image has, from its metadata's folder name, "" when there is none."""
    for folder in installed(""):
        for name in os.listdir(folder):
            if name.startswith("hermes_agent-") and name.endswith(".dist-info"):
                return name.removeprefix("hermes_agent-").removesuffix(".dist-info")
    return ""


def version_key(version: str) -> list[int]:
    """Return a version's numbers for comparing."""
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]


def migrate_config(boot: Boot, *, fresh: bool) -> None:
    """Run `hermes config migrate` when the image's agent is newer than the one that last ran on this volume.

    Which that was is kept in a file on the volume; a fresh volume has nothing to migrate. A failure is tried again at the next boot.
    """
    version = image_version()
    if not version or truthy(boot.setting("HERMES_SKIP_CONFIG_MIGRATION")):
        return
    last = ""
    try:
        with Folder(boot.home, follow=True) as home:
            last = home.read(VERSION_STAMP, 100).decode(errors="replace").strip()
    except OSError:
        pass  # a volume from before this file: migrate once
    if version_key(version) <= version_key(last):
        return
    if not fresh:
        if not boot.does(f"migrate the configuration from {shown(last) or 'an unknown version'} to {version}"):
            return
        if as_owner(boot.owner, back_up_config, boot):
            warn("config.yaml and .env could not be backed up, so the configuration was not migrated; free some space")
            return
        environment = wrapper.program_environment(boot.environment)
        if code := run_helper([wrapper.HERMES, "config", "migrate"], environment):
            warn(f"config migration ended with code {code}; run `hermes config migrate` by hand")
            return
    if not boot.dry_run:
        as_owner(boot.owner, stamp_version, boot, version)


def back_up_config(boot: Boot) -> int:
    """As hermes: keep a dated copy of config.yaml and .env in backups/."""
    date = time.strftime("%Y-%m-%dT%H%M%SZ", time.gmtime())
    try:
        with Folder(boot.home, follow=True) as home, home.make("backups") as backups:
            for name in ("config.yaml", ".env"):
                if home.stat(name):
                    backups.write(f"{name}.{date}", home.read(name, 16 << 20), 0o600, replace=True)
    except OSError as error:
        warn(f"backup: {reason(error)}")
        return 1
    return 0


def stamp_version(boot: Boot, version: str) -> int:
    """As hermes: note the version that now runs on this volume."""
    try:
        with Folder(boot.home, follow=True) as home:
            home.write(VERSION_STAMP, f"{version}\n".encode(), 0o644, replace=True)
    except OSError as error:
        warn(f"{VERSION_STAMP} could not be written: {reason(error)}")
    return 0


# Profiles and their state


class Profile:
    """What the reconciler found of one profile, and what it makes of that."""

    __slots__ = ("name", "prior_state", "action", "why")

    def __init__(self, name: str, prior_state: str | None, action: str, why: str = "") -> None:
        self.name, self.prior_state, self.action, self.why = name, prior_state, action, why

    def line(self) -> str:
        """Return the profile's line for the boot log."""
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        state = "none" if self.prior_state is None else shown(self.prior_state)
        why = f' reason="{self.why}"' if self.why else ""
        return f"{date} profile={shown(self.name)} prior_state={state} action={self.action}{why}\n"


def name_fault(name: str) -> str:
    """Return what keeps a name from being a profile's, "" when nothing does."""
    if not set(name) <= PROFILE_NAME or name[:1] in ("", "-", "_"):
        return "a profile's name has only a-z 0-9 _ and -, and begins with a letter or digit; rename the folder"
    if len(SLOT_PREFIX + name) > SLOT_NAME_LIMIT:
        return f"the name is longer than {SLOT_NAME_LIMIT - len(SLOT_PREFIX)} characters; rename the folder"
    return ""


def load_state(data: bytes) -> dict[str, object]:
    """Return a state file's object; ValueError when it is not one."""
    import json

    try:
        state = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(state, dict):
        raise ValueError("is not a JSON object")
    return state


def prior_state(folder: Folder) -> tuple[str | None, str]:
    """Return the state a gateway should be in by its state file, and what is wrong with that file ("" when nothing is).

    desired_state is the operator's intent and wins; gateway_state is the gateway's own word, in which draining and degraded are ways
    of running.
    """
    try:
        state = load_state(folder.read(STATE_FILE, STATE_LIMIT))
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{STATE_FILE} {fault(error)}; remove it and start the gateway again"
    except ValueError:
        return None, f"{STATE_FILE} is not a JSON object; remove it and start the gateway again"
    intent = state.get("desired_state")
    if intent is None:
        intent = state.get("gateway_state")
        if intent in ("draining", "degraded"):
            intent = "running"
    if intent is not None and not isinstance(intent, str):
        return None, f"{STATE_FILE} has a state that is no string; start or stop the gateway to set it"
    return intent, ""


def soul_fault(folder: Folder) -> str:
    """Return why a folder is not a profile by its SOUL.md, "" when it is one."""
    if folder.stat("SOUL.md") is None:
        return "no SOUL.md, so not a profile"
    try:
        status = folder.stat("SOUL.md", follow=True)
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        return "SOUL.md is not a file; make it one, or remove it if this is no profile"
    return ""


def container_command() -> list[str]:
    """Return the words of hermes's command line that the container was started with.

    Cont-init scripts do not see them; they follow the wrapper on the command line of rc.init, or of PID 1 where that runs it.
    """
    for process in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                words = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        except OSError:
            continue  # ended meanwhile, or not ours to read
        names = [os.path.basename(word) for word in words]
        launcher = 0 if process == "1" else names.index("rc.init") if "rc.init" in names else len(names)
        for index, name in enumerate(names[launcher:], launcher):
            if name in ("main-wrapper.sh", "main_wrapper.py"):
                return words[index + 2 :] if words[index + 1 : index + 2] == [USER] else words[index + 1 :]
    return []


def is_dashboard(command: list[str]) -> bool:
    """Say whether the container is there for the dashboard: two containers with slots on one volume fight for its log folders."""
    return wrapper.profile_option(command)[1][:1] == ["dashboard"]


def run_profile(boot: Boot, command: list[str], home: Folder) -> str | None:
    """Return the profile whose gateway the container was started to run, in the manner from before there was a supervisor."""
    option, words = wrapper.profile_option(command)
    supervised = "--no-supervise" not in words and not truthy(boot.setting("HERMES_GATEWAY_NO_SUPERVISE"))
    return chosen_profile(option, boot.environment, home) if words[:2] == ["gateway", "run"] and supervised else None


def chosen_profile(option: str | None, environment: dict[str, str], home: Folder | None) -> str:
    """Return the profile a `hermes` command is about: -p, else HERMES_HOME=<root>/profiles/<name>, else active_profile, else default."""
    if option is not None:
        return option
    path = (setting(environment, "HERMES_HOME") or HOME).rstrip("/")
    if path != wrapper.root_home(environment).rstrip("/"):
        return os.path.basename(path)
    try:
        first = home.read("active_profile", 4096).decode("utf-8", "replace").splitlines() if home else []
    except OSError:
        first = []
    return (first[0].strip() if first else "") or "default"


def survey(boot: Boot, home: Folder, running: str | None) -> list[Profile]:
    """Return every profile of the volume with what to do about it: default first, then the folders of profiles/ in name order.

    running is the profile that the container's command starts, should it have no state yet.
    """
    multiplex = truthy(boot.setting("GATEWAY_MULTIPLEX_PROFILES"))
    found = [judge(home, "default", running, multiplex=False)]
    try:
        with home.folder("profiles") as profiles:
            for name in sorted(os.listdir(profiles.fd), key=os.fsencode):
                if (profile := survey_entry(profiles, name, running, multiplex)) is not None:
                    found.append(profile)
    except FileNotFoundError:
        pass
    except OSError as error:
        warn(f"profiles on the volume {fault(error)}, so no profile but default has a gateway; put a plain folder there")
    return found


def survey_entry(profiles: Folder, name: str, running: str | None, multiplex: bool) -> Profile | None:
    """Judge one entry of profiles/; None for a file, which is nobody's profile."""
    try:
        status = profiles.stat(name)
        if status is None or not (stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
            return None
        if why := name_fault(name):
            return Profile(name, None, "skipped", why)
        with profiles.folder(name) as folder:
            if why := soul_fault(folder):
                return Profile(name, None, "skipped", why)
            if name == "default":
                return Profile(name, None, "skipped", "the name is reserved for the root profile; rename profiles/default")
            return judge(folder, name, running, multiplex=multiplex)
    except OSError as error:
        return Profile(name, None, "skipped", f"profiles/{shown(name)} {fault(error)}; mend or remove it")


def judge(folder: Folder, name: str, running: str | None, *, multiplex: bool) -> Profile:
    """Decide from a profile's state file whether its gateway starts: only `running` does."""
    state, why = prior_state(folder)
    if state is None and not why and name == running:
        state = "running"
    start = state == "running" and not multiplex
    why = why or ("GATEWAY_MULTIPLEX_PROFILES leaves it to the default gateway" if state == "running" and multiplex else "")
    return Profile(name, state, "started" if start else "registered", why)


def clean_profile(folder: Folder) -> str:
    """Remove what a dead container's processes left in a profile; return what could not be removed, "" when all could."""
    for name in STALE_FILES:
        try:
            os.unlink(name, dir_fd=folder.fd)
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{name} {fault(error)}; remove it"
    return ""


# Slots


def quoted(text: str) -> str:
    """Return text as one word of a shell script."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def run_script(profile: str, extra_env: dict[str, str] | None = None) -> str:
    """Return a slot's run: the gateway of a profile, as hermes. Root does nothing here but drop; hermes can restart it at will.

    HERMES_S6_SUPERVISED_CHILD keeps hermes-agent from handing the gateway to s6 once more, and a sticky active_profile from
    capturing the slot. The API_SERVER_ variables are one gateway's, the default's: two on one port would loop.
    """
    arguments = "gateway run --replace" if profile == "default" else f"-p {profile} gateway run --replace"
    lines = [
        "#!/command/with-contenv sh",
        "exec 2>&1",
        'export HOME="${HERMES_HOME:-' + HOME + '}"',
        'export HERMES_HOME="$HOME" HERMES_S6_SUPERVISED_CHILD=1',
        'cd "$HOME" || cd /',
    ]
    if profile != "default":
        lines.append("unset $(awk 'BEGIN { for (name in ENVIRON) if (name ~ /^API_SERVER_[A-Z0-9_]+$/) print name }')")
    lines += [f"export {name}={quoted(value)}" for name, value in sorted((extra_env or {}).items())]
    lines += [f'[ "$(id -u)" = 0 ] || exec hermes {arguments}', f"exec s6-setuidgid {USER} hermes {arguments}"]
    return "\n".join(lines) + "\n"


def finish_script() -> str:
    """Return a slot's finish: park after EX_CONFIG; after five deaths in a minute, wait 2, 4, 8 ... BACK_OFF_LIMIT seconds.

    The wait ends a back-off when a run has lasted over a minute, and at once when somebody opens the FIFO `back-off` for writing.
    """
    return f"""#!/bin/sh
# $1: the exit code of run, or 256 when signal $2 ended it. s6-svdt lists the deaths: @ and the TAI64N time in hexadecimal.
[ "$1" != {EX_CONFIG} ] || exit {PERMANENT_FAILURE}
delay=0
set -- 0 0 0 0
for death in $(s6-svdt . | cut -c 10-17); do
  now=$((0x$death))
  if [ "$delay" -gt 0 ] && [ $((now - $4)) -le $((delay + 60)) ]; then
    delay=$((delay < {BACK_OFF_LIMIT // 2} ? delay * 2 : {BACK_OFF_LIMIT}))
  elif [ $((now - $1)) -le 60 ]; then
    delay=2
  else
    delay=0
  fi
  set -- "$2" "$3" "$4" "$now"
done
[ "$delay" -gt 0 ] || exit 0
echo "gateway: died too often, waiting $delay s before the next start" >&2
drop=
[ "$(id -u)" != 0 ] || drop="s6-setuidgid {USER}"
$drop timeout "$delay" cat back-off >/dev/null
exit 0
"""


def log_run_script(profile: str, *, to_folder: bool = True) -> str:
    """Return a slot's log/run: each line to the container's stderr, and with a timestamp to the profile's log folder."""
    folder = f' n10 s1000000 T "${{HERMES_HOME:-{HOME}}}/logs/gateways/{profile}"' if to_folder else ""
    return (
        f'#!/command/with-contenv sh\nexec 1>&2\n[ "$(id -u)" = 0 ] || exec s6-log 1{folder}\nexec s6-setuidgid {USER} s6-log 1{folder}\n'
    )


def slot_files(profile: str, stop_timeout: int, extra_env: dict[str, str] | None, *, to_folder: bool) -> dict[str, tuple[str, int]]:
    """Return path, content and mode of every regular file of a slot but `down`. Boot and run-time registration both use it."""
    return {
        "type": ("longrun\n", 0o644),
        "run": (run_script(profile, extra_env), 0o755),
        "finish": (finish_script(), 0o755),
        "timeout-kill": (f"{stop_timeout * 1000}\n", 0o644),
        "timeout-finish": (f"{(BACK_OFF_LIMIT + 5) * 1000}\n", 0o644),
        "log/run": (log_run_script(profile, to_folder=to_folder), 0o755),
    }


def put(folder: Folder, name: str, content: str, mode: int) -> None:
    """Write a file of a slot that nobody reads yet."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=folder.fd)
    os.write(fd, content.encode())
    os.close(fd)


def make_skeleton(folder: Folder) -> None:
    """Make what s6-supervise would make for root alone: found ready and ours, it stays ours, so hermes can control its slots."""
    for name, mode in (("event", 0o3730), ("supervise", 0o755), ("supervise/event", 0o3730)):
        os.mkdir(name, dir_fd=folder.fd)
        os.chmod(name, mode, dir_fd=folder.fd)
    os.mkfifo("supervise/control", dir_fd=folder.fd)
    os.chmod("supervise/control", 0o660, dir_fd=folder.fd)


def publish(scandir: Folder, profile: str, files: dict[str, tuple[str, int]], *, start: bool) -> None:
    """Put a profile's slot into the scandir. One that is there already, and perhaps running, keeps its folder and its process."""
    name = SLOT_PREFIX + profile
    found = scandir.stat(name)
    if found and stat.S_ISDIR(found.st_mode):
        refresh(scandir, name, files, start=start)
        return
    scandir.remove(name)
    build(scandir, name, files, start=start)


def build(scandir: Folder, name: str, files: dict[str, tuple[str, int]], *, start: bool) -> None:
    """Make a slot that is not there yet: built under a dot name, which s6-svscan ignores, then renamed into place."""
    temporary = f".{name}"[: 255 - len(".tmp")] + ".tmp"
    scandir.remove(temporary)
    os.mkdir(temporary, 0o755, dir_fd=scandir.fd)
    with Folder(temporary, scandir.fd) as slot:
        os.mkdir("log", 0o755, dir_fd=slot.fd)
        for path, (content, mode) in files.items():
            put(slot, path, content, mode)
        os.mkfifo("back-off", 0o600, dir_fd=slot.fd)
        if not start:
            put(slot, "down", "", 0o644)
        make_skeleton(slot)
        with slot.folder("log") as log:
            make_skeleton(log)
    os.rename(temporary, name, src_dir_fd=scandir.fd, dst_dir_fd=scandir.fd)


def refresh(scandir: Folder, name: str, files: dict[str, tuple[str, int]], *, start: bool) -> None:
    """Bring an existing slot's files up to date, each replaced whole; its process, if it has one, goes on."""
    wanted = dict(files) if start else files | {"down": ("", 0o644)}
    with scandir.folder(name) as slot:
        for path, (content, mode) in wanted.items():
            with slot.make(os.path.dirname(path) or ".") as folder:
                file = os.path.basename(path)
                try:
                    current = folder.read(file, STATE_LIMIT)
                except OSError:
                    current = None
                if current != content.encode():
                    folder.write(file, content.encode(), mode, replace=True)
        if start and slot.stat("down"):
            slot.remove("down")


def rescan(scandir: str, option: str = "-a") -> None:
    """Let s6-svscan take up new slots (-an: and let go of removed ones), where one watches this scandir."""
    if os.path.exists(f"{scandir}/.s6-svscan/control"):
        code, text = s6("s6-svscanctl", option, scandir)
        if code:
            warn(f"s6-svscanctl {option} {scandir} failed ({text}); run it again as root, or restart the container")


# The service manager


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
    """An s6 program failed, or what it was to bring about did not come about in time. The message has its stderr."""


class S6Command:
    """A running s6 program; many run at once. What it prints goes to memory, so that none waits for us to read."""

    __slots__ = ("pid", "output")

    def __init__(self, program: str, *arguments: str) -> None:
        """Start it; OSError when there is no such program."""
        self.output = os.memfd_create(program)
        actions = [(os.POSIX_SPAWN_DUP2, self.output, 1), (os.POSIX_SPAWN_DUP2, self.output, 2)]
        self.pid = os.posix_spawn(wrapper.s6_program(program), [program, *arguments], os.environ, file_actions=actions)

    def result(self) -> tuple[int, str]:
        """Wait for its end; return its code and what it printed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self.output, "rb") as file:
            file.seek(0)
            return code, file.read().decode(errors="replace").strip()


def s6(program: str, *arguments: str) -> tuple[int, str]:
    """Run an s6 program; return its code and what it printed."""
    try:
        return S6Command(program, *arguments).result()
    except OSError as error:
        return 127, f"{program}: {reason(error)}"


class S6ServiceManager:
    """Starts, stops, publishes and removes the gateways' slots, as hermes.

    scandir is s6-svscan's, home the root HERMES_HOME; both default to the container's. Names of services may have the prefix
    `gateway-` or not. Works on slots of its own and on those that hermes-agent's manager made.
    """

    kind = "s6"

    def __init__(self, scandir: str | None = None, home: str | None = None, *, environment: dict[str, str] | None = None) -> None:
        environment = wrapper.container_environment() if environment is None else environment
        self.environment = environment
        self.home = home or wrapper.root_home(environment)
        self.scandir = str(scandir or setting(environment, "S6_PROFILE_GATEWAY_SCANDIR") or SCANDIR)
        self.stop_timeout = seconds(environment, "HERMES_GATEWAY_STOP_TIMEOUT", STOP_TIMEOUT, 1)

    # Names

    def slot(self, name: str) -> str:
        """Return the path of a registered gateway's slot. Raises InvalidName or NotRegistered."""
        profile = self.valid(name)
        path = f"{self.scandir}/{SLOT_PREFIX}{profile}"
        if not os.path.isdir(path):
            raise NotRegistered(self.unknown(profile))
        return path

    def valid(self, name: str) -> str:
        """Return the profile that a service's name is about. Raises InvalidName."""
        profile = name.removeprefix(SLOT_PREFIX)
        if why := name_fault(profile):
            raise InvalidName(f"{shown(profile)}: {why}")
        return profile

    def unknown(self, profile: str) -> str:
        """Return the message for a profile without a slot, with the registered name that is nearest to it."""
        import difflib

        near = difflib.get_close_matches(profile, self.list_profile_gateways(), 1)
        advice = f"did you mean {near[0]}?" if near else f"make the profile with `hermes profile create {profile}`"
        return f"no such gateway: {profile}; {advice}"

    def list_profile_gateways(self) -> list[str]:
        """Return the profiles that have a slot, in name order."""
        try:
            names = os.listdir(self.scandir)
        except OSError:
            return []
        return sorted(name.removeprefix(SLOT_PREFIX) for name in names if name.startswith(SLOT_PREFIX))

    # State

    def status(self, name: str) -> dict[str, str]:
        """Return what s6 says of a gateway: up, wantedup, pid, exitcode, signal, updownfor. Raises CommandFailed."""
        fields = "up,wantedup,pid,exitcode,signal,updownfor"
        code, text = s6("s6-svstat", "-o", fields, self.slot(name))
        if code:
            raise CommandFailed(f"{name}: {text or 'no supervisor answers'}")
        return dict(zip(fields.split(","), text.split()))

    def is_running(self, name: str) -> bool:
        """Say whether a gateway's process is up, by s6. Raises NotRegistered, CommandFailed."""
        return self.status(name)["up"] == "true"

    def record(self, profile: str, desired: str) -> None:
        """Write the operator's intent to a profile's state file, keeping every other key. Raises CommandFailed."""
        import json

        def edit(data: bytes | None) -> bytes:
            try:
                state = load_state(data) if data else {}
            except ValueError:
                warn(f"{STATE_FILE} of {profile} was not a JSON object and starts anew")
                state = {}
            if state.get("desired_state") == desired and data:
                return data
            return json.dumps(state | {"desired_state": desired}).encode() + b"\n"

        try:
            with self.profile_folder(profile) as folder:
                folder.update(STATE_FILE, edit, STATE_LIMIT)
        except FileNotFoundError:
            pass  # a slot whose profile is gone has no intent to keep
        except OSError as error:
            raise CommandFailed(f"{profile}: {STATE_FILE} {fault(error)}, so this will be forgotten at the next boot") from error

    def profile_folder(self, profile: str) -> Folder:
        """Open a profile's folder."""
        with Folder(self.home, follow=True) as home:
            return home.folder("." if profile == "default" else f"profiles/{profile}")

    def announce_stop(self, profile: str) -> None:
        """Tell the gateway that the SIGTERM to come is meant: hermes-agent then ends with code 0 and says so in its log."""
        import json

        try:
            pid = int(self.status(profile)["pid"])
            started = int(wrapper.start_time(pid))
            written = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
            marker = {"target_pid": pid, "target_start_time": started, "stopper_pid": os.getpid(), "written_at": written}
            with self.profile_folder(profile) as folder:
                folder.write(".gateway-planned-stop.json", json.dumps(marker).encode(), 0o644, replace=True)
        except (OSError, ValueError, GatewayError):
            pass  # not up, or no profile: then there is nobody to tell

    # Life

    def start(self, name: str, *, timeout: float = 10) -> None:
        """Start one gateway and record that. Raises NotRegistered, InvalidName, CommandFailed; timeout in seconds."""
        self.raise_first(self.start_all([name], timeout=timeout))

    def stop(self, name: str, *, timeout: float | None = None) -> None:
        """Stop one gateway and record that; s6 sends SIGKILL after the slot's own timeout-kill. Raises as start does."""
        self.raise_first(self.stop_all([name], timeout=timeout))

    def restart(self, name: str, *, timeout: float | None = None) -> None:
        """Stop and start one gateway, recording that it should run. Raises as start does."""
        self.raise_first(self.restart_all([name], timeout=timeout))

    def patience(self, timeout: float | None) -> float:
        """Return how long to wait for an end: as asked for, else a little longer than s6 waits before it kills."""
        return self.stop_timeout + 5 if timeout is None else timeout

    def raise_first(self, failures: dict[str, GatewayError]) -> None:
        """Raise the failure of a single gateway's command."""
        for error in failures.values():
            raise error

    def start_all(self, names: list[str], *, timeout: float = 10) -> dict[str, GatewayError]:
        """Start gateways, all at once; return what failed, by name."""
        return self.carry_out(names, "running", ((True, timeout),))

    def stop_all(self, names: list[str], *, timeout: float | None = None) -> dict[str, GatewayError]:
        """Stop gateways, all at once; return what failed, by name."""
        return self.carry_out(names, "stopped", ((False, self.patience(timeout)),))

    def restart_all(self, names: list[str], *, timeout: float | None = None) -> dict[str, GatewayError]:
        """Stop and start gateways, all at once; return what failed, by name."""
        return self.carry_out(names, "running", ((False, self.patience(timeout)), (True, 10)))

    def carry_out(self, names: list[str], desired: str, steps: tuple[tuple[bool, float], ...]) -> dict[str, GatewayError]:
        """Record the intent and take the steps, each (up, timeout); return what failed, by name. The intent is written once more at
        the end: the agent writes the same file without our lock, and may have put back what it read before."""
        failures = self.prepare(names, desired)
        for up, patience in steps:
            failures |= self.bring([name for name in names if name not in failures], up=up, timeout=patience)
        return failures | self.prepare([name for name in names if name not in failures], desired)

    def prepare(self, names: list[str], desired: str) -> dict[str, GatewayError]:
        """Check that gateways exist and record the intent for them; return what failed, by name."""
        failures: dict[str, GatewayError] = {}
        for name in names:
            try:
                self.slot(name)
                self.record(self.valid(name), desired)
            except GatewayError as error:
                failures[name] = error
        return failures

    def bring(self, names: list[str], *, up: bool, timeout: float) -> dict[str, GatewayError]:
        """Tell s6 to bring slots up or down, all in parallel, and wait until it has; return what failed, by name."""
        slots = {name: self.slot(name) for name in names}
        if not up:
            for name in names:
                self.announce_stop(self.valid(name))
        commands = {name: S6Command("s6-svc", "-u" if up else "-d", slot) for name, slot in slots.items()}
        failures: dict[str, GatewayError] = {}
        for name, command in commands.items():
            code, text = command.result()
            if code:
                failures[name] = CommandFailed(f"{name}: {text}; restart the container if no supervisor answers")
        waiting = [name for name in names if name not in failures]
        deadline = time.monotonic() + timeout
        while waiting:
            for name in waiting:
                end_back_off(slots[name])
            s6("s6-svwait", "-u" if up else "-D", "-t", "200", *(slots[name] for name in waiting))
            waiting = [name for name in waiting if not self.settled(name, up, failures)]
            if time.monotonic() > deadline:
                verb = "come up" if up else "end"
                failures |= {name: CommandFailed(f"{name}: did not {verb} within {timeout:g} s") for name in waiting}
                break
        return failures

    def settled(self, name: str, up: bool, failures: dict[str, GatewayError]) -> bool:
        """Say whether a slot is where it was told to be, or will not get there, which is a failure."""
        try:
            status = self.status(name)
        except GatewayError as error:
            failures[name] = error
            return True
        if up and status["up"] == "false" and status["wantedup"] == "false":
            failures[name] = CommandFailed(f"{name}: ended at once with code {status['exitcode']} and is parked; see its log")
            return True
        return (status["up"] == "true") is up

    # Registration

    def supports_runtime_registration(self) -> bool:
        """Say that slots can be published while the container runs."""
        return True

    def register_profile_gateway(self, profile: str, *, extra_env: dict[str, str] | None = None, start_now: bool = True) -> None:
        """Publish a profile's slot, whole or not at all, and wait until s6 supervises it.

        extra_env is exported to the gateway; without start_now the slot waits for `start`. Raises InvalidName, AlreadyRegistered,
        CommandFailed.
        """
        self.valid(profile)
        for name, value in (extra_env or {}).items():
            if not name.isascii() or not name.isidentifier() or "\0" in value:
                raise InvalidName(f"extra_env: {name!r} cannot be a variable; use letters, digits and _")
        name = SLOT_PREFIX + profile
        try:
            with Folder(self.home, follow=True) as home:
                log_fault = make_log_folder(home, profile)
            files = slot_files(profile, self.stop_timeout, extra_env, to_folder=not log_fault)
            with Folder(self.scandir, follow=True) as scandir, Lock(scandir):
                if scandir.stat(name):
                    raise AlreadyRegistered(f"{profile}: has a gateway already")
                build(scandir, name, files, start=start_now)
        except OSError as error:
            raise CommandFailed(f"{profile}: its slot could not be made: {reason(error)}") from error
        if log_fault:
            warn(log_fault)
        rescan(self.scandir)
        if not until(lambda: is_supervised(f"{self.scandir}/{name}"), 5) and os.path.exists(f"{self.scandir}/.s6-svscan/control"):
            raise CommandFailed(f"{profile}: s6-svscan did not take up its slot within 5 s")

    def unregister_profile_gateway(self, profile: str, *, timeout: float | None = None) -> None:
        """Stop a gateway within timeout seconds and remove its slot, supervisors and logger included.

        Raises NotRegistered, InvalidName, CommandFailed; when it does not end in time, its slot stays.
        """
        slot = self.slot(profile)
        if is_supervised(slot):
            self.raise_first(self.bring([profile], up=False, timeout=self.patience(timeout)))
        name = os.path.basename(slot)
        removed = f".{name}"[:230] + f".{time.time_ns():x}"
        try:
            with Folder(self.scandir, follow=True) as scandir:
                with Lock(scandir):
                    os.rename(name, removed, src_dir_fd=scandir.fd, dst_dir_fd=scandir.fd)
                rescan(self.scandir, "-an")
                path = f"{self.scandir}/{removed}"
                if not until(lambda: not is_supervised(path) and not is_supervised(f"{path}/log"), 10):
                    raise CommandFailed(f"{profile}: its supervisors did not end within 10 s")
                scandir.remove(removed)
        except FileNotFoundError:
            raise NotRegistered(f"no such gateway: {profile}; somebody else has just removed it") from None
        except OSError as error:
            raise CommandFailed(f"{profile}: its slot could not be removed: {reason(error)}") from error


def until(condition, timeout: float) -> bool:
    """Poll a condition that s6 has no event for; say whether it came to hold within timeout seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def opens_for_writing(path: str) -> bool:
    """Say whether somebody reads from a FIFO."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW))
    except OSError:
        return False
    return True


def is_supervised(slot: str) -> bool:
    """Say whether an s6-supervise reads a slot's control FIFO."""
    return opens_for_writing(f"{slot}/supervise/control")


def end_back_off(slot: str) -> None:
    """Wake a finish script that waits before the next start: opening its FIFO is the signal."""
    opens_for_writing(f"{slot}/back-off")


def become_hermes() -> None:
    """Drop root for good: what the manager writes belongs to hermes, and nothing on the volume can use root."""
    owner = wrapper.account()
    if os.geteuid() == 0 and owner:
        wrapper.drop(*owner)


def answer_gateway_request(action: str, profile: str | None, every: bool, environment: dict[str, str]) -> int:
    """Be `hermes [-p NAME] gateway start|stop|restart [--all]`; return the exit code."""
    sys.argv = [USER]
    os.umask(0o022)
    return guarded(control, action, profile, every, environment)


def control(action: str, profile: str | None, every: bool, environment: dict[str, str]) -> int:
    """Start, stop or restart one gateway or all, say what became of each, and go on past a failure."""
    become_hermes()
    manager = S6ServiceManager(environment=environment)
    names = manager.list_profile_gateways() if every else [named_profile(manager, profile)]
    failures = getattr(manager, f"{action}_all")(names)
    for name in names:
        if name not in failures:
            print(f"{name}: {DONE[action]}")
    return report_failures(failures)


def named_profile(manager: S6ServiceManager, option: str | None) -> str:
    """Return the profile that a command is about."""
    try:
        with Folder(manager.home, follow=True) as home:
            return chosen_profile(option, manager.environment, home)
    except OSError:
        return chosen_profile(option, manager.environment, None)


def report_failures(failures: dict[str, GatewayError]) -> int:
    """Say what failed; return the exit code: a single failure's own, else 1."""
    for error in failures.values():
        say("error", str(error))
    codes = {error.exit_code for error in failures.values()}
    return codes.pop() if len(codes) == 1 else int(bool(codes))


def register_one(manager: S6ServiceManager, profile: str) -> int:
    """Publish a profile's slot as the next boot would: started if its state says so."""
    manager.valid(profile)
    try:
        with manager.profile_folder(profile) as folder:
            start = prior_state(folder)[0] == "running"
    except OSError:
        raise NotRegistered(f"no such profile: {profile}; make it with `hermes profile create {profile}`") from None
    manager.register_profile_gateway(profile, start_now=start)
    print(f"{profile}: registered{', started' if start else ''}")
    return 0


def unregister_one(manager: S6ServiceManager, profile: str) -> int:
    """Remove a profile's slot."""
    manager.unregister_profile_gateway(profile)
    print(f"{profile}: unregistered")
    return 0


def show_status(manager: S6ServiceManager, names: list[str], as_json: bool) -> int:
    """Print s6's word on gateways; return 0 when all of them are up, else 3."""
    rows, failures = {}, {}
    for name in names:
        try:
            rows[name] = manager.status(name)
        except GatewayError as error:
            failures[name] = error
    if as_json:
        import json

        print(json.dumps(rows))
    for name, row in {} if as_json else rows.items():
        ended = f"code {row['exitcode']}" if row["signal"] == "NA" else row["signal"]
        last = f"pid {row['pid']}" if row["up"] == "true" else f"last ended with {ended}"
        print(f"{name}: {'up' if row['up'] == 'true' else 'down'} for {row['updownfor']} s, {last}")
    up = all(row["up"] == "true" for row in rows.values())
    return report_failures(failures) or (0 if up else 3)


DONE = {"start": "started", "stop": "stopped", "restart": "restarted"}
GATEWAY_USAGE = """usage: hermes_boot.py gateway ACTION [-p NAME | --all] [--json]

  start, stop, restart   do it, wait for it, and remember it over a restart of the container
  status                 say what s6 knows; with --json as an object
  list                   name the profiles that have a slot
  register, unregister   publish or remove a profile's slot

  -p, --profile NAME     the profile; without it the active one, as for `hermes`
  --all                  every registered one; goes on past a failure

exit codes: 0 done, 1 failed, 2 wrong usage, 3 not running (status), 4 no such gateway
"""


class Usage(Exception):
    """A command line that is not understood."""


def gateway_command(words: list[str], environment: dict[str, str]) -> int:
    """Run `hermes_boot.py gateway …`; return the exit code."""
    if words in (["--help"], ["-h"]):
        print(GATEWAY_USAGE, end="")
        return 0
    try:
        return act(*gateway_arguments(words), environment)
    except Usage as error:
        say("error", str(error))
        print(GATEWAY_USAGE, end="", file=sys.stderr)
        return 2
    except GatewayError as error:
        return report_failures({"": error})


def gateway_arguments(words: list[str]) -> tuple[str, str | None, bool, bool]:
    """Return (action, profile, all, json) of a command line. Raises Usage."""
    action, profile, every, as_json, rest = "", None, False, False, list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-p", "--profile") and rest:
            profile = rest.pop(0)
        elif word.startswith("--profile="):
            profile = word.removeprefix("--profile=")
        elif word == "--all":
            every = True
        elif word == "--json":
            as_json = True
        elif word in (*DONE, "status", "list", "register", "unregister") and not action:
            action = word
        else:
            raise Usage(f"unknown argument {word!r}")
    if not action or (every and profile is not None) or (every and action.endswith("register")):
        raise Usage("an action is needed, for one profile (-p NAME) or --all" if not action else f"{action}: -p NAME or --all, not both")
    return action, profile, every, as_json


def act(action: str, profile: str | None, every: bool, as_json: bool, environment: dict[str, str]) -> int:
    """Carry out an understood command line."""
    if action in DONE:
        return control(action, profile, every, environment)
    become_hermes()
    manager = S6ServiceManager(environment=environment)
    if action == "list":
        names = manager.list_profile_gateways()
        if as_json:
            import json

            print(json.dumps(names))
        else:
            print("".join(f"{name}\n" for name in names), end="")
        return 0
    name = named_profile(manager, profile)
    if action == "status":
        return show_status(manager, manager.list_profile_gateways() if every or profile is None else [name], as_json)
    return (register_one if action == "register" else unregister_one)(manager, name)


# The phases


def setup(boot: Boot) -> int:
    """Remap, own, seed and migrate. Raises Fatal for what the boot cannot work around."""
    euid, image_owner = os.geteuid(), boot.owner
    if euid not in (0, boot.owner[0]):
        raise Fatal(f"started as UID {euid}, which is not {USER}'s; drop `--user` and set HERMES_UID={euid} HERMES_GID={os.getegid()}")
    remap(boot)
    boot.does(f"run as {boot.owner[0]}:{boot.owner[1]}")
    if euid == 0:
        join_groups(boot)
        own_static_services(boot)
        own_volume(boot, former=image_owner[0])
    elif not boot.dry_run:
        say("info", f"started as {USER} itself, so owners, groups and services stay as they are")
        make_home(boot)
    if not os.path.isdir(boot.home):
        return 0  # dry run on a volume that is still to be made
    fresh = not os.path.lexists(f"{boot.home}/config.yaml")
    if code := as_owner(boot.owner, seed, boot):
        return code
    sync_skills(boot)
    migrate_config(boot, fresh=fresh)
    return 0


def setup_phase(boot: Boot) -> int:
    """Run the setup, and leave word for the reconciler when it fails: s6-overlay runs every cont-init script regardless."""
    code = guarded(setup, boot)
    if not boot.dry_run:
        try:
            if code:
                os.close(os.open(SETUP_FAILED, os.O_WRONLY | os.O_CREAT, 0o644))
            elif os.path.exists(SETUP_FAILED):
                os.unlink(SETUP_FAILED)
        except OSError:
            pass  # not in a container of ours: then nobody reads it either
    return code


def reconcile_phase(boot: Boot) -> int:
    """Give every profile a slot, as hermes, after handing it the scandir."""
    if os.path.exists(SETUP_FAILED):
        return 1  # the setup has said why; a gateway with the wrong owner would do harm
    if boot.setting("HERMES_RECONCILE").lower() in ("0", "false", "no", "off"):
        boot.does("leave the gateways alone, since HERMES_RECONCILE is off")
        return 0
    command = container_command()
    if is_dashboard(command):
        boot.does("leave the gateways to another container, since this one's command is the dashboard")
        return 0
    if not os.path.isdir(boot.home):
        if boot.dry_run:
            return 0  # setup would make it first
        raise Fatal(f"HERMES_HOME={boot.home!r} does not exist; run the setup first, or set it right")
    if not boot.dry_run:
        own_scandir(boot)
    return as_owner(boot.owner, reconcile, boot, command)


def own_scandir(boot: Boot) -> None:
    """Hand the scandir and s6-svscan's control FIFO to hermes, which publishes slots at run time."""
    try:
        os.makedirs(boot.scandir, 0o755, exist_ok=True)
        folder = Folder(boot.scandir, follow=True)
    except OSError as error:
        raise Fatal(f"the scandir {shown(boot.scandir)} {fault(error)}, so no gateway can run; make it a writable folder") from error
    with folder as scandir:
        if os.geteuid() != 0:
            return
        sweep = Sweep(boot)
        sweep.claim(".", scandir.fd)
        try:
            with scandir.folder(".s6-svscan") as control:
                sweep.claim(".", control.fd)
                sweep.claim("control", control.fd)
        except FileNotFoundError:
            pass  # no s6-svscan watches it


def reconcile(boot: Boot, command: list[str]) -> int:
    """As hermes: find the profiles, publish their slots, say and log a line for each."""
    with open_home(boot) as home:
        profiles = survey(boot, home, run_profile(boot, command, home))
        if boot.dry_run:
            for profile in profiles:
                boot.does(f"publish: {profile.line().split(' ', 1)[1].rstrip()}")
            return 0
        with Folder(boot.scandir, follow=True) as scandir:
            timeout = seconds(boot.environment, "HERMES_GATEWAY_STOP_TIMEOUT", STOP_TIMEOUT, 1)
            for profile in profiles:
                if profile.action != "skipped":
                    register(home, scandir, profile, timeout)
        rescan(boot.scandir)
        log_boot(boot, home, [profile.line() for profile in profiles])
    return 0


def register(home: Folder, scandir: Folder, profile: Profile, timeout: int) -> None:
    """Publish one profile's slot; what is in the way of that, or of its log, becomes the profile's own reason."""
    try:
        with home.folder("." if profile.name == "default" else f"profiles/{profile.name}") as folder:
            profile.why = clean_profile(folder) or profile.why
        log_fault = make_log_folder(home, profile.name)
        profile.why = profile.why or log_fault
        publish(scandir, profile.name, slot_files(profile.name, timeout, None, to_folder=not log_fault), start=profile.action == "started")
    except OSError as error:
        profile.action, profile.why = "skipped", f"its slot could not be made ({reason(error)}); make the scandir writable for hermes, with space left"


def make_log_folder(home: Folder, profile: str) -> str:
    """Make the folder that s6-log writes a profile's log to; return why it cannot be, "" when it can."""
    try:
        with home.make(f"logs/gateways/{profile}"):
            return ""
    except OSError as error:
        return f"logs/gateways/{profile} {fault(error)}, so its log goes to the container's alone; put plain folders there"


def log_boot(boot: Boot, home: Folder, lines: list[str]) -> None:
    """Write the boot's lines to stderr and to logs/container-boot.log, which is rotated once it is over BOOT_LOG_LIMIT bytes."""
    if not boot.quiet:
        sys.stderr.write("".join(lines))
        sys.stderr.flush()
    try:
        with home.make("logs") as logs:
            found = logs.stat(BOOT_LOG)
            if found and stat.S_ISREG(found.st_mode) and found.st_size >= BOOT_LOG_LIMIT:
                os.rename(BOOT_LOG, f"{BOOT_LOG}.1", src_dir_fd=logs.fd, dst_dir_fd=logs.fd)
            fd = os.open(BOOT_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=logs.fd)
            with open(fd, "wb") as file:
                file.write("".join(lines).encode())
    except OSError as error:
        warn(f"logs/{BOOT_LOG} {fault(error)}; this boot is only on stderr")


# The end


def shut_down(boot: Boot) -> int:
    """End every gateway and the CMD, all at once, and return when the last is gone or HERMES_SHUTDOWN_TIMEOUT seconds are over.

    Run by s6-overlay from cont-finish.d, before its final kill. No intent is recorded, so what ran comes back at the next boot.
    """
    become_hermes()
    manager = S6ServiceManager(environment=boot.environment)
    deadline = time.monotonic() + seconds(boot.environment, "HERMES_SHUTDOWN_TIMEOUT", SHUTDOWN_TIMEOUT, 0)
    slots = [f"{manager.scandir}/{SLOT_PREFIX}{name}" for name in manager.list_profile_gateways()]
    slots = [slot for slot in slots if is_supervised(slot)]
    commands = [S6Command("s6-svc", "-d", slot) for slot in slots]
    if command := wrapper.command_process():
        os.kill(command, SIGTERM)
    for stopping in commands:
        stopping.result()
    while slots and time.monotonic() < deadline:
        for slot in slots:
            end_back_off(slot)
        if s6("s6-svwait", "-D", "-t", "100", *slots)[0] == 0:
            break
    until(lambda: not wrapper.command_process(), deadline - time.monotonic())
    return 0


# Command line


ROLES = {
    "10-hermes-shutdown": "shutdown",
    "01-hermes-setup": "setup",
    "stage2-hook.sh": "setup",
    "02-reconcile-profiles": "reconcile",
    "entrypoint.sh": "entrypoint",
}
USAGE = """usage: hermes_boot.py [setup | reconcile] [--dry-run]
       hermes_boot.py gateway ACTION [-p NAME | --all] [--json]
       hermes_boot.py shutdown

  setup       remap the hermes user, mend ownership on the volume, seed it, migrate its configuration
  reconcile   give every profile on the volume a gateway slot
  gateway     start, stop, restart, register, unregister, status, list; see `gateway --help`
  shutdown    end every gateway and the container's command, as at the container's end
  --dry-run   list what would change, change nothing

Without a subcommand: setup, then reconcile.
"""


def main(argv: list[str]) -> int:
    """Run the phase that our name or the first argument asks for; return the exit code: 0 done, 1 failed, 2 wrong usage."""
    sys.argv = argv
    os.umask(0o022)
    role, words = ROLES.get(os.path.basename(argv[0]), ""), argv[1:]
    if role == "entrypoint":
        warn("docker/entrypoint.sh is deprecated; use the image's ENTRYPOINT, /init")
        role = "setup"
    if not role and words[:1] == ["gateway"]:
        return guarded(gateway_command, words[1:], exec_environment())
    if words in (["--help"], ["-h"]):
        print(USAGE, end="")
        return 0
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    if not role and len(words) == 1 and words[0] in ("setup", "reconcile", "shutdown"):
        role = words.pop()
    if words and os.path.basename(argv[0]) not in ROLES:
        say("error", f"unknown argument {words[0]!r}")
        print(USAGE, end="", file=sys.stderr)
        return 2
    return guarded(run_phases, role, dry_run)


def exec_environment() -> dict[str, str]:
    """Return the environment of `docker exec`: the process's own, and where a login shell has scrubbed that, the container's."""
    return wrapper.container_environment() | wrapper.process_environment()


def run_phases(role: str, dry_run: bool) -> int:
    """Run setup, reconcile or shutdown, or with an empty role setup and reconcile."""
    boot = Boot(wrapper.container_environment(), dry_run=dry_run)
    if role == "shutdown":
        return shut_down(boot)
    code = setup_phase(boot) if role != "reconcile" else 0
    return code if code or role == "setup" else reconcile_phase(boot)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
