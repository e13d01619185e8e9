#!/usr/bin/python3 -IBS
"""The container's command, and under the name `hermes` the image's `hermes` command.

Run as root by s6-overlay (container command) or by whoever calls `docker exec` (hermes); ends as another program, run
as the user hermes. It assumes only that /etc/passwd knows hermes and that s6-setuidgid exists. It guarantees that
nothing of the program's is changed on the way: argv, environment and working directory arrive byte for byte, except for
variables whose name is no identifier, which s6-overlay's shell has dropped; stdin, stdout, stderr, the TTY, signals and
the exit code are the program's own, since this script execs and never waits.

Where gateways or a fallback init are asked for, it execs hermes_boot.py, by its command line; neither script imports
the other. What both need stands in both, as the same text. The image's names for this script are links to an entry stub
of five lines, which imports it, so that Python finds its bytecode. `from __future__ import annotations` would cost 0.4
ms of every `hermes`.
"""

import os
import sys

# What both scripts need

USER = "hermes"
HOME = "/opt/data"  # of the user, and HERMES_HOME unless that is set
VENV = "/opt/hermes/.venv"
HERMES = f"{VENV}/bin/hermes"
COMMAND_FOLDERS = ("/opt/hermes/bin", f"{VENV}/bin")
COMMAND_PROCESS = "/run/hermes-command"  # pid and start time of the container command, for its graceful shutdown
SUPERVISOR_PROCESS = "/run/hermes-supervisor"  # and of the fallback init, hermes_boot.py where s6-overlay cannot start
CONTAINER_ENVIRONMENT = "/run/s6/container_environment"
RUNTIME_FOLDER = "/tmp/hermes-runtime"  # XDG_RUNTIME_DIR unless that is set
NOT_EXECUTABLE, NOT_FOUND = 126, 127
SIGPIPE, SIGXFSZ = 13, 25


def content(path: str) -> bytes:
    """Return a file's content, as open() would in three times the time: an environment is a file for each variable.
    Raises OSError."""
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
    """Return whether a switch is on (1, true, yes, on, in any case), None when it is neither that nor off (0, false,
    no, off)."""
    word = value.strip().lower()
    return True if word in ("1", "true", "yes", "on") else False if word in ("0", "false", "no", "off") else None


def root_home(environment: dict[str, str]) -> str:
    """Return the root profile's HERMES_HOME: of <root>/profiles/<name>, as `hermes` sets it for a profile, that is
    <root>."""
    home = environment.get("HERMES_HOME") or HOME
    parent = os.path.dirname(home.rstrip("/"))
    return os.path.dirname(parent) if os.path.basename(parent) == "profiles" else home


def program_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment for a program of the image: HOME, HERMES_HOME, VIRTUAL_ENV, PATH with our folders on it,
    and, unless given, where pip puts packages for hermes, and a runtime folder."""
    path, home = environment.get("PATH") or os.defpath, root_home(environment)
    missing = [folder for folder in COMMAND_FOLDERS if folder not in path.split(":")]
    defaults = {"PYTHONUSERBASE": f"{home}/.local", "XDG_RUNTIME_DIR": RUNTIME_FOLDER}
    return (
        defaults
        | environment
        | {
            "HOME": home,
            "HERMES_HOME": environment.get("HERMES_HOME") or HOME,
            "PATH": ":".join([*missing, path]),
            "VIRTUAL_ENV": VENV,
        }
    )


def umask_of(environment: dict[str, str]) -> int | None:
    """Return the umask that UMASK gives for hermes's processes, in octal, None when it gives none."""
    value = environment.get("UMASK", "")
    octal = value and len(value) <= 4 and not value.strip("01234567")
    return int(value, 8) if octal and int(value, 8) <= 0o777 else None


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
    import _signal  # `signal` itself would cost 5 ms for its enums

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


def s6_is_pid_1() -> bool:
    """Return whether s6-overlay supervises this container; works without privilege, which reading /proc/1/exe would
    not."""
    try:
        return content("/proc/1/comm") == b"s6-svscan\n" and os.path.isdir("/run/s6/basedir")
    except OSError:
        return False


def supervised() -> bool:
    """Return whether s6 keeps this container's gateways, as PID 1 or below another one."""
    return s6_is_pid_1() or read_pid_file(SUPERVISOR_PROCESS) != 0


def start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the machine did; OSError when there is none. See proc(5)."""
    return content(f"/proc/{pid}/stat").rpartition(b")")[2].split()[19].decode()


def write_pid_file(path: str) -> None:
    """Leave word of who we are, whole; exec keeps the pid. Only the shutdown needs it, so no failure matters. /run
    may be everybody's to write, so no file that is there already is written to."""
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


def profile_option(words: list[str]) -> tuple[str | None, list[str]]:
    """Split a leading -p NAME, --profile NAME or --profile=NAME off hermes's arguments."""
    if len(words) > 1 and words[0] in ("-p", "--profile"):
        return words[1], words[2:]
    if words and words[0].startswith("--profile="):
        return words[0].removeprefix("--profile="), words[1:]
    return None, words


# Routing

