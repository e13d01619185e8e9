"""However a container is started, by the image's own entrypoint or by what older templates and platforms put in its
place: the command runs as hermes, beside supervised gateways, with its own exit code."""

from __future__ import annotations

import ast

import pytest
from sandbox import CACHE, ENTRYPOINT, WRAPPER, write_script

import main_wrapper

OLD = "/opt/hermes/docker/entrypoint.sh"
DEPRECATED = "entrypoint.sh: warning: docker/entrypoint.sh is deprecated; use the image's ENTRYPOINT, /init\n"
WHO = ("sh", "-c", "id -un; s6-svstat -o up /run/service/gateway-default; exit 3")

LAUNCHED = {
    "x": "x",
    "/init x": "x",
    f"/init {WRAPPER} x": f"{WRAPPER} x",
    f"{WRAPPER} /init {WRAPPER} gateway run": f"{WRAPPER} gateway run",
    f"{WRAPPER} {OLD} gateway run": f"{WRAPPER} gateway run",
    f"{WRAPPER} tini -g -- {OLD} x": f"{WRAPPER} x",
    f"{WRAPPER} tini -- /init x": f"{WRAPPER} x",
    "tini -- /init x": "x",
    f"tini -- /init {WRAPPER} x": f"{WRAPPER} x",
    f"tini -g -- {OLD} gateway run": f"{WRAPPER} gateway run",
    "tini -g -- gateway run": f"{WRAPPER} gateway run",
    "tini -- --help": f"{WRAPPER} --help",
    "tini -- /opt/data/x.sh": f"{WRAPPER} /opt/data/x.sh",
    "tini -e 143 -p SIGTERM -vgp SIGHUP -e143 -pSIGINT sh -c -- x": f"{WRAPPER} sh -c -- x",
    "tini -vvv": WRAPPER,
    "tini": WRAPPER,
    "/usr/bin/tini -- x": f"{WRAPPER} x",
    f"{WRAPPER} hermes /init": f"{WRAPPER} hermes /init",
    "": "",
}


@pytest.mark.parametrize("words", LAUNCHED)
def test_launchers_in_front_are_dropped(words):
    """Nothing of the program's with them; behind any but /init itself, the wrapper is what runs it."""
    assert main_wrapper.launched(words.split()) == LAUNCHED[words].split()


PLATFORMS = {
    "tini": ("/usr/bin/tini", "-g", "--"),
    "tini and the old entrypoint": ("/usr/bin/tini", "-g", "--", OLD),
    "the image's, twice": (*ENTRYPOINT, *ENTRYPOINT),
}
# Without words it looks whether PID 1 is its parent, which in place is another's.
CHILD_OF_PID_1 = pytest.param((OLD,), id="the old entrypoint", marks=pytest.mark.overlay)


@pytest.mark.parametrize(
    "entrypoint", [*(pytest.param(words, id=name) for name, words in PLATFORMS.items()), CHILD_OF_PID_1]
)
def test_below_another_pid_1_the_command_runs_as_hermes(container, entrypoint):
    """Whichever launcher the template names."""
    box = container(entrypoint=entrypoint, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\necho real hermes: $*\ncase $* in gateway*) exec sleep infinity;; esac\n")
    done = box.run(*WHO)
    assert (done.returncode, done.stdout) == (3, b"hermes\ntrue\n"), done.stderr.decode()
    assert box.run().stdout == b"real hermes:\n"


FIRST = [
    f"/usr/bin/tini -g -- {WHO[0]}",
    f"{OLD} sh",
    f"{WRAPPER} sh",
    f"/init {WRAPPER} /init {WRAPPER} sh",
    "/opt/hermes/bin/hermes",
]


@pytest.mark.parametrize("words", FIRST, ids=lambda words: words.split()[0].rpartition("/")[2])
def test_as_pid_1_too(container, words):
    """A pod's `command:`, or --entrypoint, in place of the image's: it is /init with these words."""
    box = container(first=tuple(words.split()))
    box.put_agent("#!/bin/sh\nid -un; cat /proc/1/comm; echo real hermes: $*\n")
    tail = ["-c", "id -un; cat /proc/1/comm; echo real hermes: $0 $1", "gateway", "run"]
    tail = ["gateway", "list"] if words.endswith("hermes") else tail
    done = box.run(*tail)
    expected = "gateway list" if words.endswith("hermes") else "gateway run"
    assert done.stdout.decode() == f"hermes\ns6-svscan\nreal hermes: {expected}\n", done.stderr.decode()
    assert (DEPRECATED in done.stderr.decode()) == words.startswith(OLD)


