"""The container's command: routing, the drop, and that nothing of the program's changes on the way. On real s6."""

from __future__ import annotations

import os
import pty
import re
import signal
import time

import pytest
from sandbox import ENTRYPOINT, PROJECT, WRAPPER

CODES = [(f"exit {code}", code) for code in (0, 1, 2, 42, 126, 127, 143)]
SIGNALS = [
    (f"kill -{name} $$", 128 + number) for name, number in (("TERM", 15), ("KILL", 9), ("SEGV", 11), ("PIPE", 13))
]


@pytest.mark.parametrize("script, code", CODES + SIGNALS, ids=lambda value: str(value).replace(" ", "-"))
def test_the_exit_code_is_the_programs(container, script, code):
    """A program's code is the container's, and 128+n is a death by signal n."""
    assert container().run("sh", "-c", script).returncode == code


def test_a_path_that_is_missing_is_127_with_one_line(container):
    """A word with a slash is a program by path; that it is missing is said once."""
    done = container(environment={"HERMES_BOOT_QUIET": "1"}).run("/no/such/program")
    assert done.returncode == 127
    assert len(done.stderr.splitlines()) == 1 and b"/no/such/program" in done.stderr


def test_a_path_that_is_not_executable_is_126_with_one_line(container):
    """So is that it cannot be executed."""
    done = container(environment={"HERMES_BOOT_QUIET": "1"}).run("/etc/passwd")
    assert done.returncode == 126
    assert len(done.stderr.splitlines()) == 1 and b"/etc/passwd" in done.stderr


@pytest.mark.sandbox
def test_a_missing_hermes_is_127(container):
    """An image without its agent says so."""
    done = container(environment={"HERMES_BOOT_QUIET": "1"}).run()
    assert done.returncode == 127
    assert len(done.stderr.splitlines()) == 1 and b"/opt/hermes/.venv/bin/hermes" in done.stderr


ARGVS = {
    "empty": ["", "", "a", ""],
    "spaces and quotes": [" a b ", "'", '"', "\\", "$HOME", "`id`", "*"],
    "newlines": ["a\nb", "\n", "\t"],
    "invalid UTF-8": ["\udcff\udcfe", "ä", "\udc80"],
    "dashes": ["--", "-x", "--help", "-"],
    "slashes": ["/", "./x", "../"],
    "many": [str(number) for number in range(2000)],
}


@pytest.mark.parametrize("program", ["/usr/bin/printf", "printf"])
@pytest.mark.sandbox
def test_argv_survives_byte_for_byte(container, program):
    """Every word arrives, whatever is in it."""
    words = [word for argv in ARGVS.values() for word in argv]
    done = container().run(program, "%s\\0", *words)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def hermes_that_prints_its_arguments(box) -> None:
    """Put a program in the agent's place that shows what it was called with: what is tested is the way to it."""
    box.put_agent('#!/bin/sh\nfor word do printf "%s\\0" "$word"; done\n')


ROUTES = {
    "no word": ([], []),
    "leading dash": (["--version"], ["--version"]),
    "two dashes": (["--", "x"], ["--", "x"]),
    "subcommand": (["chat", "-q", "hi"], ["chat", "-q", "hi"]),
    "hermes itself": (["hermes", "chat"], ["chat"]),
    "a folder on PATH is no program": (["sub"], ["sub"]),
    "empty word": ([""], [""]),
}


@pytest.mark.parametrize("words, arguments", ROUTES.values(), ids=ROUTES)
@pytest.mark.sandbox
def test_what_is_no_program_is_for_hermes(container, words, arguments):
    """The routing table's last row."""
    box = container()
    hermes_that_prints_its_arguments(box)
    (box.upper / "usr/local/bin/sub").mkdir(parents=True)
    assert box.run(*words).stdout.split(b"\0")[:-1] == [word.encode() for word in arguments]


@pytest.mark.sandbox
def test_the_environment_survives_byte_for_byte(container):
    """Newlines, equals signs, invalid UTF-8 and empty values arrive; HOME, PATH and VIRTUAL_ENV are the image's."""
    given = {"LINES2": "a\nb\n", "EQUALS": "a=b==", "BYTES": "\udcff\udcfe ä", "EMPTY": "", "SPACES": "  x  "}
    done = container(environment=given).run("env", "-0")
    seen = dict(os.fsdecode(pair).split("=", 1) for pair in done.stdout.split(b"\0")[:-1])
    assert {name: seen.get(name) for name in given} == given
    assert seen["HOME"] == seen["HERMES_HOME"] == "/opt/data"
    assert seen["VIRTUAL_ENV"] == "/opt/hermes/.venv"
    assert seen["PATH"].startswith("/opt/hermes/bin:/opt/hermes/.venv/bin:")
    assert "LC_CTYPE" not in seen and "S6_CMD_ARG0" not in seen


@pytest.mark.overlay
def test_the_process_environment_is_right_with_keep_env(container):
    """With S6_KEEP_ENV=1 there is no folder to read."""
    done = container(environment={"S6_KEEP_ENV": "1", "MARK": "here"}).run(
        "sh", "-c", "echo $MARK; ls -d /run/s6/container_environment"
    )
    assert done.stdout == b"here\n"


