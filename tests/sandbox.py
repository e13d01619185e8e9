#!/usr/bin/env python3
"""A container in miniature, for machines without a container engine: the image's layout and boot, on the real s6
programs.

New mount, PID, UTS and IPC namespaces over the machine's own root (an overlay; the machine is never changed), a tmpfs
on /run, its own /etc/passwd and /etc/group with the user hermes, s6-svscan as PID 1. What s6-overlay does around that,
in the same order: the environment goes to /run/s6/container_environment, an rc.init process runs the cont-init scripts
in name order with a scrubbed environment, brings the static services of s6-rc.d/ up, runs the CMD through the wrapper,
and its code is the container's. Needs root and util-linux (unshare, nsenter, mount). What is missing is fetched below
the checkout's .cache, the system stays as it is: s6 and execline as Debian packages, hermes-agent from PyPI into a
virtual environment.

sandbox.py run [--name NAME] [-e NAME=VALUE] [-v HOST:GUEST] [-u UID] [-w DIR] [--group-add GID] [--] WORD...
    sandbox.py exec NAME [-u USER] WORD...      stop NAME       restart NAME
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
CACHE = PROJECT / ".cache"
AGENT_VERSION = re.search(r"^ARG HERMES_AGENT_VERSION=(.*)$", (PROJECT / "Dockerfile").read_text(), re.M)[1]
S6_PACKAGES = ("s6", "execline", "libs6-", "libexecline", "libskarnet", "libnsss", "libutmps")
WRAPPER = "/opt/hermes/docker/main-wrapper.sh"
IMAGE_ENVIRONMENT = {
    "HERMES_HOME": "/opt/data",
    "HERMES_DISABLE_LAZY_INSTALLS": "1",
    "HERMES_LAZY_INSTALL_TARGET": "/opt/data/lazy-packages",
    "PATH": "/opt/hermes/bin:/opt/hermes/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/command",
    "VIRTUAL_ENV": "/opt/hermes/.venv",
    "S6_BEHAVIOUR_IF_STAGE2_FAILS": "2",
    "S6_KILL_FINISH_MAXTIME": "86400000",
    "S6_KILL_GRACETIME": "10",
    "S6_VERBOSITY": "0",
}
PASSWD = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\nhermes:x:10000:10000::/opt/data:/bin/bash\n"
GROUP = "root:x:0:\nwww-data:x:33:\nusers:x:100:\nhermes:x:10000:\n"

RC_INIT = """#!/bin/sh
trap : INT
shift
until [ -p /run/service/.s6-svscan/control ]; do sleep 0.01; done
failed=0
for script in /etc/cont-init.d/*; do "$script" || failed=1; done
if [ "$failed" = 1 ] && [ "$(cat /run/s6/behaviour)" = 2 ]; then
  echo 1 > /run/exitcode
  exec /run/s6/basedir/halt
fi
for service in /etc/s6-overlay/s6-rc.d/user/contents.d/*; do /command/s6-svc -u "/run/service/${service##*/}"; done
cd "$(cat /run/s6/workdir)"
"$@"
echo "$?" > /run/exitcode
exec /run/s6/basedir/halt
"""
HALT = """#!/bin/sh
mkdir /run/s6/halting 2>/dev/null || exit 0
for service in /etc/s6-overlay/s6-rc.d/user/contents.d/*; do /command/s6-svc -d "/run/service/${service##*/}"; done
for service in /etc/s6-overlay/s6-rc.d/user/contents.d/*; do /command/s6-svwait -t 9000 -D "/run/service/${service##*/}"; done
limit=$(cat /run/s6/container_environment/S6_KILL_FINISH_MAXTIME 2>/dev/null || echo 5000)
limit="$((limit / 1000)).$(printf %03d $((limit % 1000)))"
for script in /etc/cont-finish.d/*; do [ ! -x "$script" ] || timeout -s KILL "$limit" "$script"; done
exec /command/s6-svscanctl -b /run/service
"""
SIGTERM = "#!/bin/sh\necho 143 > /run/exitcode\nexec /run/s6/basedir/halt\n"
FINISH = """#!/bin/sh
grace=$(cat /run/s6/container_environment/S6_KILL_GRACETIME 2>/dev/null || echo 3000)
kill -15 -1 2>/dev/null
[ "$grace" = 0 ] || sleep "$((grace / 1000)).$(printf %03d $((grace % 1000)))"
kill -9 -1 2>/dev/null
exit "$(cat /run/exitcode)"
"""
WITH_CONTENV = "#!/command/execlineb -S0\ns6-envdir -Lf -- /run/s6/container_environment $@\n"


def unsupported() -> str:
    """Return why this machine cannot run the sandbox, "" when it can."""
    if os.geteuid() != 0:
        return "the sandbox needs root"
    if any(shutil.which(program) is None for program in ("unshare", "nsenter", "mount")):
        return "the sandbox needs util-linux (unshare, nsenter, mount)"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("upper", "work", "root"):
            os.mkdir(f"{folder}/{name}")
        options = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{folder}/root"]
        tried = subprocess.run(
            ["unshare", "-m", "-p", "-u", "-i", "--fork", "--", *mount], capture_output=True, text=True
        )
    return f"no namespaces or overlay here: {tried.stderr.strip()}" if tried.returncode else ""


# What the machine may lack


def s6_layer() -> list[Path]:
    """Return the folders to put over the root for s6 and execline: none where they are installed, else a fetched
    one."""
    if shutil.which("s6-svscan") and shutil.which("execlineb"):
        return []
    layer = CACHE / "s6"
    if not layer.exists():
        apt = CACHE / "apt"
        for folder in ("lists/partial", "archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        options = [
            "-qq",
            "-o",
            f"Dir::State::lists={apt}/lists",
            "-o",
            f"Dir::Cache={apt}",
            "-o",
            "APT::Sandbox::User=root",
        ]
        subprocess.run(["apt-get", *options, "update"], check=True, stdout=sys.stderr)
        depends = ["apt-cache", *options, "depends", "--recurse", "--no-suggests", "--no-recommends", "s6", "execline"]
        lines = subprocess.run(depends, check=True, capture_output=True, text=True).stdout.splitlines()
        packages = sorted({line for line in lines if line.startswith(S6_PACKAGES)})
        subprocess.run(["apt-get", *options, "download", *packages], check=True, cwd=apt, stdout=sys.stderr)
        part = CACHE / "s6.part"
        for package in apt.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, part], check=True)
        for merged in ("bin", "lib"):  # /bin and /lib are links on a merged-/usr system, which a folder here would hide
            if (part / merged).is_dir():
                shutil.copytree(part / merged, part / "usr" / merged, dirs_exist_ok=True, symlinks=True)
                shutil.rmtree(part / merged)
        part.rename(layer)
    return [layer]


def layout_script(root: Path) -> str:
    """Return the commands of the Dockerfile that lay out our scripts and their names, for a root elsewhere."""
    text = (PROJECT / "Dockerfile").read_text().replace("\\\n", "\n")
    start = text.index("cd /opt/hermes/docker")
    script = text[start : text.index("&& find /opt/hermes /names", start)]
    script = (
        script.replace("cd /opt", f"cd {root}/opt")
        .replace("/names", str(root))
        .replace("&& python3", f"&& {base_python()}")
    )
    return " ".join(line.strip() for line in script.splitlines())


def base_python() -> str:
    """Return a Python that the user hermes can reach."""
    return "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else os.path.realpath(sys.executable)


def agent_venv() -> Path:
    """Return a virtual environment with hermes-agent, made for the path /opt/hermes/.venv, fetched from PyPI where
    it is missing."""
    venv = CACHE / f"venv-{AGENT_VERSION}"
    if not venv.exists():
        print(f"sandbox: fetching hermes-agent {AGENT_VERSION} from PyPI, once", file=sys.stderr)
        part = CACHE / "venv.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        target = "/opt/hermes/.venv"
        script = f"""
            set -e
            mount -t tmpfs tmpfs /opt
            mkdir -p {target}
            mount --bind '{part}' {target}
            '{base_python()}' -m venv --without-pip {target}
            '{sys.executable}' -m pip --disable-pip-version-check -qq --python {target}/bin/python install pip hermes-agent=={AGENT_VERSION}
        """
        subprocess.run(["unshare", "-m", "sh", "-c", script], check=True, stdout=sys.stderr)
        part.rename(venv)
    return venv


# A container


class Sandbox:
    """One container. Its folder holds what a container's writable layer would; the volume outlives it.

    mounts are (host path, guest path); environment is what `docker run -e` gives; user and gid are `--user`, groups
    `--group-add`, all by number; agent says whether to have the real hermes-agent at /opt/hermes/.venv; with an
    entrypoint, that is run below a PID 1 of the platform's, as with `docker run --init`; passwd and group are the
    image's account files.
    """

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
        passwd: str = PASSWD,
        group: str = GROUP,
    ) -> None:
        self.folder = folder
        self.volume = volume or folder / "volume"
        self.environment = IMAGE_ENVIRONMENT | (environment or {})
        self.mounts, self.user, self.groups, self.workdir, self.agent = mounts, user, groups, workdir, agent
        self.entrypoint = entrypoint
        self.gid = user if gid is None else gid
        self.process: subprocess.Popen[bytes] | None = None
        self.words: list[str] = []
        if not (folder / "upper").exists():
            self.make_image(passwd, group)

    @property
    def upper(self) -> Path:
        """The writable layer: what lies in it hides the machine's own."""
        return self.folder / "upper"

    def make_image(self, passwd: str, group: str) -> None:
        """Lay out what the Dockerfile would: scripts, names, static services, accounts, s6-overlay's programs."""
        for name in ("upper", "work", "root"):
            (self.folder / name).mkdir(parents=True)
        docker = self.upper / "opt/hermes/docker"
        for path in (docker, self.upper / "opt/hermes/.venv", self.upper / "command"):
            path.mkdir(parents=True)
        for script in ("hermes_boot.py", "main_wrapper.py"):
            shutil.copy(PROJECT / script, docker)
        subprocess.run(["sh", "-ec", layout_script(self.upper)], check=True)
        (self.upper / "init").symlink_to("/opt/hermes/docker/wrapper")
        etc = self.upper / "etc"
        shutil.copytree(PROJECT / "s6-rc.d", etc / "s6-overlay/s6-rc.d")
        (etc / "passwd").write_text(passwd)
        (etc / "group").write_text(group)
        (etc / "nsswitch.conf").write_text(
            "passwd: files\ngroup: files\nhosts: files dns\n"
        )  # no systemd to ask, as in an image
        self.make_command_folder()
        if not os.path.exists("/usr/bin/python3"):
            (self.upper / "usr/bin").mkdir(parents=True)
            (self.upper / "usr/bin/python3").symlink_to(base_python())

    def make_command_folder(self) -> None:
        """Fill /command as s6-overlay's symlinks do."""
        for layer in s6_layer():  # copied: as a lower layer it would lie within the other one, /, which overlay refuses
            shutil.copytree(layer / "usr", self.upper / "usr", symlinks=True, dirs_exist_ok=True)
        for layer in [*s6_layer(), Path("/")]:
            for program in (layer / "usr/bin").iterdir():
                link = self.upper / "command" / program.name
                if program.name.startswith(("s6-", "execline")) and not link.is_symlink():
                    link.symlink_to(f"/usr/bin/{program.name}")
        write_script(self.upper / "command/with-contenv", WITH_CONTENV)

    def put_agent(self, script: str) -> None:
        """Put a program in the agent's place, for tests of what leads to it or of a gateway that misbehaves on
        command."""
        write_script(self.upper / "opt/hermes/.venv/bin/hermes", script)

    # Life

    def command(self, words: list[str]) -> list[str]:
        """Return the argv that runs this container in the foreground; its exit code is the container's."""
        self.volume.mkdir(parents=True, exist_ok=True)
        spec = {
            "mounts": [
                (str(self.volume), "/opt/data"),
                *([(str(agent_venv()), "/opt/hermes/.venv")] if self.agent else []),
                *self.mounts,
            ],
            "environment": [[name, value] for name, value in self.environment.items()],
            "user": self.user,
            "gid": self.gid,
            "groups": list(self.groups),
            "workdir": self.workdir,
            "entrypoint": list(self.entrypoint),
            "words": words,
        }
        (self.folder / "spec.json").write_text(json.dumps(spec))
        return [sys.executable, "-IS", str(Path(__file__).resolve()), "unshare", str(self.folder)]

    def run(self, *words: str, timeout: float = 60, **options) -> subprocess.CompletedProcess:
        """Run to the end, as `docker run`; stdout and stderr are captured unless options say otherwise."""
        options = {"capture_output": True} | options
        return subprocess.run(self.command(list(words)), timeout=timeout, **options)

    def start(self, *words: str) -> None:
        """Start in the background, as `docker run -d`, and wait for the boot's end; the log goes to the container's
        folder."""
        self.words = list(words)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command(self.words), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        (self.folder / "pid").write_text(str(self.process.pid))
        wait_for(lambda: self.process.poll() is not None or self.booted(), 60)

    def booted(self) -> bool:
        """Say whether the CMD runs."""
        root = f"/proc/{self.init()}/root"
        try:
            inside = (
                os.stat(root).st_dev != os.stat("/").st_dev
            )  # before it is in its own root, /run there is the machine's
        except OSError:
            return False
        return inside and os.path.exists(f"{root}/run/{'hermes-command' if self.entrypoint else 's6/workdir.done'}")

    def log(self) -> str:
        """Return what `docker logs` would show."""
        return (self.folder / "log").read_text(errors="backslashreplace")

    def init(self) -> int:
        """Return PID 1's number on the machine, 0 when the container is not running."""
        try:
            outer = (self.folder / "pid").read_text()
            return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def path(self, guest: str) -> Path:
        """Return a path on the machine for a path in the running container."""
        return Path(f"/proc/{self.init()}/root{guest}")

    def exec_command(
        self, words: list[str], user: str | None = None, environment: dict[str, str] | None = None
    ) -> list[str]:
        """Return the argv that enters the running container, as `docker exec`."""
        enter = [
            "nsenter",
            f"--target={self.init()}",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--root",
            "--wd",
            "--",
            "env",
            "-i",
        ]
        pairs = [
            f"{name}={value}" for name, value in ({"HOME": "/root"} | self.environment | (environment or {})).items()
        ]
        return [*enter, *pairs, *(["/command/s6-setuidgid", user] if user else []), *words]

    def exec(
        self, *words: str, user: str | None = None, environment: dict[str, str] | None = None, timeout: float = 60
    ):
        """Run a program in the running container, as root or as a user of it; returns what subprocess.run does,
        output captured."""
        return subprocess.run(
            self.exec_command(list(words), user, environment), capture_output=True, text=True, timeout=timeout
        )

    def stop(self, timeout: float = 10) -> int:
        """Do as `docker stop`: SIGTERM to PID 1, SIGKILL after timeout seconds; return the exit code."""
        init = self.init()
        if init:
            os.kill(init, signal.SIGTERM)
        try:
            code = self.process.wait(timeout) if self.process else self.wait_gone(timeout)
        except subprocess.TimeoutExpired:
            os.kill(init, signal.SIGKILL)
            code = self.process.wait() if self.process else 137
        return code

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
        """Stop and forget everything but a volume that was given."""
        if self.process and self.process.poll() is None:
            self.stop(1)
        shutil.rmtree(self.folder, ignore_errors=True)


def write_script(path: Path, text: str) -> None:
    """Write an executable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition, timeout: float = 10) -> bool:
    """Poll until a condition holds; say whether it came to hold in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# PID 1, until it is s6-svscan


def become_container(folder: str) -> None:
    """In the new namespaces: mount, lay out /run as s6-overlay does, fork rc.init, and become s6-svscan."""
    with open(f"{folder}/spec.json") as file:
        spec = json.load(file)
    root = f"{folder}/root"
    mount = "mount -n".split()
    subprocess.run(
        [*mount, "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work", root],
        check=True,
    )
    for kind, target, options in (
        ("proc", "proc", "nosuid"),
        ("tmpfs", "run", "mode=0755"),
        ("tmpfs", "tmp", "mode=1777"),
    ):
        os.makedirs(f"{root}/{target}", exist_ok=True)
        subprocess.run([*mount, "-t", kind, kind, "-o", options, f"{root}/{target}"], check=True)
    subprocess.run([*mount, "--rbind", "/dev", f"{root}/dev"], check=True)
    for host, guest in spec["mounts"]:
        target = root + guest
        if os.path.isdir(host):
            os.makedirs(target, exist_ok=True)
        elif not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            open(target, "w").close()
        subprocess.run([*mount, "--bind", host, target], check=True)
    os.chdir(
        root
    )  # the new root takes the old one's place, for every process here; in a mere chroot nobody may make user namespaces
    subprocess.run(["pivot_root", ".", "."], check=True)
    subprocess.run([*"umount -n -l".split(), "."], check=True)
    os.chdir("/")
    os.umask(0o022)
    if not spec["entrypoint"]:
        lay_out_run(spec)
    os.setgroups(spec["groups"])
    if spec["user"] is not None:
        for path, folders, files in os.walk("/run"):
            for name in (path, *(f"{path}/{entry}" for entry in folders + files)):
                os.chown(name, spec["user"], spec["gid"])
        os.setresgid(*[spec["gid"]] * 3)
        os.setresuid(*[spec["user"]] * 3)
    for number in range(
        1, 32
    ):  # as an engine does: what the caller ignores, such as a background job's SIGINT, stays outside
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
    if spec["entrypoint"]:
        be_another_init(spec)
    become_svscan(spec["environment"], [WRAPPER, *spec["words"]])


def become_svscan(variables: list[list[str]], words: list[str]) -> None:
    """Fork what runs the boot and the command, and become s6-svscan, with the environment that s6-overlay leaves of
    the container's."""
    environment = dict(variables) if dict(variables).get("S6_KEEP_ENV") == "1" else {}
    environment["PATH"] = dict(variables).get("PATH", "/bin")  # the container's, with what is missing of these
    for folder in ("/bin", "/usr/bin", "/command"):
        if folder not in environment["PATH"].split(":"):
            environment["PATH"] = f"{folder}:{environment['PATH']}"
    if os.fork() == 0:
        rc_init = [b"/bin/sh", b"/run/s6/basedir/scripts/rc.init", b"top", *(os.fsencode(word) for word in words)]
        os.execve("/bin/sh", rc_init, environment)
    os.execve("/command/s6-svscan", ["s6-svscan", "/run/service"], environment)


def be_s6_overlay() -> None:
    """Be /init of an image that has this file in s6-overlay's place, see docker/stand_in.py."""
    if os.getpid() != 1:
        raise SystemExit("s6-overlay-suexec: fatal: can only run as pid 1")
    for name in ("s6", "service", "s6-rc"):
        shutil.rmtree(f"/run/{name}", ignore_errors=True)
    variables = [[name, value] for name, value in os.environ.items()]
    lay_out_run({"environment": variables, "workdir": os.getcwd()})
    become_svscan(variables, sys.argv[1:])


def be_another_init(spec: dict) -> None:
    """Be the PID 1 of a platform: run the entrypoint below, pass SIGTERM and SIGINT on, reap, end with its code."""
    os.chdir(spec["workdir"])
    child = os.fork()
    if child == 0:
        words = [os.fsencode(word) for word in (*spec["entrypoint"], *spec["words"])]
        os.execve(words[0], words, dict(spec["environment"]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: os.kill(child, received))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def lay_out_run(spec: dict) -> None:
    """Make /run as s6-overlay's preinit and s6-rc-init leave it."""
    for folder in ("s6/basedir/scripts", "service/.s6-svscan", "s6-rc/servicedirs"):
        os.makedirs(f"/run/{folder}")
    environment = dict(spec["environment"])
    if environment.get("S6_KEEP_ENV") != "1":
        os.makedirs("/run/s6/container_environment")
        for name, value in environment.items():
            with open(f"/run/s6/container_environment/{name}", "wb") as file:
                file.write(os.fsencode(value) + b"\n")
    Path("/run/s6/workdir").write_text(spec["workdir"])
    Path("/run/s6/behaviour").write_text(environment.get("S6_BEHAVIOUR_IF_STAGE2_FAILS", "0"))
    started = 'cd "$(cat /run/s6/workdir)"\n: > /run/s6/workdir.done\n'
    write_script(Path("/run/s6/basedir/scripts/rc.init"), RC_INIT.replace('cd "$(cat /run/s6/workdir)"\n', started))
    write_script(Path("/run/s6/basedir/halt"), HALT)
    for name, script in (("SIGTERM", SIGTERM), ("SIGINT", "#!/bin/sh\n"), ("finish", FINISH)):
        write_script(Path(f"/run/service/.s6-svscan/{name}"), script)
    for service in Path("/etc/s6-overlay/s6-rc.d").iterdir():
        if (service / "run").exists():
            shutil.copytree(service, f"/run/s6-rc/servicedirs/{service.name}")
            Path(f"/run/s6-rc/servicedirs/{service.name}/down").touch()
            os.symlink(f"/run/s6-rc/servicedirs/{service.name}", f"/run/service/{service.name}")


# Command line


def main() -> int:
    """Run the subcommand of the command line."""
    if sys.argv[1:2] == ["unshare"]:
        folder = sys.argv[2]
        Path(folder, "pid").write_text(str(os.getpid()))
        inner = [sys.executable, "-IS", __file__, "become", folder]
        os.execvp("unshare", ["unshare", "-m", "-p", "-u", "-i", "--fork", "--kill-child", "--", *inner])
    if sys.argv[1:2] == ["become"]:
        become_container(sys.argv[2])
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
    """Split a command line at `--`, or before the first word that is neither an option of ours nor an option's
    value."""
    index = 1 if argv[:1] == ["run"] else 2
    while index < len(argv) and argv[index] != "--" and argv[index].startswith("-") and argv[:1] in (["run"], ["exec"]):
        if argv[index] in ("-h", "--help"):
            return argv[: index + 1], []
        index += 2 if "=" not in argv[index] else 1
    return argv[:index], argv[index + 1 :] if argv[index : index + 1] == ["--"] else argv[index:]


def act(arguments: argparse.Namespace, words: list[str]) -> int:
    """Do what the command line asks; return the container's exit code."""
    if why := unsupported():
        print(f"sandbox: {why}", file=sys.stderr)
        return 1
    named = CACHE / "containers" / (arguments.name or "")
    if arguments.command != "run":
        try:
            options = json.loads((named / "options.json").read_text())
        except OSError:
            print(
                f"sandbox: no container named {arguments.name}; `run --name {arguments.name}` makes it", file=sys.stderr
            )
            return 1
        box = Sandbox(named, volume=Path(options["volume"]), environment=options["environment"], agent=True)
        if arguments.command == "exec" and not box.init():
            print(f"sandbox: {arguments.name} is not running; `restart {arguments.name}` starts it", file=sys.stderr)
            return 1
        if arguments.command == "exec":
            return subprocess.run(box.exec_command(words, arguments.user)).returncode
        box.stop()
        return 0 if arguments.command == "stop" else subprocess.run(box.command(options["words"])).returncode
    mounts = dict(reversed(pair.split(":", 1)) for pair in arguments.volume)
    folder = named if arguments.name else Path(tempfile.mkdtemp(prefix="hermes-sandbox-"))
    volume = Path(mounts.pop("/opt/data", CACHE / "volume")).resolve()
    box = Sandbox(
        folder,
        volume=volume,
        environment=dict(pair.split("=", 1) for pair in arguments.env),
        mounts=tuple((str(Path(host).resolve()), guest) for guest, host in mounts.items()),
        user=arguments.user,
        groups=tuple(arguments.group_add),
        workdir=arguments.workdir,
        agent=True,
    )
    (folder / "options.json").write_text(
        json.dumps({"volume": str(volume), "environment": box.environment, "words": words})
    )
    try:
        return subprocess.run(box.command(words)).returncode
    except KeyboardInterrupt:
        return 130
    finally:
        if not arguments.name:
            box.remove()


if __name__ == "__main__":
    raise SystemExit(main())
