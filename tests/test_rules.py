"""Every rule as a table, on the functions themselves: no root, no container, no process but one shell."""

from __future__ import annotations

import argparse
import ast
import errno
import itertools
import json
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import hermes_boot
import main_wrapper

SCRIPTS = Path(hermes_boot.__file__).parent


def rows(table: dict):
    """Return a table as pytest takes it: the names are the ids."""
    return pytest.mark.parametrize("case", table.values(), ids=list(table))


# The two scripts


def functions(script: str) -> dict[str, str]:
    """Return the text of every function of a script."""
    text = (SCRIPTS / script).read_text()
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def test_what_both_scripts_need_is_the_same_text():
    """Functions of one name are one function, and so are constants; only main is each script's own."""
    boot, wrapper = functions("hermes_boot.py"), functions("main_wrapper.py")
    both = (boot.keys() & wrapper.keys()) - {"main"}
    assert {"container_environment", "switch", "root_home", "as_hermes", "execute", "read_pid_file"} <= both
    assert {name: boot[name] for name in both} == {name: wrapper[name] for name in both}
    constants = [name for name, value in vars(main_wrapper).items() if isinstance(value, (str, int, tuple))]
    shared = [name for name in constants if name.isupper() and hasattr(hermes_boot, name)]
    assert len(shared) >= 10
    assert {name: vars(hermes_boot)[name] for name in shared} == {name: vars(main_wrapper)[name] for name in shared}


