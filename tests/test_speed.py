"""Fast for the operator: what is not needed is not read, what must be on disk is, and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RUN, busy
from sandbox import wait_for

import hermes_boot

# Runs a command of the manager and prints what it does to files, in order: the real calls, only noted.
NOTED = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import hermes_boot
write = os.write
def note(event):
    write(2, f"{event}\\n".encode())
def noted(name, told):
    real = getattr(os, name)
    def call(*arguments, **options):
        if event := told(arguments):
            note(event)
        return real(*arguments, **options)
    setattr(os, name, call)
path = lambda fd: os.readlink(f"/proc/self/fd/{fd}")
noted("fsync", lambda arguments: "sync " + path(arguments[0]))
noted("rename", lambda arguments: "rename " + arguments[1])
noted("write", lambda arguments: "tell " + path(arguments[0]) if arguments[1] in (b"D", b"U") else "")
hermes_boot.print = lambda text, **_: note("say " + str(text))
sys.exit(hermes_boot.main(["hermes-boot", *sys.argv[1:]]))
"""


def noted(host, *words: str) -> list[str]:
    """Return what a command of the manager does to files."""
    done = host.box.exec("/usr/bin/python3", "-IBSc", NOTED, "/opt/hermes/docker", *words)
    assert done.returncode == 0, done.stderr
    return [event for event in done.stderr.splitlines() if event.split()[0] in ("sync", "rename", "tell", "say")]


@pytest.mark.sandbox
def test_s6_is_told_before_anything_is_synced_and_the_intent_is_on_disk_before_the_command_says_so(gateways):
    """The marker first, not synced, for only this boot needs it; s6 at once after it; then the state, file and folder;
    then our word. What says so already is not written again."""
    host = gateways({"a": RUN}, "running")
    events = noted(host, "gateway", "stop", "-p", "a")
    folder = "/opt/data/profiles/a"
    assert events[:2] == ["rename .gateway-planned-stop.json", "tell /run/service/gateway-a/supervise/control"]
    assert [event.partition(f" {folder}/.gateway_state.json.")[0] for event in events[2:]] == [
        "sync",
        "rename gateway_state.json",
        f"sync {folder}",
        "say a: stopped",
    ]
    assert host.state("a") == {"desired_state": "stopped", "kept": [1, {"a": None}]}
    assert [event.split()[0] for event in noted(host, "gateway", "stop", "-p", "a")] == ["tell", "say"]


@pytest.mark.sandbox
def test_every_gateways_marker_is_followed_by_its_signal(gateways):
    """With --all too: a gateway that sees its marker ends by itself within 0.5 s, and s6 must not start it anew."""
    names = [f"p{number}" for number in range(20)]
    host = gateways(dict.fromkeys(names, RUN), "running")
    assert wait_for(lambda: all(map(host.up, ["default", *names])))  # one that is not up gets no marker
    events = noted(host, "gateway", "stop", "--all")
    told = [event for event in events if not event.startswith(("sync", "say", "rename gateway_state"))]
    assert len(told) == 42 and {event.split()[0] for event in told[::2]} == {"rename"}
    assert {event.split()[0] for event in told[1::2]} == {"tell"}
    assert events.index(told[-1]) < min(index for index, event in enumerate(events) if event.startswith("sync"))
    synced = {event for event in events if event.startswith("sync") and "/." not in event}
    assert synced == {f"sync {path}" for path in ("/opt/data", *(f"/opt/data/profiles/{name}" for name in names))}


def test_what_many_files_raise_is_raised(tmp_path):
    """An unexpected error of one of many does not pass for success."""
    manager = hermes_boot.S6ServiceManager(str(tmp_path), str(tmp_path), environment={})
    manager.record = lambda name, desired: 1 // (name != "c")
    with pytest.raises(ZeroDivisionError):
        manager.record_all(list("abcdefgh"), "stopped")


FINISHES = {
    "few deaths": ("1", 4, "", 0),
    "the container's end": ("1", 5, "ending", 0),
    "no tally": ("1", None, "", 0),
    "many deaths": ("1", 5, "", 42),
    "parked": ("78", 0, "", 42),
    "some of its group are left": ("0", 1, "group", 42),
}


@pytest.mark.parametrize("case", FINISHES)
def test_finish_starts_python_only_where_there_is_something_to_do(tmp_path, monkeypatch, case):
    """The script itself, with a program in hermes-boot's place that ends with 42."""
    code, deaths, more, expected = FINISHES[case]
    program = tmp_path / "hermes-boot"
    program.write_text("#!/bin/sh\nexit 42\n")
    program.chmod(0o755)
    monkeypatch.setattr(hermes_boot, "BOOT", str(program))
    monkeypatch.setattr(hermes_boot, "dropping", lambda command: [f"exec {command}"])
    slot = tmp_path / "gateway-a"
    for folder in (slot / "supervise", tmp_path / ".s6-svscan"):
        folder.mkdir(parents=True)
    if more == "ending":
        (tmp_path / hermes_boot.ENDING).touch()
    if deaths is not None:
        (slot / "supervise/death_tally").write_bytes(bytes(14 * deaths))
    process = subprocess.Popen(["sleep", "60"], process_group=0)
    try:
        argv = ["sh", "-c", hermes_boot.finish_script("a"), "finish", code, "0", "gateway-a"]
        done = subprocess.run([*argv, str(process.pid) if more == "group" else "4194000"], cwd=slot)
    finally:
        process.kill()
        process.wait()
    assert done.returncode == expected


