"""Which gateways get a slot, and which of them start. Files alone: needs no s6 and no root."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

import hermes_boot

STATES = {
    "running": ('{"gateway_state": "running"}', "running", True),
    "stopped": ('{"gateway_state": "stopped"}', "stopped", False),
    "starting": ('{"gateway_state": "starting"}', "starting", False),
    "startup_failed": ('{"gateway_state": "startup_failed"}', "startup_failed", False),
    "draining": ('{"gateway_state": "draining"}', "running", True),
    "degraded": ('{"gateway_state": "degraded"}', "running", True),
    "unknown": ('{"gateway_state": "singing loudly"}', "'singing loudly'", False),
    "intent over state": ('{"gateway_state": "running", "desired_state": "stopped"}', "stopped", False),
    "intent over state, the other way": ('{"gateway_state": "stopped", "desired_state": "running"}', "running", True),
    "an intent is taken literally": ('{"desired_state": "draining", "gateway_state": "running"}', "draining", False),
    "no intent": ('{"desired_state": null, "gateway_state": "running"}', "running", True),
    "no file": (None, "none", False),
    "empty object": ("{}", "none", False),
    "with a byte order mark": (b'\xef\xbb\xbf{"desired_state": "running"}', "running", True),
}


@pytest.mark.parametrize("content, prior, starts", STATES.values(), ids=STATES)
def test_only_running_starts(plain, content, prior, starts):
    """The state file decides, for the root profile as for the others."""
    for name in ("default", "coder"):
        plain.profile(name, content)
    done = plain.reconcile()
    assert done.returncode == 0 and plain.slots() == {"coder": starts, "default": starts}
    for name in ("default", "coder"):
        line = f"profile={name} prior_state={prior} action={'started' if starts else 'registered'}"
        assert re.search(rf" {line}( prior_exit=\w+)?\n", done.stderr)


UNREADABLE = [b"[]", b"7", b'"running"', b"null", b"", b'{"desired_state": "run', b"\xff\xfe{}", b"[" * 200_000]
UNREADABLE += [b'{"desired_state": %s}' % value for value in (b"{}", b"[]", b"1", b"true")]


def test_an_unreadable_state_is_registered_down_with_its_reason(plain):
    """And the others, between them, are not touched by it."""
    unreadable = {f"m{number:02}": content for number, content in enumerate(UNREADABLE)}
    readable = {f"m{number:02}-next": '{"desired_state": "running"}' for number in range(len(UNREADABLE))}
    for name, state in (unreadable | readable).items():
        plain.profile(name, state)
    done = plain.reconcile()
    assert done.returncode == 0
    assert plain.slots() == {"default": False} | dict.fromkeys(unreadable, False) | dict.fromkeys(readable, True)
    for name, content in unreadable.items():
        line = rf'profile={name} prior_state=none action=registered reason="gateway_state.json .*; .*"'
        assert re.search(line, done.stderr), content[:30]


SKIPPED = {
    "Coder": "a profile's name has only",
    "my profile": "a profile's name has only",
    "-rf": "a profile's name has only",
    "_x": "a profile's name has only",
    "a\nb": "a profile's name has only",
    "\udcff": "a profile's name has only",
    "x" * 244: "the name is longer than 243 characters",
    "default": "the name is reserved for the root profile",
}


def test_folders_that_are_no_profiles_are_skipped_with_their_reasons(plain):
    """One line each, escaped, and the profiles around them have their gateways."""
    for name in SKIPPED:
        folder = plain.home / "profiles" / name
        folder.mkdir(parents=True)
        (folder / "SOUL.md").touch()
    for name in ("ape", "monkey", "zebra"):
        plain.profile(name, '{"desired_state": "running"}')
    done = plain.reconcile()
    assert done.returncode == 0 and plain.slots() == {"ape": True, "default": False, "monkey": True, "zebra": True}
    lines = [line for line in done.stderr.splitlines() if "action=skipped" in line]
    assert len(lines) == len(SKIPPED)
    for name, why in SKIPPED.items():
        (line,) = [line for line in lines if f" profile={hermes_boot.shown(name)} " in line]
        assert f'reason="{why}' in line


def test_a_folder_without_soul_is_skipped_on_purpose(plain):
    """So is nothing else: a plain file in profiles/ is nobody's."""
    plain.profile("backup", '{"desired_state": "running"}', soul=False)
    (plain.home / "profiles/notes.txt").touch()
    done = plain.reconcile()
    assert plain.slots() == {"default": False}
    assert 'profile=backup prior_state=none action=skipped reason="no SOUL.md, so not a profile"' in done.stderr
    assert "notes" not in done.stderr


