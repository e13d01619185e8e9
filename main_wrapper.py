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

import _signal  # type: ignore[import-not-found]  # `signal` itself would cost 5 ms for its enums
import os
import sys

# What both scripts need

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


# Routing

BOOT = "/opt/hermes/bin/hermes-boot"
WRAPPER = "/opt/hermes/docker/main-wrapper.sh"
S6_INIT = "/init.s6-overlay"
WORKDIR = "HERMES_WORKDIR"  # the variable that brings a folder past s6-overlay, which cannot take its name
TINI = ("tini", "/usr/bin/tini")
ENGINES_INITS = ("docker-init", "podman-init", "catatonit", "tini")  # what --init is to the kernel
LAUNCHERS = ("/init", WRAPPER, "/opt/hermes/docker/entrypoint.sh", *TINI)
SUBCOMMANDS = frozenset(  # of hermes, by hermes-agent's parser: programs of these names are run by their path
    "acp auth backup bundles chat checkpoints claw completion computer-use config console cron curator dashboard debug"
    " desktop doctor dump fallback gateway gui hooks import insights journey kanban learning login logout logs lsp mcp"
    " memory memory-graph migrate moa model pairing pets plugins portal postinstall profile project prompt-size proxy"
    " secrets security send serve sessions setup skills slack status tools uninstall update version webhook whatsapp"
    " whatsapp-cloud".split()
)


def program_of(words: list[str], environment: dict[str, str]) -> list[str]:
    """Return the argv that the container command's words become: a program by path, or on PATH unless hermes has a
    subcommand of that name, as it is; anything else is hermes's."""
    word = words[0] if words else ""
    if "/" in word:
        return words
    if word and word != USER and word not in SUBCOMMANDS and not word.startswith("-"):
        for folder in environment["PATH"].split(":"):
            path = os.path.join(folder, word)
            if os.path.isfile(path) and os.access(path, os.X_OK):
                return [path, *words[1:]]
    return [HERMES, *(words[1:] if word == USER else words)]


def gateway_request(words: list[str]) -> list[str]:
    """Return hermes_boot's arguments for exactly `gateway start|stop|restart [--all]`, with -p NAME or without,
    else none."""
    profile, rest = profile_option(words)
    ours = [["gateway", action] for action in ("start", "stop", "restart")]
    if rest[:2] not in ours or rest[2:] not in ([], ["--all"]):
        return []
    return rest if rest[2:] or profile is None else [*rest, "-p", profile]