def opened(plain, *words: str) -> list[str]:
    """Return what a command opens below the volume and the scandir, by name."""
    code = (
        "import os, sys\nsys.path.insert(0, sys.argv.pop(1))\nimport hermes_boot\nnames = []\n"
        "kinds = 'open', 'os.listdir', 'os.scandir'\n"
        "sys.addaudithook(lambda kind, values: kind in kinds and names.append(str(values[0])))\n"
        "hermes_boot.main(['hermes-boot', *sys.argv[1:]])\nprint(*names, sep='\\n', file=sys.stderr)\n"
    )
    environment = {"HERMES_HOME": str(plain.home), "S6_PROFILE_GATEWAY_SCANDIR": str(plain.scandir)}
    argv = [sys.executable, "-IBSc", code, str(Path(hermes_boot.__file__).parent), *words]
    done = subprocess.run(argv, env=environment | {"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    return done.stderr.splitlines()


def test_status_reads_no_more_than_it_shows(plain):
    """Of one profile where one is asked for; of all, no configuration but the root's."""
    for name in ("one", "other"):
        folder = plain.profile(name, '{"desired_state": "running"}')
        (folder / "config.yaml").write_text("x: y\n")
    plain.reconcile()
    plain.profile("bare", "{}")
    for words in (["status", "-p", "one"], ["gateway", "status", "-p", "one"], ["status", "-p", "one", "--json"]):
        names = opened(plain, *words)
        assert any("one" in name for name in names) and not any("other" in name or "bare" in name for name in names)
    names = opened(plain, "status")
    assert {"one", "other", "bare", "gateway_state.json"} <= {os.path.basename(name) for name in names}
    assert names.count("config.yaml") <= 1 and ".env" not in names  # the root's, for multiplexing


@pytest.fixture
def logs(plain) -> Path:
    """A log of 11 archives and current, ended by a line that s6-log has only begun; lines of all lengths."""
    plain.profile("a")
    plain.reconcile()
    folder = plain.home / "logs/gateways/a"
    for number in range(12):
        name = "current" if number == 11 else f"@4000000000{number:014}.s"
        lines = [f"2026-05-21 06:{number:02}:{line:02}.0  {'x' * (line * number * 19)}\n" for line in range(40)]
        (folder / name).write_text("".join(lines if number != 5 else []) + ("begun" if number == 11 else ""))
    return folder


@pytest.mark.parametrize("count", [1, 2, 39, 40, 41, 200, 439, 440, 441, 10**9])
def test_the_last_lines_are_the_same_from_the_end_on(plain, logs, count):
    """Over archives, blocks and an empty file, as from the beginning on."""
    text = "".join(path.read_text() for path in sorted(logs.iterdir()) if path.name.startswith(("@", "current")))
    whole = text.splitlines(keepends=True)[:-1]
    shown = plain.reconcile(command=["logs", "-p", "a", "-n", str(count)])
    assert shown.returncode == 0 and shown.stdout == "".join(whole[-count:])


def test_the_end_of_a_huge_log_is_not_read_from_its_beginning(plain):
    """64 GiB, sparse: no line in them, so one of the longest that we take, and the last one."""
    plain.reconcile()
    file = plain.home / "logs/gateways/default/current"
    with open(file, "wb") as log:
        log.truncate(64 << 30)
        log.seek(0, os.SEEK_END)
        log.write(b"\n2026-05-21 06:18:05.0  last\n")
    started = time.monotonic()
    assert plain.reconcile(command=["logs", "-n", "1"]).stdout == "2026-05-21 06:18:05.0  last\n"
    done = plain.reconcile(command=["logs", "-n", "2", "--since", "2026-05-21"])
    assert done.stdout == "2026-05-21 06:18:05.0  last\n"
    assert time.monotonic() - started < 5 * busy()


def test_follow_goes_on_where_the_last_lines_end(plain, logs):
    """-n N -f: N lines, then what comes."""
    argv = [sys.executable, "-IBS", hermes_boot.__file__, "logs", "-p", "a", "-n", "1", "-f"]
    environment = {"HERMES_HOME": str(plain.home), "S6_PROFILE_GATEWAY_SCANDIR": str(plain.scandir)}
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("2026-05-21 06:11:39.0  x")
        with open(logs / "current", "a") as log:
            log.write(" and done\n")
        assert process.stdout.readline() == "begun and done\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_follow_reads_a_file_to_its_end_that_is_gone_by_then(logs):
    """s6-log may rotate more often than one looks, and it removes the oldest."""
    with hermes_boot.Folder(str(logs)) as folder:
        lines = hermes_boot.log_lines(folder, count=None, follow=True)
        while next(lines) is not None:
            pass
        with open(logs / "current", "a") as log:
            log.write(" and done\n")
        for path in (*logs.glob("@*"), logs / "current"):
            path.unlink()
        (logs / "current").write_text("next\n")
        assert [next(lines), next(lines), next(lines)] == [b"begun and done\n", b"next\n", None]


def test_states_of_platforms_that_are_none(plain):
    """Whatever the agent has written there, status goes on."""
    for platforms in ([], 3, "x", {"a": None, "b": {"state": 4}}):
        plain.profile("a", json.dumps({"platforms": platforms, "pid": 1}))
        done = plain.reconcile(command=["status", "-p", "a", "--json"])
        assert done.returncode == 0 and json.loads(done.stdout)[0]["platforms"] is None