def test_the_longest_name_has_a_slot(plain):
    """gateway-<name> has at most 251 bytes."""
    plain.profile("x" * 243)
    plain.reconcile()
    assert "x" * 243 in plain.slots()


def test_multiplexing_registers_named_slots_down(plain):
    """The default gateway then serves every profile."""
    for name in ("default", "coder"):
        plain.profile(name, '{"desired_state": "running"}')
    done = plain.reconcile(GATEWAY_MULTIPLEX_PROFILES="Yes")
    assert plain.slots() == {"coder": False, "default": True}
    assert "profile=coder prior_state=running action=registered reason=" in done.stderr


def test_stale_files_go_before_the_slot_comes(plain):
    """A dead container's pid is another process's in this one."""
    for name in ("default", "coder"):
        for file in ("gateway.pid", "processes.json"):
            (plain.profile(name) / file).write_text("1")
    plain.reconcile()
    assert not [path for path in plain.home.rglob("*") if path.name in ("gateway.pid", "processes.json")]


def test_the_log_has_one_line_each_in_order_and_rotates(plain):
    """default first, then by name; over 256 KiB the file becomes .1."""
    for name in ("b", "a", "10", "9"):
        plain.profile(name)
    log = plain.home / "logs/container-boot.log"
    done = plain.reconcile()
    lines = log.read_text().splitlines()
    assert [re.search(r"profile=(\S+)", line)[1] for line in lines] == ["default", "10", "9", "a", "b"]
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} profile=[a-z0-9]+ prior_state=none action=registered"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert log.read_text() in done.stderr
    log.write_text("x" * (256 << 10))
    plain.reconcile()
    assert (plain.home / "logs/container-boot.log.1").read_text() == "x" * (256 << 10)
    assert len(log.read_text().splitlines()) == 5


def test_reconcile_can_be_switched_off(plain):
    """For a sidecar that serves an API alone."""
    done = plain.reconcile(HERMES_RECONCILE="0")
    assert done.returncode == 0 and not plain.scandir.exists()


def tree(path: Path) -> dict[str, tuple]:
    """Return what a folder holds: kind and mode, content, inode."""
    return {
        str(entry.relative_to(path)): (
            stat.filemode(entry.lstat().st_mode),
            entry.read_bytes() if entry.is_file() else b"",
            entry.lstat().st_ino,
        )
        for entry in sorted(path.rglob("*"))
    }


def test_a_second_run_changes_nothing(plain):
    """Slots that are there keep their folder and files."""
    plain.profile("coder", '{"desired_state": "running"}')
    plain.reconcile()
    before = tree(plain.scandir)
    plain.reconcile()
    assert tree(plain.scandir) == before


def test_a_second_run_brings_slots_up_to_date(plain):
    """A changed state moves the `down` file; a changed run, a file or a leftover in a slot's place is replaced."""
    folder = plain.profile("coder", '{"desired_state": "running"}')
    plain.reconcile()
    (folder / "gateway_state.json").write_text('{"desired_state": "stopped"}')
    (plain.scandir / "gateway-coder/run").write_text("old")
    (plain.scandir / ".gateway-ops.tmp").mkdir()
    (plain.scandir / ".gateway-ops.tmp/run").write_text("half")
    (plain.scandir / "gateway-ops").write_text("a file")
    plain.profile("ops", '{"desired_state": "running"}')
    plain.reconcile()
    assert plain.slots() == {"coder": False, "default": False, "ops": True}
    assert (plain.scandir / "gateway-coder/run").read_text() == hermes_boot.run_script("coder")
    assert os.access(plain.scandir / "gateway-coder/run", os.X_OK)
    assert not [path for path in plain.scandir.iterdir() if path.name.startswith(".")]