def test_the_working_directory_is_kept(container):
    """`docker run -w`."""
    assert container(workdir="/usr/share").run("pwd").stdout == b"/usr/share\n"
    assert container(environment={"HERMES_WORKDIR": "/none"}).run("pwd").stdout == b"/opt/data\n"


@pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])
def test_any_folder_is_a_workdir(container, tmp_path, entrypoint):
    """s6-overlay's rc.init takes a name with a space for two, and the container hangs; no variable is left of it."""
    folder = "/srv/[a-z] *\tb"
    box = container(workdir=folder, mounts=((str(tmp_path), folder),), entrypoint=entrypoint)
    done = box.run("sh", "-c", "pwd; env | grep -c WORKDIR")
    assert done.stdout.decode() == f"{folder}\n0\n", done


def test_root_is_dropped_with_its_groups_and_signals_are_as_they_were(container):
    """No root ID, no root group, and SIGPIPE not ignored, which Python would hand on."""
    done = container().run(
        "sh", "-c", "grep -E '^(Uid|Gid|Groups|SigIgn|SigBlk)' /proc/self/status; cat /proc/self/comm"
    )
    status = dict(re.findall(r"(\w+):\s*(.*?)\s*\n", done.stdout.decode()))
    assert status["Uid"].split() == status["Gid"].split() == ["10000"] * 4
    assert status["Groups"] == "10000"
    standard = 2**31 - 1  # signals 1 to 31; glibc's own two above may be ignored by whoever runs the tests
    assert int(status["SigIgn"], 16) & standard == int(status["SigBlk"], 16) & standard == 0


@pytest.mark.parametrize("verbosity", ["0", "1", "2"])
def test_stdout_is_the_programs_alone(container, verbosity):
    """No line of ours reaches stdout at any verbosity."""
    assert container(environment={"S6_VERBOSITY": verbosity}).run("echo", "answer").stdout == b"answer\n"


def test_stdin_is_the_programs(container):
    """`echo hi | docker run -i`."""
    assert container().run("cat", input=b"hi\n").stdout == b"hi\n"


def read_until(fd: int, text: bytes) -> bytes:
    """Read from a terminal until a text has come."""
    seen, deadline = b"", time.monotonic() + 20
    while text not in seen and time.monotonic() < deadline:
        try:
            seen += os.read(fd, 4096)
        except OSError:
            break
    assert text in seen
    return seen


@pytest.mark.sandbox
def test_a_terminal_is_the_programs(container):
    """Under a pty: all three are a TTY, the window size is seen, and Ctrl-C reaches the program."""
    script = (
        "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && stty size;"
        " trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.1; done"
    )
    argv = container().command(["sh", "-c", script])
    pid, terminal = pty.fork()
    if pid == 0:
        os.system("stty rows 33 cols 77")
        os.execv(argv[0], argv)
    try:
        assert b"33 77" in read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        read_until(terminal, b"interrupted")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    finally:
        os.close(terminal)


@pytest.mark.overlay
def test_the_program_is_execd_not_waited_for(container):
    """It has the pid that the wrapper had: rc.init's own child, with no process in between."""
    done = container().run("sh", "-c", "cat /proc/$PPID/cmdline | tr '\\0' ' '")
    assert b"rc.init top /opt/hermes/docker/main-wrapper.sh sh -c" in done.stdout


def test_as_a_user_of_its_own_nothing_is_dropped(container, tmp_path):
    """`--user 10000`: the program runs as it is."""
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 10000)
    done = container(user=10000).run("id", "-u")
    assert done.stdout == b"10000\n", done.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.sandbox
def test_the_hermes_command_drops_root(container, sent):
    """`docker exec c hermes …` as root runs hermes as the user hermes; HERMES_DOCKER_EXEC_AS_ROOT=1 opts out."""
    box = container()
    box.put_agent(f'#!/bin/sh\nid -u\necho "$HOME" "$@"\nkill -{int(sent)} $$\n')
    box.start("sleep", "infinity")
    done = box.exec("hermes", "chat", "a b")
    assert (done.stdout, done.returncode) == ("10000\n/opt/data chat a b\n", -sent)
    assert box.exec("hermes", environment={"HERMES_DOCKER_EXEC_AS_ROOT": "1"}).stdout.startswith("0\n")


@pytest.mark.parametrize("script", ["main_wrapper.py", "hermes_boot.py"])
def test_an_old_kernel_reads_the_whole_first_line(script):
    """Linux before 5.1 looks at 127 bytes of a script, gVisor too."""
    with open(PROJECT / script, "rb") as file:
        assert len(file.readline()) <= 127


def test_a_run_that_everybody_may_write_is_no_way_to_roots_files(container):
    """As `--tmpfs /run` makes it: what hermes put where the wrapper leaves its word is not written to, and not
    believed."""
    box = container()
    box.start("sleep", "infinity")
    script = f"""
        chmod 1777 /run && rm /run/hermes-command && echo kept >/etc/kept
        s6-setuidgid hermes sh -c 'for pid in $(seq 3000); do ln -s /etc/kept /run/hermes-command.$pid; done
            echo 1 1 >/run/hermes-command'
        {WRAPPER} true
        cat /etc/kept; stat -c %U /run/hermes-command
    """
    assert box.exec("sh", "-c", script).stdout == "kept\nroot\n"
