"""What on the volume is handed to hermes, and what is left alone."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hermes_boot import MANAGED_FILES, MANAGED_FOLDERS, MANAGED_TOPS

HERMES = (10000, 10000)


def owner(path: Path) -> tuple[int, int]:
    """Return a path's own owner, a link's too."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


@pytest.fixture
def volume(tmp_path) -> Path:
    """A volume that root has written on: in every managed folder a file, a folder, a link and a FIFO."""
    home = tmp_path / "volume"
    for folder in {*MANAGED_FOLDERS, *MANAGED_TOPS}:
        (home / folder / "deep/er").mkdir(parents=True)
        (home / folder / "deep/er/file").write_text("x")
        (home / folder / "link").symlink_to("/etc/passwd")
        os.mkfifo(home / folder / "fifo")
    for name in [*MANAGED_FILES, "state.db", "state.db-wal", "response_store.db-shm"]:
        (home / name).write_text("{}")
    return home


def test_what_root_wrote_comes_back(container, volume):
    """Every entry of every managed folder, at every boot, and the count is reported."""
    box = container()
    for more in (len(MANAGED_FILES) + 3 + len(["the volume itself"]), 0):
        entries = [path for folder in MANAGED_TOPS for path in [volume / folder, *(volume / folder).rglob("*")]]
        for path in entries:
            os.chown(path, 0, 0, follow_symlinks=False)
        done = box.run("true")
        assert done.returncode == 0
        assert {owner(path) for path in entries} == {HERMES}
        assert {owner(path) for path in volume.iterdir()} == {HERMES} and owner(volume) == HERMES
        assert f"give {len(set(entries)) + more} of " in done.stderr.decode()
    assert "give " not in box.run("true").stderr.decode()
    assert owner(Path("/etc/passwd")) == (0, 0)


def test_owner_and_group_count_in_every_folder_by_itself(container, volume):
    """That the folder is right says nothing of what is in it, and a wrong group alone is wrong."""
    box = container()
    box.run("true")
    os.chown(volume / "skills/deep/er/file", 10000, 0)
    os.chown(volume / "cron/deep", 0, 10000)
    assert "give 2 of " in box.run("true").stderr.decode()
    assert owner(volume / "skills/deep/er/file") == owner(volume / "cron/deep") == HERMES


def test_the_users_own_files_keep_their_owner(container, volume):
    """What hermes does not manage is never touched, at any depth."""
    (volume / "photos/deep").mkdir(parents=True)
    (volume / "photos/deep/a.jpg").write_text("x")
    (volume / "notes.txt").write_text("x")
    mine = [volume / "photos", volume / "photos/deep", volume / "photos/deep/a.jpg", volume / "notes.txt"]
    for path in mine:
        os.chown(path, 1000, 1001)
    before = [path.stat().st_ctime_ns for path in mine]
    assert container().run("true").returncode == 0
    assert {owner(path) for path in mine} == {(1000, 1001)}
    assert [path.stat().st_ctime_ns for path in mine] == before


def test_right_entries_are_not_touched_and_modes_stay(container, volume):
    """Only what is wrong changes: a right entry keeps its ctime, a wrong one its mode."""
    box = container()
    box.run("true")
    right, wrong = volume / "skills/deep/er/file", volume / "logs/deep/er/file"
    wrong.chmod(0o604)
    os.chown(wrong, 0, 0)
    before = right.stat().st_ctime_ns
    box.run("true")
    assert right.stat().st_ctime_ns == before
    assert owner(wrong) == HERMES and stat.S_IMODE(wrong.stat().st_mode) == 0o604


def test_hermes_can_read_and_write_its_top_level_files(container, volume):
    """A config.yaml of mode 0400 or 0040 would stop it; the other bits stay."""
    (volume / "config.yaml").chmod(0o040)
    (volume / "auth.json").chmod(0o400)
    container().run("true")
    assert stat.S_IMODE((volume / "config.yaml").stat().st_mode) == 0o640
    assert stat.S_IMODE((volume / "auth.json").stat().st_mode) == 0o600


def test_a_setuid_bit_does_not_survive_the_gift(container, volume):
    """A root-owned setuid program would become hermes's with the bit."""
    program = volume / "workspace/deep/tool"
    program.write_text("x")
    program.chmod(0o6755)
    container().run("true")
    assert owner(program) == HERMES and stat.S_IMODE(program.stat().st_mode) == 0o755


def test_hard_links_and_devices_stay_roots(container, volume, tmp_path):
    """A second name may lie outside the volume; a device node is not a file. Both are said or skipped, never given
    away."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    os.link(outside, volume / "workspace/deep/linked")
    os.mknod(volume / "workspace/deep/null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    done = container().run("true")
    assert owner(outside) == owner(volume / "workspace/deep/null") == (0, 0)
    assert "1 files on /opt/data have hard links and another owner" in done.stderr.decode()


def test_hard_links_of_hermes_follow_a_remap(container, volume):
    """pnpm and uv fill a home with hard links: those that were hermes's are hermes's again."""
    first = volume / "home/deep/er/file"
    os.link(first, volume / "home/deep/second")
    for path in (volume, first):
        os.chown(path, *HERMES)
    container(environment={"HERMES_UID": "1500"}).run("true")
    assert owner(first) == owner(volume / "home/deep/second") == (1500, 10000)


def test_mounts_below_are_not_crossed(container, volume, tmp_path):
    """A host folder mounted into the workspace is the host user's, even when it is on the same disk."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "src/main.c").write_text("x")
    container(mounts=((str(project), "/opt/data/workspace/project"),)).run("true")
    assert owner(project) == owner(project / "src") == owner(project / "src/main.c") == (0, 0)