def test_a_slot_is_what_s6_and_hermes_agent_expect(plain):
    """Names, modes and kinds of everything in it."""
    plain.profile("coder")
    plain.reconcile()
    slot = plain.scandir / "gateway-coder"
    skeleton = {
        "event": "drwx-ws--T",
        "supervise": "drwxr-xr-x",
        "supervise/event": "drwx-ws--T",
        "supervise/control": "prw-rw----",
    }
    expected = (
        skeleton
        | {f"log/{name}": mode for name, mode in skeleton.items()}
        | {"log": "drwxr-xr-x", "back-off": "prw-------"}
    )
    expected |= dict.fromkeys(("type", "down", "timeout-kill", "timeout-finish"), "-rw-r--r--")
    expected |= dict.fromkeys(("run", "finish", "log/run"), "-rwxr-xr-x")
    assert {name: entry[0] for name, entry in tree(slot).items()} == expected
    assert (slot / "type").read_text() == "longrun\n" and (slot / "timeout-kill").read_text() == "30000\n"
    assert (slot / "run").read_text().splitlines()[
        -1
    ] == "exec s6-setuidgid hermes hermes -p coder gateway run --replace"
    assert (plain.scandir / "gateway-default/run").read_text().splitlines()[
        -1
    ] == "exec s6-setuidgid hermes hermes gateway run --replace"


@pytest.mark.parametrize(
    "home", ["/plain", "/with space", "/it's", '/"quoted"', "/$(touch pwned)`id`", "/line\nbreak", "/-x;y"]
)
def test_scripts_take_names_and_values_only_as_data(tmp_path, home):
    """run passes sh's own check, and whatever HERMES_HOME or extra_env hold arrives as it is."""
    folder = Path(str(tmp_path) + home)
    (folder / "profiles/coder").mkdir(parents=True)
    value = home + "\\ \t'\"$x`y`!*?"
    script = hermes_boot.run_script("coder", {"EXTRA": value}).split("\n", 1)[1]
    script = (
        re.sub(r"^(\[ \"\$\(id|exec s6).*$", "", script, flags=re.M)
        + 'printf "%s\\0" "$HOME" "$HERMES_HOME" "$EXTRA" "$PWD" "$API_SERVER_PORT"'
    )
    environment = {"PATH": os.environ["PATH"], "HERMES_HOME": str(folder), "API_SERVER_PORT": "8642"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == "" and done.stdout.split("\0")[:-1] == [str(folder), str(folder), value, str(folder), ""]
    assert not list(tmp_path.rglob("pwned"))


USAGE_ERRORS = [
    ["gateways"],
    ["setup", "reconcile"],
    ["--dry"],
    ["status", "-p", "--json"],
    ["gateway", "stop", "-p", "-x"],
]


@pytest.mark.parametrize("arguments", USAGE_ERRORS, ids=" ".join)
def test_wrong_usage_is_code_2(plain, arguments):
    """With the word that is wrong, and the usage."""
    done = plain.reconcile(command=arguments)
    assert (
        done.returncode == 2
        and "error: " in done.stderr
        and "usage: hermes_boot.py" in done.stderr
        and not plain.scandir.exists()
    )


@pytest.mark.parametrize(
    "home", ["relative/path", "/", "/etc/", "/run", "//", "/tmp/..", "/opt", "/usr", "/root", "/var"]
)
def test_a_home_that_is_none_is_refused(plain, home):
    """Handing / to hermes would be the end of the image."""
    done = plain.reconcile(HERMES_HOME=home)
    assert done.returncode == 1 and f"HERMES_HOME={home!r} is no folder of its own" in done.stderr


def test_a_missing_home_is_said(plain):
    """Without the setup before it there may be none."""
    done = plain.reconcile(HERMES_HOME="/no/such/home")
    assert (
        done.returncode == 1
        and "HERMES_HOME='/no/such/home' does not exist" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_dry_run_publishes_nothing(plain):
    """It lists what it would."""
    plain.profile("coder", json.dumps({"desired_state": "running"}))
    done = plain.reconcile("--dry-run")
    assert done.stdout.splitlines() == [
        "would publish: profile=default prior_state=none action=registered",
        "would publish: profile=coder prior_state=running action=started",
    ]
    assert not plain.scandir.exists() and not (plain.home / "logs").exists()
