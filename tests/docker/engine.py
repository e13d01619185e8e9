"""A container of a real engine behind the methods of sandbox.Sandbox, so that one set of tests runs on both.

ENGINE (docker or podman; the first that answers), HERMES_TEST_IMAGE (else the image is built once, with
ENGINE_BUILD_OPTIONS) and ENGINE_RUN_OPTIONS describe the machine. Needs root, to look into running containers. Where
podman needs a namespace of its own: in-namespace, beside this file.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import pytest
from image import environment as image_environment
from sandbox import PROJECT, command_lines, command_runs, wait_for

TIMEOUT = 180  # seconds for one test, and so for one run


@cache
def engine() -> str:
    """Return the engine that answers, "" when none does."""
    for name in [os.environ["ENGINE"]] if os.environ.get("ENGINE") else ["docker", "podman"]:
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return name
    return ""


@cache
def image() -> str:
    """Return the image to test, built if need be. Fails with the build's last lines."""
    if given := os.environ.get("HERMES_TEST_IMAGE"):
        return given
    tag = "hermes-agent:test"
    form = ["--format", "docker"] if "podman" in engine() else []
    argv = [engine(), "build", *form, *shlex.split(os.environ.get("ENGINE_BUILD_OPTIONS", "")), "-t", tag, str(PROJECT)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        pytest.fail("\n".join(["the image cannot be built:", *done.stderr.splitlines()[-20:]]), pytrace=False)
    return tag


class EngineContainer:
    """One container; see sandbox.Sandbox for the options and methods. With an entrypoint, it runs below the engine's
    own PID 1."""

    def __init__(
        self,
        folder: Path,
        *,
        volume: Path,
        environment: dict[str, str] | None = None,
        mounts: tuple[tuple[str, str], ...] = (),
        user: int | None = None,
        gid: int | None = None,
        groups: tuple[int, ...] = (),
        workdir: str = "/opt/data",
        agent: bool = False,
        entrypoint: tuple[str, ...] = (),
        first: tuple[str, ...] = (),
        run_options: str = "",
        options: tuple[str, ...] = (),
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.volume, self.given = folder, volume, environment or {}
        self.environment = image_environment() | self.given
        self.mounts, self.user, self.gid, self.groups = list(mounts), user, user if gid is None else gid, groups
        self.workdir, self.entrypoint, self.options = workdir, entrypoint, options
        self.first, self.run_options = first, run_options
        self.name = f"hermes-test-{os.getpid()}-{time.monotonic_ns()}"
        self.words: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def put_agent(self, script: str) -> None:
        """Have a script in the agent's place."""
        agent = self.folder / "hermes"
        agent.write_text(script)
        agent.chmod(0o755)
        self.mounts.append((str(agent), "/opt/hermes/.venv/bin/hermes"))

    def command(self, words: list[str]) -> list[str]:
        """Return the argv that runs this container in the foreground."""
        self.volume.mkdir(parents=True, exist_ok=True)
        argv = [
            engine(),
            "run",
            "-i",
            "--name",
            self.name,
            "-w",
            self.workdir,
            *shlex.split(os.environ.get("ENGINE_RUN_OPTIONS", "")),
        ]
        for host, guest in ((str(self.volume), "/opt/data"), *self.mounts):
            argv += ["-v", f"{host}:{guest}"]
        for name, value in self.given.items():
            argv += ["-e", f"{name}={value}"]
        if self.user is not None:
            argv += ["--user", f"{self.user}:{self.gid}"]
            argv += [] if self.user == 10000 else ["--tmpfs", "/run:exec,mode=1777"]  # else /run is the user's
        for group in self.groups:
            argv += ["--group-add", str(group)]
        if self.run_options:
            argv += ["--tmpfs", f"/run:{self.run_options}"]
        if self.first:
            argv += ["--entrypoint", json.dumps(self.first)]
        if self.entrypoint:
            argv += ["--init", "--entrypoint", json.dumps(self.entrypoint)]
        return [*argv, *self.options, image(), *words]

    def run(self, *words: str, timeout: float = TIMEOUT, **options) -> subprocess.CompletedProcess:
        """Run to the end; stdout and stderr are captured unless options say otherwise."""
        options = {"capture_output": True} | options
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        try:
            return subprocess.run(self.command(list(words)), timeout=timeout, **options)
        finally:
            self.forget()

    def start(self, *words: str) -> None:
        """Start in the background, and wait for the boot's end."""
        self.words = list(words)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command(self.words), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(lambda: self.process.poll() is not None or self.booted(), TIMEOUT)

    def booted(self) -> bool:
        """Return whether the command runs."""
        return bool(self.init()) and command_runs(self.path("/"))

    def log(self) -> str:
        """Return what the container has written."""
        return (self.folder / "log").read_text(errors="backslashreplace")

    def init(self) -> int:
        """Return PID 1's number on the machine, 0 when the container is not running."""
        done = subprocess.run([engine(), "inspect", "-f", "{{.State.Pid}}", self.name], capture_output=True, text=True)
        return int(done.stdout) if done.stdout.strip().isdigit() else 0

    def signal(self, number: int) -> None:
        """Send a signal to PID 1."""
        subprocess.run([engine(), "kill", "-s", str(int(number)), self.name], capture_output=True)

    def path(self, guest: str) -> Path:
        """Return a path on the machine for a path in the running container."""
        return Path(f"/proc/{self.init()}/root{guest}")

    def exec_command(
        self, words: list[str], user: str | None = None, environment: dict[str, str] | None = None
    ) -> list[str]:
        """Return the argv that enters the running container."""
        pairs = [option for name, value in (environment or {}).items() for option in ("-e", f"{name}={value}")]
        return [engine(), "exec", "-i", *(["-u", user] if user else []), *pairs, self.name, *words]

    def exec(
        self, *words: str, user: str | None = None, environment: dict[str, str] | None = None, timeout: float = TIMEOUT
    ):
        """Run a program in the running container; returns what subprocess.run does, output captured."""
        argv = self.exec_command(list(words), user, environment)
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def processes(self) -> dict[str, str]:
        """Return the command lines of the processes in the running container, by their pids there."""
        return command_lines(self.path("/proc"))

    def stop(self, timeout: float = 10) -> int:
        """Stop it as its users do; return the exit code, and keep nothing but the volume."""
        subprocess.run([engine(), "stop", "-t", str(int(timeout)), self.name], capture_output=True)
        code = self.process.wait(TIMEOUT) if self.process else 0
        self.forget()
        return code

    def restart(self) -> None:
        """Stop and start it."""
        self.stop()
        self.start(*self.words)

    def forget(self) -> None:
        """Remove the container, running or not."""
        subprocess.run([engine(), "rm", "-f", self.name], capture_output=True)

    def remove(self) -> None:
        """Stop and forget everything but the volume."""
        self.forget()
        if self.process:
            self.process.wait(TIMEOUT)
