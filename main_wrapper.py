#!/usr/bin/python3 -IBScimport sys,os.path as p;sys.path[:0]=[p.realpath(sys.argv[1]+"/..")];import main_wrapper as m;m.run()
"""The container's CMD, and under the name `hermes` the image's `hermes` command.

Run as root by s6-overlay (CMD) or by whoever calls `docker exec` (hermes); ends as another program, run as the user hermes.
It assumes only that /etc/passwd knows hermes and that s6-setuidgid exists. It guarantees that nothing of the program's is
changed on the way: argv, environment and working directory arrive byte for byte; stdin, stdout, stderr, the TTY, signals and the
exit code are the program's own, since this script execs and never waits.

The first line imports this file in place of running it, so that Python finds its bytecode: 2 ms less at every `hermes`, and
15 ms less at every call of hermes_boot.py. It is as short as it is because Linux before 5.1, as many a NAS has, and gVisor read no
more than 127 bytes of it. `from __future__ import annotations` is left out, since here that import takes 0.4 ms of every `hermes`.
hermes_boot.py takes the image's paths, environment, accounts and drop from this file.
"""

import os
import sys

USER = "hermes"
HOME = "/opt/data"  # of the user, and HERMES_HOME unless that is set
VENV = "/opt/hermes/.venv"
HERMES = f"{VENV}/bin/hermes"
COMMAND_FOLDERS = ("/opt/hermes/bin", f"{VENV}/bin")
COMMAND_PROCESS = "/run/hermes-command"  # pid and start time of the CMD, for its graceful end
SUPERVISOR_PROCESS = "/run/hermes-supervisor"  # and of hermes_boot.py where it stands in for s6-overlay, which must be PID 1
S6_INIT = "/init.s6-overlay"
CONTAINER_ENVIRONMENT = "/run/s6/container_environment"
NOT_EXECUTABLE, NOT_FOUND = 126, 127
SIGPIPE, SIGXFSZ = 13, 25


# Environment


def content(path: str) -> bytes:
    """Return a file's content, as open() would in three times the time: an environment is a file for each variable. Raises OSError."""
    fd, parts = os.open(path, os.O_RDONLY), []
    try:
        while part := os.read(fd, 1 << 15):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts)


def process_environment() -> dict[str, str]:
    """Return the environment as it was handed over: Python itself may have added LC_CTYPE to os.environ (PEP 538)."""
    try:
        pairs = content("/proc/self/environ").split(b"\0")
    except OSError:
        return dict(os.environ)
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)


def container_environment() -> dict[str, str]:
    """Return the environment that the container was given, for programs that s6-overlay starts with a scrubbed one.

    One file per variable in /run/s6/container_environment, its content the value. With S6_KEEP_ENV=1 there is no such folder, and
    the process's own environment is right as it is.
    """
    environment = process_environment()
    try:
        names = os.listdir(CONTAINER_ENVIRONMENT)
    except OSError:
        return environment
    for name in names:
        try:
            environment[name] = os.fsdecode(content(f"{CONTAINER_ENVIRONMENT}/{name}"))
        except OSError:
            continue  # removed meanwhile, or not a file: not a variable
    return environment


def setting(environment: dict[str, str], name: str) -> str:
    """Return a variable that is addressed to us, "" when unset; the line end that `echo` leaves in s6's folder is not part of it."""
    return environment.get(name, "").removesuffix("\n")


def truthy(value: str) -> bool:
    """Say whether a switch is on: 1, true, yes or on, in any case."""
    return value.strip().lower() in ("1", "true", "yes", "on")


def root_home(environment: dict[str, str]) -> str:
    """Return the root profile's HERMES_HOME: of <root>/profiles/<name>, as `hermes` sets it for a profile, that is <root>."""
    home = setting(environment, "HERMES_HOME") or HOME
    parent = os.path.dirname(home.rstrip("/"))
    return os.path.dirname(parent) if os.path.basename(parent) == "profiles" else home