def with_secrets(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of `docker exec` with the secrets that the boot has read from files."""
    for name in [name[:-5] for name in environment if name.endswith("_FILE") and not environment.get(name[:-5])]:
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
    """Be the `hermes` command: answer for gateways that s6 supervises; all else is the real program's, untouched."""
    environment = with_secrets(process_environment())
    if "HERMES_HOME" not in environment:  # a login shell's, by ssh
        environment = container_environment()
    if (request := gateway_request(words)) and supervised():
        return execute([BOOT, *request], environment)
    if profile_option(words)[1][:2] == ["gateway", "run"] and not environment.get("HERMES_S6_SUPERVISED_CHILD"):
        # Below another PID 1 the agent does not see s6; without gateways by HERMES_RECONCILE it would ask s6 for one.
        alone = switch(environment.get("HERMES_RECONCILE", "")) is False
        if supervised() and (alone or not s6_is_pid_1()):
            return execute([BOOT, "container-command", *words], program_environment(environment))
    if profile_option(words)[1] in (["update"], ["update", "--check"]):
        print(f"{USER}: info: {UPDATE}", file=sys.stderr)
    all_of_it = program_environment(environment)
    if switch(environment.get("HERMES_DOCKER_EXEC_AS_ROOT", "")):  # root must not find hermes's commands
        packages = "HERMES_LAZY_INSTALL_TARGET"
        return execute([HERMES, *words], environment | {packages: all_of_it[packages]})
    return execute_as_hermes([HERMES, *words], all_of_it)


def hand_over_stdio() -> None:
    """Give stdin, stdout and stderr to hermes where they are a pipe or a terminal, as engines do for `--user`: else it
    could not open them by name, such as /dev/stderr."""
    import stat

    uid = (account() or (-1,))[0]  # fchown leaves things as they are for -1
    for fd in range(3):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
                os.fchown(fd, uid, -1)
        except OSError:
            continue  # closed, or another user namespace's: they stay as they are


def container_command(words: list[str]) -> int:
    """Be the container command: a program as hermes, after hermes_boot.py for `gateway run` where s6 keeps gateways."""
    environment = program_environment(container_environment())
    program = program_of(launched([WRAPPER, *words])[1:], environment)
    workdir = environment.pop(WORKDIR, ".")
    if supervised():
        if not read_pid_file(COMMAND_PROCESS):  # not somebody's call of this script in a running container
            os.chdir(workdir)
            write_pid_file(COMMAND_PROCESS)
            if os.geteuid() == 0:
                hand_over_stdio()
        if program[0] == HERMES and profile_option(program[1:])[1][:2] == ["gateway", "run"]:
            return execute([BOOT, "container-command", *program[1:]], environment)
    return execute_as_hermes(program, environment)


def launched(words: list[str]) -> list[str]:
    """Return what /init is to run: the image's own launchers dropped, which templates name once more, and tini's
    options with it. Behind any launcher but /init itself that is the wrapper, so that nothing runs as root."""
    words, wrapped = list(words), False
    while words and (name := words[0]) in LAUNCHERS:
        del words[0]
        while name in TINI and words and words[0].startswith("-"):
            option = words.pop(0)
            if option == "--":
                break
            if option[-1] in "ep" and not set(option[1:-1]) & set("ep"):  # its value is a word of its own
                del words[:1]
        wrapped = wrapped or (name != "/init" and not (name in TINI and words[:1] == ["/init"]))
    return [WRAPPER, *words] if wrapped else words


def has_capability(number: int) -> bool:
    """Return whether this process has a capability, by its number in capabilities(7)."""
    (line,) = [line for line in content("/proc/self/status").split(b"\n") if line.startswith(b"CapEff:")]
    return int(line.split()[1], 16) >> number & 1 == 1


def is_unusable(environment: dict[str, str]) -> bool:
    """Return whether /run is mounted so that nothing on it can be executed, which s6 does there; s6-overlay can help
    itself where the root is read-only and it has the capability SYS_ADMIN (21)."""
    if not os.statvfs("/run").f_flag & os.ST_NOEXEC:
        return False
    return environment.get("S6_READ_ONLY_ROOT", "") in ("", "0") or not has_capability(21)


def unowned() -> str:
    """Return why root cannot take /run, which the image gives to hermes; "" when it can (by CHOWN, 0), or has it."""
    if os.geteuid() or not os.stat("/run").st_uid or has_capability(0):
        return ""
    return "root lacks CHOWN, so it cannot take /run; add it with --cap-add"


def obstacle() -> str:
    """Return what keeps s6-overlay from starting, "" when nothing does: it must be PID 1, and /run its user's, which it
    could take by a setuid program alone; the image has none."""
    if os.getpid() != 1:
        return "another process is PID 1"
    return "" if os.geteuid() in (0, os.stat("/run").st_uid) else "/run belongs to another user"


def exposure(environment: dict[str, str]) -> str:
    """Return by which variable root would run what hermes can write, "" for none: s6-overlay finds programs on PATH,
    and the loader libraries by some others."""
    homes = tuple(f"{os.path.realpath(home).rstrip('/')}/" for home in (root_home(environment), HOME))

    def hermess(places: list[str]) -> list[str]:
        return [path for path in places if path[:1] != "/" or f"{os.path.realpath(path)}/".startswith(homes)]

    folders = (environment.get("PATH") or os.defpath).split(":")
    found = hermess(folders)  # one may be "", the working directory
    if found and folders[-len(found) :] != found:
        return (
            f"PATH has {':'.join(found)!r} before the system's folders, so hermes could put programs there for root"
            " to run; give the container a PATH (-e PATH=...) that has it last"
        )
    for name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "LD_AUDIT"):
        places = environment[name].replace(";", ":").replace(" ", ":").split(":") if environment.get(name) else []
        places = [path for path in places if "/" in path or name == "LD_LIBRARY_PATH"]  # a name is looked for there
        if os.geteuid() == 0 and (found := hermess(places)):
            return f"{name} has {':'.join(found)!r}, so hermes could put libraries there for root to run; leave it out"
    return ""


def init(words: list[str]) -> int:
    """Be /init: s6-overlay's own where that can start, else hermes_boot.py as the fallback init; in a container that
    is supervised already, the wrapper."""
    words, environment = launched(words), process_environment()
    if os.getpid() != 1 and supervised():
        return container_command(words)
    fault, code = exposure(environment) or unowned(), 1
    if not fault and is_unusable(environment):
        fault = "/run is mounted noexec, so s6 cannot run anything there; mount it with exec: --tmpfs /run:exec"
        code = NOT_EXECUTABLE
    if fault:
        print(f"init: fatal: {fault}", file=sys.stderr)
        return code
    why, folder = obstacle(), os.readlink("/proc/self/cwd")
    left = [
        f"/run/{name}" for name in os.listdir("/run") if name == "service" or name.startswith((*LEFT_IN_RUN, "s6-rc"))
    ]
    if left and not why:  # an earlier start's, where /run is kept; what is too deep s6-overlay cannot remove
        os.waitpid(os.posix_spawn("/bin/rm", ["rm", "-rf", "--one-file-system", "--preserve-root=all", *left], {}), 0)
    environment.pop(WORKDIR, None)  # given by somebody else it says nothing of ours
    if set(folder) & set(" \t\n*?["):  # s6-overlay would take it for several words, and hang
        environment[WORKDIR] = folder
        os.chdir("/")
    return execute([BOOT, "init", why, *words] if why else [S6_INIT, *words], environment)


def main(argv: list[str]) -> int:
    """Run as the name we were called by: `init`, `tini`, `hermes`, else the container command; the latter two as PID 1,
    as a pod's `command:` makes them, are /init with these words, and `hermes` so below --init. Returns when the program
    cannot be run."""
    name, words = os.path.basename(argv[0]), argv[1:]
    if name in ("init", "tini"):
        return init(words if name == "init" else [name, *words])
    below = os.getppid() == 1 and pid_1() in ENGINES_INITS  # by `--init`, while `docker exec` has no parent there
    if os.getpid() == 1 or (name == USER and below and not supervised()):
        return init([WRAPPER, *([USER] if name == USER else []), *words])
    return hermes_command(words) if name == USER else container_command(words)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