@pytest.mark.sandbox
def test_a_root_owned_volume_is_no_obstacle_to_hermes_as_pid_1(container, tmp_path):
    """`command: [hermes, gateway, run]` on a volume fresh from the platform."""
    (tmp_path / "volume").mkdir()
    box = container(first=("/opt/hermes/bin/hermes",))
    box.put_agent("#!/bin/sh\ntouch $HERMES_HOME/mine && echo done\n")
    done = box.run("gateway", "run", "--no-supervise")
    assert (done.returncode, done.stdout) == (0, b"done\n"), done.stderr.decode()


def test_in_a_running_container_a_launcher_is_the_wrapper(container):
    """`docker exec c /init sh`, and tini: no second boot, which would take the gateways' slots away."""
    box = container(entrypoint=ENTRYPOINT)
    box.start("sleep", "infinity")
    for words in (["/init"], ["/usr/bin/tini", "--"], [OLD], list(ENTRYPOINT)):
        done = box.exec(*words, "id", "-un")
        assert (done.returncode, done.stdout) == (0, "hermes\n"), done.stderr
    assert box.exec("/command/s6-svok", "/run/service/gateway-default").returncode == 0


def test_the_old_entrypoint_alone_is_the_setup(container):
    """By `docker exec`, as it has been."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec(OLD)
    assert (done.returncode, done.stdout) == (0, "") and done.stderr.startswith(DEPRECATED), done.stderr
    assert "info: run as 10000:10000\n" in done.stderr


# Words that are a subcommand of hermes's and a program


def test_the_list_of_subcommands_is_the_agents():
    """By the source of the agent that the image has: its parser's own choices."""
    path = next((CACHE / "venv-0.19.0").glob("lib/python3*/site-packages/hermes_cli/main.py"), None)
    if path is None:
        pytest.skip("the agent has not been fetched")
    (names,) = (
        node.value.args[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_BUILTIN_SUBCOMMANDS"
    )
    assert ast.literal_eval(names) - {"help"} == main_wrapper.SUBCOMMANDS


PARSER = """
import argparse, sys
def choices(self, *_, **__):
    (action,) = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
    print(*sorted(action.choices))
    sys.exit()
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = choices
import hermes_cli.main
sys.argv[1:] = ["chat"]
hermes_cli.main.main()
"""


@pytest.mark.sandbox
def test_the_list_of_subcommands_is_the_parsers(container):
    """Asked of the parser itself, as the agent builds it."""
    box = container(agent=True)
    done = box.run("/opt/hermes/.venv/bin/python", "-c", PARSER)
    assert set(done.stdout.decode().split()) == main_wrapper.SUBCOMMANDS, done.stderr.decode()


@pytest.mark.sandbox
def test_hermes_has_its_own_words(container):
    """`login`, which util-linux has too, and `mcp`, which an extra puts into the venv; shells, paths are programs."""
    box = container()
    box.put_agent("#!/bin/sh\necho real hermes: $*\n")
    for path in ("usr/local/bin/login", "opt/hermes/.venv/bin/mcp", "opt/hermes/.venv/bin/other"):
        write_script(box.upper / path, "#!/bin/sh\necho program $*\n")
    for word in ("login", "mcp"):
        assert box.run(word, "--help").stdout == f"real hermes: {word} --help\n".encode()
    assert box.run("other", "-x").stdout == b"program -x\n"
    assert box.run("/usr/local/bin/login").stdout == b"program\n"
    for word in ("sh", "bash", "python3"):
        assert word not in main_wrapper.SUBCOMMANDS and b"real" not in box.run(word, "--version").stdout


# What /init finds before it starts anything


@pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])
def test_a_run_that_is_noexec_is_one_line(container, entrypoint):
    """`--tmpfs /run` of Docker's is: 126, with what to write instead."""
    done = container(entrypoint=entrypoint, run_options="noexec,mode=0755").run("true")
    assert done.returncode == 126
    assert done.stderr.decode().splitlines() == [
        "init: fatal: /run is mounted noexec, so s6 cannot run anything there; mount it with exec: --tmpfs /run:exec"
    ]