def program_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment for a program of the image: HOME, HERMES_HOME, VIRTUAL_ENV, and PATH with our folders on it."""
    path = environment.get("PATH") or os.defpath
    missing = [folder for folder in COMMAND_FOLDERS if folder not in path.split(":")]
    return environment | {
        "HOME": root_home(environment),
        "HERMES_HOME": setting(environment, "HERMES_HOME") or HOME,
        "PATH": ":".join([*missing, path]),
        "VIRTUAL_ENV": VENV,
    }


# Privilege


def account(name: str = USER) -> tuple[int, int] | None:
    """Return a user's UID and GID from /etc/passwd, None when it has no such user."""
    for line in content("/etc/passwd").split(b"\n"):
        fields = line.split(b":")
        if fields[0] == name.encode() and len(fields) == 7:
            return int(fields[2]), int(fields[3])
    return None


def drop(uid: int, gid: int) -> None:
    """Become a user for good, as s6-setuidgid does: groups from /etc/group first, then GID, then UID. OSError if the kernel refuses."""
    os.initgroups(USER, gid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def s6_program(name: str) -> str:
    """Return the path of an s6 program: /command is s6-overlay's, and on PATH only below its supervision tree."""
    for folder in ("/command", *os.environ.get("PATH", "").split(":"), "/usr/bin"):
        if folder and os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    return f"/command/{name}"


def s6_is_pid_1() -> bool:
    """Say whether s6-overlay supervises this container; works without privilege, which reading /proc/1/exe would not."""
    try:
        return content("/proc/1/comm") == b"s6-svscan\n" and os.path.isdir("/run/s6/basedir")
    except OSError:
        return False


def supervised() -> bool:
    """Say whether s6 keeps this container's gateways, as PID 1 or below another one."""
    return s6_is_pid_1() or noted_process(SUPERVISOR_PROCESS) != 0


def as_hermes(argv: list[str]) -> list[str]:
    """Return the argv that runs a program as hermes: by s6-setuidgid when we are root, else as it is."""
    return [s6_program("s6-setuidgid"), USER, *argv] if os.geteuid() == 0 else argv


def run_as_hermes(argv: list[str], environment: dict[str, str], *, stay_root: bool = False) -> int:
    """Exec a program, as hermes when we are root; return only when that fails: 127 not found, 126 not executable."""
    argv = argv if stay_root else as_hermes(argv)
    restore_signals()
    try:
        os.execve(argv[0], argv, environment)
    except OSError as error:
        print(f"main_wrapper: error: cannot run {argv[0]!r}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


def restore_signals() -> None:
    """Undo what Python does to signals at its start: an exec'd program would inherit SIGPIPE and SIGXFSZ ignored."""
    import _signal  # `signal` itself would cost 5 ms for its enums

    for number in (SIGPIPE, SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


# Routing


def program_of(words: list[str], environment: dict[str, str]) -> list[str]:
    """Return the argv that the CMD's words become: a program by path or on PATH as it is, anything else is hermes's arguments."""
    word = words[0] if words else ""
    if "/" in word:
        return words
    if word and word != USER and not word.startswith("-"):
        for folder in environment["PATH"].split(":"):
            path = os.path.join(folder, word)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return [path, *words[1:]]
    return [HERMES, *(words[1:] if word == USER else words)]


def profile_option(words: list[str]) -> tuple[str | None, list[str]]:
    """Split a leading -p NAME, --profile NAME or --profile=NAME off hermes's arguments."""
    if len(words) > 1 and words[0] in ("-p", "--profile"):
        return words[1], words[2:]
    if words and words[0].startswith("--profile="):
        return words[0].removeprefix("--profile="), words[1:]
    return None, words


def gateway_request(words: list[str]) -> tuple[str, str | None, bool] | None:
    """Return (action, profile, all) when hermes's arguments are exactly `[-p NAME] gateway start|stop|restart [--all]`, else None."""
    profile, rest = profile_option(words)
    if len(rest) < 2 or rest[0] != "gateway" or rest[1] not in ("start", "stop", "restart") or rest[2:] not in ([], ["--all"]):
        return None
    return rest[1], profile, rest[2:] == ["--all"]


def hermes_command(words: list[str]) -> int:
    """Be the `hermes` command: answer for the gateways that s6 supervises, hand everything else to the real program untouched."""
    environment = process_environment()
    if "HERMES_HOME" not in environment:  # a login shell's, by ssh
        environment = container_environment()
    request = gateway_request(words)
    if request and supervised():
        import hermes_boot

        return hermes_boot.answer_gateway_request(*request, environment)
    stay_root = truthy(environment.get("HERMES_DOCKER_EXEC_AS_ROOT", ""))
    return run_as_hermes([HERMES, *words], environment if stay_root else program_environment(environment), stay_root=stay_root)


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the machine did; OSError when there is none. See proc(5)."""
    return content(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19].decode()


def note_process(path: str) -> None:
    """Leave word of who we are, whole; exec keeps the pid. Only the container's end needs it, so no failure matters. /run may be
    everybody's to write, so no file that is there already is written to."""
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


def noted_process(path: str) -> int:
    """Return the pid that was left there, by root or by who we are, 0 when that process has ended; the start time tells it from a later
    one of its number."""
    try:
        if os.lstat(path).st_uid not in (0, os.geteuid()):
            return 0
        pid, started = content(path).decode().split()
        return int(pid) if start_time(int(pid)) == started else 0
    except (OSError, ValueError):
        return 0


def tini_program(words: list[str]) -> list[str]:
    """Return what /init is to run when an old template calls tini: its options gone, its entrypoint.sh the CMD's wrapper."""
    words = list(words)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option == "--":
            break
        if option in ("-p", "-e"):  # these have a value
            del words[:1]
    name = os.path.basename(words[0]) if words else "init"
    if name == "entrypoint.sh":
        return [os.path.join(os.path.dirname(os.path.realpath(__file__)), "main-wrapper.sh"), *words[1:]]
    return words[1:] if name == "init" else words


def obstacle() -> str:
    """Return what keeps s6-overlay from starting, "" when nothing does.

    It must be PID 1, and /run must be its user's: else it takes it, by a setuid program that needs the capability CHOWN (number 0),
    which Kubernetes' no_new_privs and dropped capabilities forbid.
    """
    if os.getpid() != 1:
        return "another process is PID 1"
    if os.geteuid() in (0, os.stat("/run").st_uid):
        return ""
    status = dict(line.split(b":\t", 1) for line in content("/proc/self/status").split(b"\n") if b":\t" in line)
    may_take_it = status.get(b"NoNewPrivs", b"unknown before Linux 4.10").strip() == b"0" and int(status.get(b"CapBnd", b"1"), 16) & 1
    return "" if may_take_it else "/run belongs to another user and no new privileges are allowed"


def init(words: list[str]) -> int:
    """Be /init: s6-overlay's own where that can start, else hermes_boot.py in its place."""
    environment = process_environment()
    if not (why := obstacle()):
        restore_signals()
        os.execve(S6_INIT, ["/init", *words], environment)
    import hermes_boot

    return hermes_boot.stand_in_for_init(words, environment, why)


def main(argv: list[str]) -> int:
    """Run as the name we were called by: `hermes`, `init`, `tini`, else the container's CMD. Returns when the program cannot be run."""
    name = os.path.basename(argv[0])
    if name == USER:
        return hermes_command(argv[1:])
    if name == "init":
        return init(argv[1:])
    if name == "tini":
        return init(tini_program(argv[1:]))
    environment = program_environment(container_environment())
    if not noted_process(COMMAND_PROCESS):  # not somebody's call of this script in a running container
        note_process(COMMAND_PROCESS)
    program = program_of(argv[1:], environment)
    if program[0] == HERMES and profile_option(program[1:])[1][:2] == ["gateway", "run"] and supervised():
        import hermes_boot

        if hermes_boot.hold_gateway(program[1:], environment):
            program = program_of(["sleep", "infinity"], environment)
    return run_as_hermes(program, environment)


def run() -> None:
    """Be the script that the first line was given."""
    raise SystemExit(main(sys.argv[1:]))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    raise SystemExit(main(sys.argv))