BOOT = "/opt/hermes/bin/hermes-boot"
WRAPPER = "/opt/hermes/docker/main-wrapper.sh"
S6_INIT = "/init.s6-overlay"


def program_of(words: list[str], environment: dict[str, str]) -> list[str]:
    """Return the argv that the container command's words become: a program by path or on PATH as it is, anything
    else is hermes's."""
    word = words[0] if words else ""
    if "/" in word:
        return words
    if word and word != USER and not word.startswith("-"):
        for folder in environment["PATH"].split(":"):
            path = os.path.join(folder, word)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return [path, *words[1:]]
    return [HERMES, *(words[1:] if word == USER else words)]


def gateway_request(words: list[str]) -> list[str]:
    """Return hermes_boot's arguments for exactly `[-p NAME] gateway start|stop|restart [--all]`, none for anything
    else."""
    profile, rest = profile_option(words)
    if (
        len(rest) < 2
        or rest[0] != "gateway"
        or rest[1] not in ("start", "stop", "restart")
        or rest[2:] not in ([], ["--all"])
    ):
        return []
    return [*rest] if rest[2:] or profile is None else [*rest, "-p", profile]


def with_secrets(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of `docker exec` with the secrets that the boot has read from files, see
    read_secrets()."""
    missing = [name[:-5] for name in environment if name.endswith("_FILE") and not environment.get(name[:-5])]
    for name in missing:
        try:
            value = content(f"{CONTAINER_ENVIRONMENT}/{name}")
        except OSError:
            continue  # a file that is not the boot's to read, or nobody's before it has
        environment[name] = os.fsdecode(value.removesuffix(b"\n"))
    return environment


UPDATE = (
    "the agent is part of this container's image, which is not the one named below: build or pull the one that you run"
    " (`make image`), then make the container anew; the volume keeps everything"
)


def hermes_command(words: list[str]) -> int:
    """Be the `hermes` command: answer for the gateways that s6 supervises, hand everything else to the real program
    untouched."""
    environment = with_secrets(process_environment())
    if "HERMES_HOME" not in environment:  # a login shell's, by ssh
        environment = container_environment()
    if (request := gateway_request(words)) and supervised():
        return execute([BOOT, *request], environment)
    if profile_option(words)[1] in (["update"], ["update", "--check"]):
        print(f"{USER}: info: {UPDATE}", file=sys.stderr)
    if switch(environment.get("HERMES_DOCKER_EXEC_AS_ROOT", "")):
        return execute([HERMES, *words], environment)
    return execute_as_hermes([HERMES, *words], program_environment(environment))


def container_command(words: list[str]) -> int:
    """Be the container command: a program as hermes; hermes_boot.py first where that is `gateway run` and s6 keeps
    the gateways."""
    environment = program_environment(container_environment())
    program = program_of(words, environment)
    if supervised():
        if not read_pid_file(COMMAND_PROCESS):  # not somebody's call of this script in a running container
            write_pid_file(COMMAND_PROCESS)
        if program[0] == HERMES and profile_option(program[1:])[1][:2] == ["gateway", "run"]:
            return execute([BOOT, "container-command", *program[1:]], environment)
    return execute_as_hermes(program, environment)


def tini_program(words: list[str]) -> list[str]:
    """Return what /init is to run when an old template calls tini: its options gone, its entrypoint.sh the wrapper."""
    words = list(words)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option == "--":
            break
        if option in ("-p", "-e"):  # these have a value
            del words[:1]
    name = os.path.basename(words[0]) if words else "init"
    if name == "entrypoint.sh":
        return [WRAPPER, *words[1:]]
    return words[1:] if name == "init" else words


def obstacle() -> str:
    """Return what keeps s6-overlay from starting, "" when nothing does.

    It must be PID 1, and /run must be its user's: else it takes it, by a setuid program that needs the capability CHOWN
    (number 0), which Kubernetes' no_new_privs and dropped capabilities forbid.
    """
    if os.getpid() != 1:
        return "another process is PID 1"
    if os.geteuid() in (0, os.stat("/run").st_uid):
        return ""
    status = dict(line.split(b":\t", 1) for line in content("/proc/self/status").split(b"\n") if b":\t" in line)
    may_take_it = (
        status.get(b"NoNewPrivs", b"unknown before Linux 4.10").strip() == b"0"
        and int(status.get(b"CapBnd", b"1"), 16) & 1
    )
    return "" if may_take_it else "/run belongs to another user and no new privileges are allowed"


def init(words: list[str]) -> int:
    """Be /init: s6-overlay's own where that can start, else hermes_boot.py as the fallback init."""
    environment = process_environment()
    if why := obstacle():
        return execute([BOOT, "init", why, *words], environment)
    return execute([S6_INIT, *words], environment)


ROLES = {USER: hermes_command, "init": init, "tini": lambda words: init(tini_program(words))}


def main(argv: list[str]) -> int:
    """Run as the name we were called by: `hermes`, `init`, `tini`, else the container command. Returns when the
    program cannot be run."""
    return ROLES.get(os.path.basename(argv[0]), container_command)(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
