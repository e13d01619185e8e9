"""A container in place leaves the root as it was, whatever ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import in_place
import pytest
from sandbox import PROJECT, Sandbox, maker, start_time, wait_for

NOT_HERE = maker()[0] is Sandbox or maker()[1]


def tree(root: Path) -> dict[str, str]:
    """Return what is below a folder: each path, and what a file holds."""
    found = [path for path in root.rglob("*") if "state" not in path.relative_to(root).parts]
    return {str(path): path.read_text() if path.is_file() else "" for path in found}


def write(root: Path, **files: str) -> None:
    """Write files; a double underscore is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_whatever_ends_it_is_undone(monkeypatch, tmp_path):
    """Ended at any step, on the way in or on the way back, and the undoing ended too: the next one finds the rest."""
    root, layer = tmp_path / "root", tmp_path / "layer"
    write(root, etc__passwd="theirs", etc__deep__file="theirs", run__lock="theirs", bin="theirs")
    write(layer, etc__passwd="ours", etc__deep__other="ours", init="ours", bin="ours", opt__a__b="ours")
    for name in ("STATE", "JOURNAL", "AWAY"):
        monkeypatch.setattr(in_place, name, tmp_path / "state" / name.lower().replace("state", ""))
    before, rename, left = tree(tmp_path), os.rename, [0]

    def move(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(in_place, "move", move)
    ended = 0
    for steps in range(20):
        in_place.AWAY.mkdir(parents=True, exist_ok=True)
        for left[0] in (steps, steps // 2, 100):
            try:
                if left[0] == steps:
                    in_place.put(str(layer), str(root))
                in_place.undo()
            except KeyboardInterrupt:
                ended += 1
        assert tree(tmp_path) == before and not in_place.STATE.exists(), steps
    assert ended > 10


def test_an_undoing_that_fails_locks_nobody_out(monkeypatch):
    """The next one is told what is wrong, and not that another container runs."""

    def fail() -> None:
        raise OSError("no undoing")

    monkeypatch.setattr(in_place, "undo", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no undoing"), in_place.alone():
            pass


def of_the_root() -> list[tuple]:
    """Return path, owner, mode and inode of what lies where a container is put."""
    folders = (*in_place.KEPT, *in_place.FORGOTTEN, "/usr/bin", "/opt", "/etc/apt")
    entries = [entry for folder in folders for entry in os.scandir(folder) if entry.name != in_place.STATE.name]
    stats = [(entry.path, entry.stat(follow_symlinks=False)) for entry in entries]
    return sorted((path, found.st_uid, found.st_gid, found.st_mode, found.st_ino) for path, found in stats)


@pytest.mark.skipif(bool(NOT_HERE), reason="shows what a container in place leaves")
def test_a_killed_run_is_undone_by_the_next(gateways, container):
    """SIGKILL in the middle: its processes, its files and the accounts are there still; the next run begins by
    ending and undoing them."""
    before = of_the_root()
    host = gateways({"a": "exec sleep infinity\n"}, "running")
    assert wait_for(lambda: host.up("a"))
    gateway = (host.pid("a"), start_time(host.pid("a")))
    Path("/tmp/of-the-test").touch()
    host.box.process.kill()
    host.box.process.wait()
    assert os.path.exists("/init") and in_place.running(*gateway)
    assert container().run("echo", "next").stdout == b"next\n"
    assert not in_place.running(*gateway) and of_the_root() == before


@pytest.mark.skipif(bool(NOT_HERE), reason="shows what a container in place leaves")
def test_a_container_that_takes_long_to_be_undone_is_undone(container, monkeypatch):
    """What undoes it is no process of the container's, which the end of a test would kill."""
    before, box = of_the_root(), container()
    (box.folder / "rm").write_text('#!/bin/sh\nsleep 3\nexec /bin/rm "$@"\n')
    (box.folder / "rm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{box.folder}:{os.environ['PATH']}")
    box.start("sleep", "infinity")
    box.exec("chmod", "1777", "/run", "/opt")
    box.remove()
    assert box.init() == 0 and of_the_root() == before and not in_place.JOURNAL.exists()


@pytest.mark.skipif(bool(NOT_HERE), reason="shows a container in place")
def test_a_second_one_at_once_is_refused_in_one_line(container):
    """On the command line; the first one goes on."""
    box = container(agent=True)  # else the second one would begin by fetching that
    box.start("sleep", "infinity")
    argv = [sys.executable, PROJECT / "tests/sandbox.py", "run", "true"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and box.init()
    assert done.stderr == "sandbox: another container runs; in place, there is room for one at a time\n"