def test_a_file_that_is_mounted_by_itself_is_hermess(container, volume, tmp_path):
    """-v ./config.yaml:/opt/data/config.yaml: who mounts a file that hermes keeps wants it to be read."""
    (tmp_path / "config.yaml").touch(0o600)
    container(mounts=((str(tmp_path / "config.yaml"), "/opt/data/config.yaml"),)).run("true")
    assert owner(tmp_path / "config.yaml") == HERMES


def test_a_link_in_a_managed_folders_place_is_left_alone(container, volume, tmp_path):
    """Root follows no link from the volume."""
    target = tmp_path / "target"
    (target / "sub").mkdir(parents=True)
    (volume / "skins").rename(volume / "old-skins")
    (volume / "skins").symlink_to(target)
    done = container(mounts=((str(target), str(target)),)).run("true")
    assert owner(target) == owner(target / "sub") == (0, 0)
    said = "skins on the volume is a link, or not of the kind it should be; put a plain folder there"
    assert done.returncode == 0 and done.stderr.decode().count(said) == 1


def test_another_home_with_missing_parents(container):
    """HERMES_HOME may be any path."""
    box = container(environment={"HERMES_HOME": "/srv/a b/hermes"})
    done = box.run("sh", "-c", 'echo "$HOME"; stat -c %u "$HOME" "$HOME/config.yaml" "$HOME/profiles"')
    assert done.stdout.decode().split("\n")[:4] == ["/srv/a b/hermes", "10000", "10000", "10000"]


def test_a_deep_folder_needs_no_descriptors_or_recursion(container, volume):
    """10,000 levels, under a limit of 64 open files: hermes gets as many as a path can reach, and one line says so."""
    script = "import os\nfor _ in range(10000):\n os.mkdir('d'); os.chdir('d')\nopen('leaf', 'w')"
    subprocess.run([sys.executable, "-IS", "-c", script], cwd=volume / "workspace", check=True)
    try:
        boot = ["prlimit", "--nofile=64", "/opt/hermes/docker/hermes_boot.py", "setup"]
        box = container()
        box.start("sleep", "infinity")
        subprocess.run(["chown", "-Rh", "0:0", volume / "workspace/d"], check=True)
        done = box.exec(*boot)
        assert done.returncode == 0 and re.search("give 20[01][0-9] of ", done.stderr), done.stderr
        assert done.stderr.count("1 folders on /opt/data are over 2000 levels down and were left alone") == 1
        assert "give " not in box.exec(*boot).stderr
    finally:
        subprocess.run(["rm", "-rf", volume / "workspace/d"], check=True)


def test_a_folder_of_roots_that_the_agent_has_moved_is_no_way_home(container, volume):
    """A link in it is root's, but where it lies is not root's choice."""
    os.chown(volume, *HERMES)
    (volume / "agent").mkdir()
    (volume / "agent/home").symlink_to("/usr/lib")
    box = container(environment={"HERMES_HOME": "/opt/data/agent/home", "S6_BEHAVIOUR_IF_STAGE2_FAILS": "0"})
    done = box.run("stat", "-c", "%U", "/usr/lib")
    assert done.stdout == b"root\n" and b"fatal: HERMES_HOME='/opt/data/agent/home'" in done.stderr, done


@pytest.mark.parametrize("below", ["", "/new/home"], ids=["itself", "below it"])
def test_root_goes_through_no_link_of_the_agents_on_its_way_home(container, volume, below):
    """HERMES_HOME below a folder that hermes owns, which it has replaced by a link: one line, and what that leads to
    is unchanged."""
    os.chown(volume, *HERMES)
    (volume / "agent").symlink_to("/usr/lib")
    os.lchown(volume / "agent", *HERMES)
    box = container(environment={"HERMES_HOME": f"/opt/data/agent{below}", "S6_BEHAVIOUR_IF_STAGE2_FAILS": "0"})
    done = box.run("stat", "-c", "%U %a %n", "/usr/lib", "/usr/lib/os-release", "/usr/lib/new")
    assert done.stdout == b"root 755 /usr/lib\nroot 644 /usr/lib/os-release\n", done
    assert b"fatal: HERMES_HOME='/opt/data/agent" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.sandbox
def test_a_link_of_roots_leads_home(container):
    """An image that has /data for /opt/data still works."""
    box = container(environment={"HERMES_HOME": "/data/agent"})
    (box.upper / "data").symlink_to("opt/data")
    done = box.run("stat", "-c", "%U", "/opt/data/agent", "/opt/data/agent/SOUL.md")
    assert (done.returncode, done.stdout) == (0, b"hermes\nhermes\n"), done.stderr


def test_what_was_hermess_before_and_is_not_ours_to_give_is_said(container, volume):
    """After a change of the UID: what the agent does not make by itself stays as it is; doctor says it too."""
    for path in (volume, volume / "project"):
        path.mkdir(exist_ok=True)
        os.chown(path, *HERMES)
    done = container(environment={"HERMES_UID": "1500"}).run("hermes-boot", "doctor")
    said = (
        b"hermes was another user before; 1 entries at the top of /opt/data that are none of the agent's own stay whose"
    )
    assert (
        said in done.stderr and b"the first: project; chown what hermes needs to 1500:10000 on the host" in done.stderr
    )
    assert b"warn  owner: 1 entries at the top of /opt/data are neither hermes's nor the agent's own" in done.stdout
    assert owner(volume / "project") == HERMES