@pytest.mark.parametrize("script", ["hermes_boot.py", "main_wrapper.py"])
def test_no_name_is_bound_twice(script):
    """The second would take the first one's place everywhere."""
    names: list[str] = []
    for node in ast.parse((SCRIPTS / script).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    assert len(names) > 10 and sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("script", ["hermes_boot.py", "main_wrapper.py"])
def test_neither_script_imports_the_other(script):
    """Nor anything that is not Python's own."""
    found = set()
    for node in ast.walk(ast.parse((SCRIPTS / script).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found <= sys.stdlib_module_names, found - sys.stdlib_module_names
    assert "_json" not in found


# Environment

SWITCHES = {
    "1": True, " TRUE ": True, "yes\n": True, "On": True,
    "0": False, "0 ": False, "False": False, "no": False, "OFF": False,
    "": None, "2": None, "enabled": None,
}  # fmt: skip


@pytest.mark.parametrize("value, expected", SWITCHES.items())
def test_switch(value, expected):
    """On, off, or neither; blanks do not count."""
    assert hermes_boot.switch(value) is expected


HOMES = {
    "/opt/data": "/opt/data",
    "": "/opt/data",
    "/opt/data/profiles/coder": "/opt/data",
    "/opt/data/profiles/coder/": "/opt/data",
    "/opt/data/profiles/coder//": "/opt/data",
    "/srv/profiles": "/srv/profiles",
    "/srv/my home/profiles/x": "/srv/my home",
    "/profiles/x": "/",
}


@pytest.mark.parametrize("value, expected", HOMES.items())
def test_root_home(value, expected):
    """Of a profile's HERMES_HOME, in Python and, but for the root folder itself, in a slot's shell."""
    assert hermes_boot.root_home({"HERMES_HOME": value}) == expected
    if expected != "/":
        script = "\n".join([*hermes_boot.FIND_HOME, 'printf %s "$home"'])
        done = subprocess.run(["/bin/sh", "-c", script], env={"HERMES_HOME": value}, capture_output=True, text=True)
        assert done.stdout == expected


def test_program_environment_adds_what_is_missing_and_changes_nothing_else():
    """PATH keeps its order; HOME is the root HERMES_HOME."""
    given = {"PATH": "/usr/bin:/opt/hermes/.venv/bin", "HERMES_HOME": "/srv/profiles/a", "A": "b\n", "HOME": "/root"}
    found = hermes_boot.program_environment(given)
    assert found["PATH"] == "/opt/hermes/bin:/usr/bin:/opt/hermes/.venv/bin:/srv/.local/bin"
    assert (found["HOME"], found["HERMES_HOME"], found["A"]) == ("/srv", "/srv/profiles/a", "b\n")
    assert found["VIRTUAL_ENV"] == "/opt/hermes/.venv"
    assert found["HERMES_LAZY_INSTALL_TARGET"] == "/srv/lazy-packages"


VALUES = {
    "plain": (b"x\n", "x"),
    "empty": (b"\n", ""),
    "one newline of its own": (b"a\n\n", "a\n"),
    "three": (b"\n\n\n\n", "\n\n\n"),
    "no newline, by hand": (b"x", "x"),
    "equals": (b"a=b=c\n", "a=b=c"),
    "120 KB": (b"x" * 120_000 + b"\n", "x" * 120_000),
    "not UTF-8": (b"\xff\xfe\n", "\udcff\udcfe"),
}


@rows(VALUES)
def test_a_file_of_the_container_environment_is_the_value_and_one_newline(monkeypatch, tmp_path, case):
    """As s6-overlay writes it and with-contenv reads it."""
    data, value = case
    (tmp_path / "NAME").write_bytes(data)
    for script in (hermes_boot, main_wrapper):
        monkeypatch.setattr(script, "CONTAINER_ENVIRONMENT", str(tmp_path))
        assert script.container_environment()["NAME"] == value


# Routing

ROUTES = {
    "none": ([], [main_wrapper.HERMES]),
    "hermes": (["hermes"], [main_wrapper.HERMES]),
    "arguments": (["chat", "-q", "hi"], [main_wrapper.HERMES, "chat", "-q", "hi"]),
    "named": (["hermes", "chat"], [main_wrapper.HERMES, "chat"]),
    "dash": (["--version"], [main_wrapper.HERMES, "--version"]),
    "program": (["tool", "-x"], ["{bin}/tool", "-x"]),
    "not executable": (["text"], [main_wrapper.HERMES, "text"]),
    "a folder": (["folder"], [main_wrapper.HERMES, "folder"]),
    "path": (["/bin/x", "y"], ["/bin/x", "y"]),
    "relative path": (["./x"], ["./x"]),
    "empty word": ([""], [main_wrapper.HERMES, ""]),
}


@rows(ROUTES)
def test_routing(tmp_path, case):
    """Of the container command's words."""
    words, expected = case
    (tmp_path / "folder").mkdir()
    for name, mode in (("tool", 0o755), ("text", 0o644), ("hermes", 0o755), ("--version", 0o755)):
        (tmp_path / name).touch(mode)
    found = main_wrapper.program_of(words, {"PATH": f"/none:{tmp_path}"})
    assert found == [word.format(bin=tmp_path) for word in expected]


REQUESTS = {
    "gateway start": ["gateway", "start"],
    "gateway stop --all": ["gateway", "stop", "--all"],
    "-p coder gateway restart": ["gateway", "restart", "-p", "coder"],
    "--profile coder gateway stop": ["gateway", "stop", "-p", "coder"],
    "--profile=coder gateway stop": ["gateway", "stop", "-p", "coder"],
    "-p coder gateway stop --all": ["gateway", "stop", "--all"],
    "gateway start --force": [],
    "gateway start --all --x": [],
    "gateway start -h": [],
    "gateway status": [],
    "gateway run": [],
    "gateway": [],
    "chat gateway start": [],
    "gateway start -p coder": ["gateway", "start", "-p", "coder"],
    "gateway --profile=coder stop": ["gateway", "stop", "-p", "coder"],
    "gateway stop --all --profile coder": ["gateway", "stop", "--all"],
    "gateway stop -- -p coder": [],
    "gateway stop -p": [],
    "-p gateway start": [],
    "": [],
}


@pytest.mark.parametrize("words, expected", REQUESTS.items())
def test_gateway_request(words, expected):
    """Exactly these are answered here; unknown flags and --help go to the agent."""
    assert main_wrapper.gateway_request(words.split()) == expected


LINES = {
    "rc.init": ("/bin/sh /run/s6/rc.init top /opt/hermes/docker/main-wrapper.sh gateway run", False, "gateway run"),
    "no rc.init": ("/bin/sh /x/main-wrapper.sh gateway run", False, None),
    "PID 1": ("/usr/bin/python3 -IBS /opt/hermes/docker/main-wrapper.sh chat", True, "chat"),
    "by its file": ("python3 /opt/hermes/docker/main_wrapper.py chat", True, "chat"),
    "no words": ("sh rc.init top /opt/hermes/docker/main-wrapper.sh", False, ""),
    "another program": ("sh rc.init top sleep 3", False, None),
    "a word before": ("sh main-wrapper.sh rc.init top sleep", False, None),
}


@rows(LINES)
def test_the_container_commands_words(case):
    """They follow the wrapper's name, on PID 1's command line, or behind rc.init."""
    line, is_init, expected = case
    found = hermes_boot.wrapped_words(line.split(), is_init)
    assert (" ".join(found[1:]) if found else None) == expected


# Accounts

GROUPS = [b"root:x:0:\n", b"users:x:100:alice,hermes-x\n", b"docker:x:998:\n", b"hermes:x:10000:\n"]
MEMBERS = {
    "nothing": ([], GROUPS),
    "an empty one": ([998], [*GROUPS[:2], b"docker:x:998:hermes\n", GROUPS[3]]),
    "one with members": ([100], [GROUPS[0], b"users:x:100:alice,hermes-x,hermes\n", *GROUPS[2:]]),
    "a new one": ([77], [*GROUPS, b"hermes-77:x:77:hermes\n"]),
    "a member already": ([10], [*GROUPS, b"hermes-10:x:10:hermes\n"]),
}


@rows(MEMBERS)
def test_membership(case):
    """By the GID; every other line stays byte for byte; a second time changes nothing."""
    groups, expected = case
    found = hermes_boot.with_member(GROUPS, b"hermes", groups)
    assert found == expected and hermes_boot.with_member(found, b"hermes", groups) == expected


def test_membership_in_a_file_without_a_last_newline():
    """The new line is one of its own."""
    assert hermes_boot.with_member([b"root:x:0:"], b"hermes", [5]) == [b"root:x:0:\n", b"hermes-5:x:5:hermes\n"]


def test_an_accounts_fields():
    """A user whose name begins the same stays; so does everything else of the line."""
    lines = [b"hermes-x:x:1:1::/a:/b\n", b"hermes:x:10000:10000:a:b:c\n", b"xhermes:x:2:2:::\n", b"hermes:odd\n"][:3]
    found = hermes_boot.with_field(lines, b"hermes", {2: 99, 3: 100})
    assert found == [lines[0], b"hermes:x:99:100:a:b:c\n", lines[2]]


IDS = {"1": 1, "99": 99, "4294967294": 4294967294, "0": None, "4294967295": None, "-1": None, "1e3": None,
       "٣": None, " 5": None, "5\n": None, "007": 7, "99999999999": None}  # fmt: skip


@pytest.mark.parametrize("value, expected", IDS.items())
def test_ids(value, expected):
    """Decimal, 1 to 4294967294."""
    assert hermes_boot.number_in(value, 1, hermes_boot.MAX_ID) == expected


# Profiles

NAMES = {"coder": True, "a": True, "0-_": True, "x" * 243: True, "x" * 244: False, "": False, "-rf": False,
         "_a": False, "Coder": False, "a b": False, "a.b": False, "ä": False, "..": False, "a/b": False}  # fmt: skip


@pytest.mark.parametrize("name, good", NAMES.items())
def test_names(name, good):
    """[a-z0-9][a-z0-9_-]*, and a slot's name of at most 251 bytes; what is wrong comes with what to do."""
    fault = hermes_boot.name_fault(name)
    assert (fault is None) is good and (good or (fault.text and fault.fix == "rename the folder"))


MEANT = {"coder": "coder", "gateway-coder": "coder", "gateway-x": "gateway-x", "gateway--x": "gateway--x", "X": ""}


@pytest.mark.parametrize("name, profile", MEANT.items())
def test_a_services_name_is_its_profile(tmp_path, name, profile):
    """Unless a profile of that very name has a slot, or what follows the prefix cannot be one."""
    (tmp_path / "gateway-gateway-x").mkdir()
    manager = hermes_boot.S6ServiceManager(str(tmp_path), str(tmp_path), environment={})
    try:
        assert manager.valid(name) == profile
    except hermes_boot.InvalidName:
        assert not profile


STATES = {
    "nothing": ({}, None),
    "running": ({"gateway_state": "running"}, "running"),
    "draining": ({"gateway_state": "draining"}, "running"),
    "degraded": ({"gateway_state": "degraded"}, "running"),
    "starting": ({"gateway_state": "starting"}, "starting"),
    "the operator's word wins": ({"desired_state": "stopped", "gateway_state": "running"}, "stopped"),
    "draining is no intent": ({"desired_state": "draining"}, "draining"),
    "null is no word": ({"desired_state": None, "gateway_state": "running"}, "running"),
}


@rows(STATES)
def test_states(case):
    """desired_state, else gateway_state."""
    state, expected = case
    assert hermes_boot.intent_of(state) == (expected, None)


@pytest.mark.parametrize("value", [1, [], {}, True])
def test_a_state_that_is_no_string(value):
    """Is a fault, with what to do."""
    state, fault = hermes_boot.intent_of({"desired_state": value})
    assert state is None and str(fault).endswith("; start or stop the gateway to set it")


JSON = {b'{"a": 1}': {"a": 1}, b'\xef\xbb\xbf{"a": 1}\n': {"a": 1}, b" {} ": {}}
NO_JSON = [b"", b"[]", b"1", b'"x"', b"null", b'{"a": 1', b"{'a': 1}", b"\xff", b"[" * 200_000, b'{"a": 1} x']


@pytest.mark.parametrize("data, expected", JSON.items())
def test_state_files(data, expected):
    """A JSON object, with a byte order mark or without."""
    assert hermes_boot.load_state(data) == expected


@pytest.mark.parametrize("data", NO_JSON, ids=lambda data: repr(data[:10]))
def test_what_is_no_state_file(data):
    """Always a ValueError, never another."""
    with pytest.raises(ValueError):
        hermes_boot.load_state(data)


# What hermes's programs are given

UMASKS = {"": None, "0": 0, "2": 2, "022": 18, "0022": 18, "077": 63, "777": None, "0177": None}
UMASKS |= {"1022": None, "00022": None, "8": None, "abc": None, "-1": None, "0o22": None, " 22": None, "٢": None}


@pytest.mark.parametrize("value, umask", UMASKS.items())
def test_the_umask_of_a_program_and_of_a_logger(value, umask):
    """The same in Python and in the logger's shell."""
    assert hermes_boot.umask_of({"UMASK": value}) == umask
    argv = ["sh", "-c", f"umask 0137; {hermes_boot.TAKE_UMASK}; umask"]
    shown = subprocess.run(argv, env={"UMASK": value}, capture_output=True, text=True, check=True)
    assert (int(shown.stdout, 8), shown.stderr) == (0o137 if umask is None else umask, "")


SECRETS = {
    "OPENAI_API_KEY_FILE": "OPENAI_API_KEY",
    "TELEGRAM_BOT_TOKEN_FILE": "TELEGRAM_BOT_TOKEN",
    "HERMES_AUTH_JSON_BOOTSTRAP_FILE": "HERMES_AUTH_JSON_BOOTSTRAP",
    "AWS_ACCESS_KEY_ID_FILE": "AWS_ACCESS_KEY_ID",
    "OPENAI_API_KEY": "",
    "SSL_CERT_FILE": "",
    "AZURE_FEDERATED_TOKEN_FILE": "",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "",
    "PASSWORD_FILE": "",
}


@pytest.mark.parametrize("variable, name", SECRETS.items())
def test_which_variables_name_the_file_of_a_secret(variable, name):
    """By the end of the name that the secret itself has."""
    assert hermes_boot.secret_of(variable) == name


# Slots

BACK_OFFS = {
    "none": ([], 0),
    "four": ([10, 11, 12, 13], 0),
    "five in a minute": ([10, 11, 12, 13, 14], 2),
    "slow starts": ([10, 70, 130, 190, 250, 312], 4),
    "a run of more than a minute": ([10, 70, 130, 190, 251], 0),
    "longer each time": ([10, 11, 12, 13, 14, 17, 22, 31], 16),
    "a minute at most": ([*range(10, 15), 17, 22, 31, 48, 81, 142], 60),
    "a long run ends it": ([10, 11, 12, 13, 14, 90], 0),
}


@rows(BACK_OFFS)
def test_back_off(case):
    """Seconds that finish waits after the last of deaths at these seconds."""
    times, delay = case
    assert hermes_boot.back_off([1000.0 + moment for moment in times]) == delay


LOOPS = {  # by the seconds between deaths, since the last one, and since the start, of a gateway that is up
    "five quick ones": (1, 5, 4, True),
    "up to stay": (1, 15, 11, False),
    "up for less than the slow ones were": (16, 17, 15, True),
    "up for longer than the slow ones were": (16, 22, 17, False),
    "long ago": (1, 70, 5, False),
}


@rows(LOOPS)
def test_is_looping(case):
    """Whether five deaths are a crash loop while a gateway is up again."""
    apart, ago, since, looping = case
    now = time.time()
    status = SimpleNamespace(up=True, since=now - since)
    assert hermes_boot.is_looping(status, [now - ago - apart * count for count in reversed(range(5))]) is looping


RUN = """\
#!/command/with-contenv sh
exec 2>&1
home="${HERMES_HOME:-/opt/data}"
home="${home%"${home##*[!/]}"}"
case "${home%/*}" in */profiles) home="${home%/profiles/*}" ;; esac
export HOME="$home" HERMES_HOME="$home" HERMES_S6_SUPERVISED_CHILD=1 HERMES_SUPERVISED_CHILD=1
case ":$PATH:" in *:/opt/hermes/bin:*) ;; *) PATH="/opt/hermes/bin:$PATH" ;; esac
cd "$home" || cd /
[ -d "$home/profiles/coder" ] || s6-setuidgid hermes test -d "$home/profiles/coder" || { echo "coder: profiles/coder is no folder, so its gateway is parked"; exit 78; }
unset $(awk 'BEGIN { for (name in ENVIRON) if (name ~ /^API_SERVER_[A-Z0-9_]+$/) print name }')
export A='b'"'"'c'
[ "$(id -u)" = 0 ] || exec hermes -p coder gateway run --replace
exec s6-setuidgid hermes hermes -p coder gateway run --replace
"""  # noqa: E501
FINISH = """\
#!/bin/sh
[ ! -e ../.s6-svscan/hermes-ending ] || exit 0
script='[ "$1" = 78 ] || [ "$(wc -c <supervise/death_tally)" -ge 70 ] || kill -0 "-$4" 2>/dev/null || exit 0; exec /opt/hermes/bin/hermes-boot finish coder "$@"'
[ "$(id -u)" = 0 ] || exec /bin/sh -c "$script" finish "$@"
exec s6-setuidgid hermes /bin/sh -c "$script" finish "$@"
"""  # noqa: E501
LOG_RUN = """\
#!/command/with-contenv sh
if [ -w /proc/self/fd/2 ] && [ ! -S /proc/self/fd/2 ]; then exec 1>>/proc/self/fd/2; else exec 1>&2; fi
exec 2>&1
case "$UMASK" in [0-7] | [0-7][0-7] | 0[0-7][0-7] | 00[0-7][0-7]) umask "$UMASK" ;; esac
home="${HERMES_HOME:-/opt/data}"
home="${home%"${home##*[!/]}"}"
case "${home%/*}" in */profiles) home="${home%/profiles/*}" ;; esac
[ "$(id -u)" = 0 ] && set -- s6-setuidgid hermes || set --
"$@" s6-setlock -n "$home/logs/gateways/coder"/lock true 2>/dev/null || {
  echo "coder: logs/gateways/coder is locked or cannot be used, so its log goes to the container's alone; does another container use this volume? hermes-boot doctor"
  ulimit -v 16384; exec "$@" s6-log 1
}
ulimit -v 16384
[ "$(id -u)" = 0 ] || exec s6-log 1 n10 s1000000 T "$home/logs/gateways/coder"
exec s6-setuidgid hermes s6-log 1 n10 s1000000 T "$home/logs/gateways/coder"
"""  # noqa: E501


def test_a_slots_files():
    """Whole: path, text and mode of each."""
    assert hermes_boot.slot_files("coder", 30, {"A": "b'c"}, to_folder=True) == {
        "type": ("longrun\n", 0o644),
        "run": (RUN, 0o755),
        "finish": (FINISH, 0o755),
        "timeout-kill": ("30000\n", 0o644),
        "timeout-finish": ("65000\n", 0o644),
        "log/run": (LOG_RUN, 0o755),
    }


def test_what_differs_for_default_and_without_a_log_folder():
    """The default gateway has no -p, and the container's API_SERVER_ variables; the log goes to the container alone."""
    run = RUN.replace("-p coder ", "").replace("export A='b'\"'\"'c'\n", "")
    named = "unset", "profiles/coder"
    kept = [line for line in run.split("\n") if not any(word in line for word in named)]
    assert hermes_boot.run_script("default") == "\n".join(kept)
    alone = LOG_RUN.replace(' n10 s1000000 T "$home/logs/gateways/coder"', "")
    before, _, after = alone.partition('[ "$(id -u)" = 0 ] && set')
    alone = before + after.partition("}\n")[2]
    assert hermes_boot.log_run_script("coder", to_folder=False) == alone


def test_a_built_slot_is_what_was_rendered(tmp_path):
    """With the FIFOs and folders that s6-supervise keeps when it finds them, and `down` unless it starts."""
    files = hermes_boot.slot_files("coder", 30, None, to_folder=True)
    with hermes_boot.Folder(str(tmp_path)) as scandir:
        hermes_boot.build(scandir, "gateway-coder", files, start=False)
    slot = tmp_path / "gateway-coder"
    found = {path: ((slot / path).read_text(), stat.S_IMODE((slot / path).stat().st_mode)) for path in files}
    assert found == files and (slot / "down").read_text() == ""
    for path in ("", "log/"):
        modes = [(slot / f"{path}{name}").stat().st_mode for name in ("supervise/control", "event", "supervise/event")]
        assert stat.S_ISFIFO(modes[0]) and [stat.S_IMODE(mode) for mode in modes] == [0o660, 0o3730, 0o3730]
    assert os.listdir(tmp_path) == ["gateway-coder"]


# Words of people

VERSIONS = ["0.9", "0.18.9", "0.19.0", "0.19.1", "0.20", "1.0", "10.0"]


@pytest.mark.parametrize("older, newer", list(itertools.pairwise(VERSIONS)))
def test_versions(older, newer):
    """By number, not by letter."""
    assert hermes_boot.version_key(older) < hermes_boot.version_key(newer)


SPANS = {"0": "0s", "59": "59s", "60": "1m", "3661": "1h 1m", "90061": "1d 1h", "-5": "0s"}


@pytest.mark.parametrize("value, expected", SPANS.items())
def test_durations(value, expected):
    """The two largest units."""
    assert hermes_boot.duration(float(value)) == expected


def test_since():
    """A span back from now, or a date, as s6-log writes it."""
    for text, size in (("30s", 30), ("10m", 600), ("2h", 7200), ("1d", 86400)):
        then = time.mktime(time.strptime(hermes_boot.since_when(text), "%Y-%m-%d %H:%M:%S"))
        assert abs(time.time() - size - then) < 5
    assert hermes_boot.since_when("2026-05-21T06:18") == "2026-05-21 06:18"
    for text in ("", "1w", "s", "²d", "tomorrow", "2026-13-01"):
        with pytest.raises(argparse.ArgumentTypeError):
            hermes_boot.since_when(text)


SHOWN = {"coder": "coder", "a b": "'a b'", "x\n": "'x\\n'", "\udcff": "'\\udcff'", "": "''", "a=b": "'a=b'"}


@pytest.mark.parametrize("name, expected", SHOWN.items())
def test_names_of_the_volume_in_a_line(name, expected):
    """Harmless ones as they are, others quoted; 100 characters at most."""
    assert hermes_boot.shown(name) == expected and len(hermes_boot.shown(name * 300)) < 130


def test_seeds(monkeypatch, tmp_path):
    """The image's templates, else built-in ones; auth.json and the first state by variable. Modes before the umask."""
    monkeypatch.setattr(hermes_boot, "IMAGE", str(tmp_path))
    (tmp_path / "cli-config.yaml.example").write_text("a: 1\n")
    variables = {"HERMES_AUTH_JSON_BOOTSTRAP": "{}", "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
    boot = hermes_boot.Boot({"HERMES_HOME": str(tmp_path)} | variables)
    found = {name: (mode, data) for name, mode, data in hermes_boot.seeds(boot)}
    assert {name: mode for name, (mode, _) in found.items()} == {
        ".env": 0o600,
        "config.yaml": 0o660,
        "SOUL.md": 0o666,
        "auth.json": 0o600,
        "gateway_state.json": 0o666,
    }  # before the umask
    assert found["config.yaml"][1] == b"a: 1\n" and found["SOUL.md"][1] == hermes_boot.BUILT_IN["SOUL.md"].encode()
    assert json.loads(found["gateway_state.json"][1]) == {"desired_state": "running"}


ADVICE = {  # who owns the volume, why it cannot be used; what helps a hermes that is 1000:1000
    "somebody's": (
        (70, 70),
        errno.EACCES,
        "start with HERMES_UID=70 HERMES_GID=70, or chown -R 1000:1000 it on the host",
    ),
    "root's": ((0, 0), errno.EACCES, "chown -R 1000:1000 it on the host"),
    "its own": (
        (1000, 1000),
        errno.EACCES,
        "the host refuses it: with SELinux mount it with `:Z`, else look at its ACLs",
    ),
    "read-only": ((1000, 1000), errno.EROFS, "mount it writable"),
}


@rows(ADVICE)
def test_what_helps_on_a_volume(case, tmp_path):
    """Nothing that has been tried already."""
    owner, number, advice = case
    boot = hermes_boot.Boot({"HERMES_HOME": str(tmp_path)})
    boot.owner, boot.by_root = (1000, 1000), True
    assert hermes_boot.home_advice(boot, owner, OSError(number, "")) == advice


def test_a_list_of_profiles_keeps_no_states(tmp_path):
    """JSON takes many times its file's size, and there may be thousands."""
    for name in ("a", "b"):
        (tmp_path / "profiles" / name).mkdir(parents=True)
        (tmp_path / "profiles" / name / "SOUL.md").touch()
        (tmp_path / "profiles" / name / "gateway_state.json").write_text(json.dumps({"desired_state": "r" * 9000}))
    boot = hermes_boot.Boot({"HERMES_HOME": str(tmp_path)})
    with hermes_boot.Folder(str(tmp_path)) as home:
        found = hermes_boot.list_profiles(boot, home, None)
        (tmp_path / "profiles/a/gateway_state.json").write_text(" " * (64 << 10) + "{}")
        (big,) = [profile for profile in hermes_boot.list_profiles(boot, home, None) if profile.name == "a"]
    assert [(profile.name, profile.state, len(profile.prior_state or "")) for profile in found] == [
        ("default", {}, 0),
        ("a", {}, 1000),
        ("b", {}, 1000),
    ]
    assert big.fault and "is longer than 65536 bytes" in big.fault.text


def test_a_command_lines_length_is_bounded():
    """A process can make its own as long as it likes; a block more is read."""
    with open("/proc/self/cmdline", "rb") as file:
        whole = file.read()
    assert hermes_boot.content("/proc/self/cmdline") == whole
    assert len(hermes_boot.content("/dev/zero", 100_000)) == 131072


def test_a_time_limit_within_another():
    """It holds no longer than the outer one, which goes on from where it was."""
    started = time.monotonic()
    with pytest.raises(TimeoutError), hermes_boot.TimeLimit(0.1), hermes_boot.TimeLimit(60):
        time.sleep(5)
    with pytest.raises(TimeoutError), hermes_boot.TimeLimit(0.1):
        with hermes_boot.TimeLimit(60):
            time.sleep(0.05)
        time.sleep(5)
    with hermes_boot.TimeLimit(0.05), hermes_boot.TimeLimit(60):
        pass
    assert time.monotonic() - started < 1
    time.sleep(0.1)  # nothing is left of them


def test_a_time_limit_that_somebody_takes_for_another_error():
    """It comes again: TimeoutError is an OSError."""
    started = time.monotonic()
    with pytest.raises(TimeoutError), hermes_boot.TimeLimit(60), hermes_boot.TimeLimit(0.1):
        with suppress(OSError):
            time.sleep(5)
        time.sleep(20)
    assert time.monotonic() - started < 3


SLOW_TO_END = """
import sys, time, hermes_boot
def slowly(frame, *_):
    if frame.f_code.co_name == "__exit__":
        time.sleep(0.02)
        return slowly
for number in range(20, 0, -1):
    try:
        with hermes_boot.TimeLimit(number / 100):
            sys.settrace(slowly)
    except TimeoutError:
        pass
    sys.settrace(None)
"""


def test_a_time_limit_that_is_over_while_it_ends_costs_nobody_the_process():
    """SIGALRM's own way would be to end that."""
    here = Path(hermes_boot.__file__).parent
    assert subprocess.run([sys.executable, "-BSc", SLOW_TO_END], cwd=here).returncode == 0
