"""What root does on a volume that hermes, or an engine led by hermes, has prepared."""

from __future__ import annotations

import os
import pty
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sandbox import PROJECT, wait_for

import hermes_boot

pytestmark = pytest.mark.sandbox
HERMES = (10000, 10000)
OURS = "/opt/hermes/docker/boot"


def owner(path: Path) -> tuple[int, int]:
    """Return a path's own owner."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


@pytest.fixture
def needs_strace() -> None:
    """Skip where system calls cannot be watched."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")


# Root reads nothing


def opened_by_root(trace: str, home: str) -> list[str]:
    """Return the files below a folder that root has opened for more than their name, by strace -f -y of a process that
    started as root; folders excepted. A child's first calls may stand before the one that made it has returned."""
    births = re.findall(r"^(\d+) +(?:<\.\.\. )?(?:clone3?|v?fork)\b.* = (\d+)$", trace, re.MULTILINE)
    parents = {child: parent for parent, child in births}
    seen: set[str] = set()
    dropped: set[str] = set()
    found = []
    for line in trace.splitlines():
        pid, _, call = line.partition(" ")
        call = call.strip()
        if pid not in seen:
            seen.add(pid)
            dropped |= {pid} if parents.get(pid) in dropped else set()
        if re.match(r"set(res|re)?uid\(10000.* = 0$", call):
            dropped.add(pid)
        elif pid not in dropped and re.match(r"open(at|at2)?\(.* = \d+<", call):
            path = re.search(r" = \d+<([^>]*)>", call)[1]
            if path.startswith(f"{home}/") and "O_PATH" not in call and "O_DIRECTORY" not in call:
                found.append(call)
    return found


@pytest.mark.long
def test_root_opens_no_file_of_the_volume(container, needs_strace, tmp_path):
    """In setup, with all of it to do, in reconcile, and in every command of an operator's."""
    box = container(agent=True, environment={"HERMES_AUTH_JSON_BOOTSTRAP": "{}"})
    box.start("sleep", "infinity")
    volume = tmp_path / "volume"
    (volume / "config.yaml").write_text("_config_version: 1\n")
    (volume / ".hermes-agent-version").write_text("0.1\n")
    (volume / "profiles/a").mkdir()
    (volume / "profiles/a/SOUL.md").touch()
    commands = [[OURS], [OURS, "doctor"], [OURS, "doctor", "--fix"], [OURS, "status"], [OURS, "logs"], [OURS, "health"]]
    commands += [
        [OURS, "gateway", "register", "-p", "a"],
        [OURS, "gateway", "restart", "--all"],
        ["hermes", "--version"],
    ]
    for words in commands:
        trace = tmp_path / "trace"
        calls = "trace=openat,open,openat2,clone,clone3,fork,vfork,setuid,setreuid,setresuid"
        command = ["strace", "-f", "-y", "-s", "300", "-o", "/tmp/trace", "-e", calls, *words]
        box.exec(*command)
        trace = box.path("/tmp/trace").read_text()
        assert "openat(" in trace and opened_by_root(trace, "/opt/data") == [], words
        if words == [OURS]:
            assert "config.yaml" in trace  # the child that has become hermes reads it, so the trace sees such calls
            assert opened_by_root(trace.replace("setresuid(10000", "nothing("), "/opt/data") != []
    assert (volume / ".hermes-agent-version").read_text() == "0.19.0\n"


# Mounts below the volume


def test_an_engine_that_is_led_by_links_gives_nothing_away(container, tmp_path):
    """-v secret:/opt/data/mine/private, and hermes has made mine/private a link to ../memories: the host's files stay
    the host's, and one line names mount and command."""
    secret, volume = tmp_path / "secret", tmp_path / "volume"
    (secret / "deep").mkdir(parents=True)
    for path in (secret / "key", secret / "deep/key"):
        path.write_text("x")
    (volume / "memories").mkdir(parents=True)
    (volume / "mine").mkdir()
    (volume / "mine/private").symlink_to("../memories")
    box = container(mounts=((str(secret), "/opt/data/mine/private"),))
    done = box.run("sh", "-c", "ls /opt/data/memories; hermes-boot doctor")
    assert b"key\n" in done.stdout
    assert {owner(path) for path in (secret, *secret.rglob("*"))} == {(0, 0)}
    said = (
        "4 entries of mounts below /opt/data are not hermes's and stay so, the first in /opt/data/memories;"
        " if hermes is to write there: chown -hR 10000:10000 on the host, in what is mounted"
    )
    assert done.stderr.decode().count(said) == 1 and f"warn  owner: {said}" in done.stdout.decode()


def test_what_is_mounted_empty_is_hermess(container, tmp_path):
    """A fresh named volume, as a managed folder or deep in one; a full one beside it stays the operator's."""
    fresh, logs, full = tmp_path / "fresh", tmp_path / "logs", tmp_path / "full"
    for path in (fresh, logs, full):
        path.mkdir()
    (full / "empty.txt").touch()
    (tmp_path / "volume/logs/gateways").mkdir(parents=True)
    mounts = {fresh: "skills", logs: "logs/gateways", full: "workspace/full"}
    box = container(mounts=tuple((str(path), f"/opt/data/{guest}") for path, guest in mounts.items()))
    done = box.run("true")
    assert owner(fresh) == owner(logs) == HERMES
    assert owner(full) == owner(full / "empty.txt") == (0, 0)
    assert (
        b"1 entries of mounts below /opt/data are not hermes's and stay so, the first in /opt/data/workspace/full"
        in done.stderr
    )


def test_hermess_own_entries_of_a_mount_follow_a_remap(container, tmp_path):
    """Those of its former UID, at any depth, and no other."""
    skills, project = tmp_path / "skills", tmp_path / "project"
    for path in (skills, project):
        (path / "deep").mkdir(parents=True)
        (path / "empty").mkdir()
        for name in ("ours", "theirs", "deep/ours"):
            (path / name).write_text("x")
    container(mounts=()).run("true")
    for path in (
        skills,
        skills / "ours",
        skills / "deep",
        skills / "deep/ours",
        project / "ours",
        project / "deep/ours",
    ):
        os.chown(path, *HERMES)
    mounts = ((str(skills), "/opt/data/skills"), (str(project), "/opt/data/workspace/project"))
    container(mounts=mounts, environment={"HERMES_UID": "1500"}).run("true")
    for path in (skills, project):
        assert owner(path / "ours") == owner(path / "deep/ours") == (1500, 10000)
        assert owner(path / "theirs") == owner(path / "empty") == (0, 0)
    assert owner(skills) == (1500, 10000) and owner(project) == (0, 0)


def test_a_first_boot_takes_nobody_for_hermes(container, tmp_path):
    """Who made the volume may have other folders, mounted below it or linked to: these stay as they are."""
    volume, project = tmp_path / "volume", tmp_path / "project"
    for folder in (volume / "workspace", project):
        folder.mkdir(parents=True)
    (project / "file").write_text("x")
    os.link(project / "file", volume / "workspace/linked")
    for path in (volume, volume / "workspace", project, project / "file"):
        os.chown(path, 1000, 1000)
    done = container(mounts=((str(project), "/opt/data/workspace/project"),)).run("true")
    assert owner(project) == owner(project / "file") == (1000, 1000)
    assert owner(volume) == owner(volume / "workspace") == HERMES
    assert b"entries of mounts below /opt/data are not hermes's and stay so" in done.stderr, done.stderr


def test_a_file_that_is_mounted_with_something_in_it_stays_the_operators(container, tmp_path):
    """It may be any file of the host, by a link that hermes has put on the engine's way."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "config.yaml").chmod(0o600)
    done = container(mounts=((str(tmp_path / "config.yaml"), "/opt/data/config.yaml"),)).run("true")
    status = (tmp_path / "config.yaml").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    assert (
        b"stay so, the first in /opt/data/config.yaml; if hermes is to write there: chown -hR 10000:10000"
        in done.stderr
    )
    assert b"config.yaml on the volume cannot be read by hermes: it belongs to 0:0, mode 0600" in done.stderr


def test_a_home_below_a_folder_of_hermess_has_no_former_owner(container, tmp_path):
    """hermes swaps it for another user's folder: what has hard links there stays that user's."""
    other, volume = tmp_path / "volume/agent", tmp_path / "volume"
    (other / "skills").mkdir(parents=True)
    (other / "skills/file").write_text("x")
    os.link(other / "skills/file", volume / "second-name")
    for path in (other, other / "skills/file"):
        os.chown(path, 1000, 1000)
    os.chown(volume, *HERMES)
    done = container(environment={"HERMES_HOME": "/opt/data/agent"}).run("true")
    assert owner(volume / "second-name") == (1000, 1000)
    assert b"1 files on /opt/data/agent have hard links and another owner" in done.stderr


# Modes that hermes takes from itself


@pytest.mark.parametrize("user", [None, 10000], ids=["root", "--user"])
def test_modes_that_hermes_has_taken_from_itself_come_back(container, tmp_path, user):
    """chmod 000 of the home, profiles and logs, which ended every start."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, *HERMES)
    box = container(user=user)
    assert box.run("true").returncode == 0
    (volume / "profiles/a").mkdir()
    (volume / "profiles/a/SOUL.md").touch()
    for name in ("profiles/a", "profiles", "logs", "platforms", ""):
        os.chown(volume / name, *HERMES)
        (volume / name).chmod(0o755 if name == "profiles/a" else 0)
    done = box.run("ls", "/run/service")
    assert done.returncode == 0 and b"gateway-a\n" in done.stdout, done.stderr.decode()
    for name in ("profiles", "logs", "platforms", ""):
        assert stat.S_IMODE((volume / name).stat().st_mode) == 0o700
    assert b"warning" not in done.stderr


# Sizes


def fill_with_links(folder: Path, count: int, name: str) -> None:
    """Make so many names of one file, each a hard link."""
    (folder / "one").touch()
    fd = os.open(folder, os.O_RDONLY)
    for number in range(count):
        os.link("one", name.format(number), src_dir_fd=fd, dst_dir_fd=fd)
    os.close(fd)


def fill_with_folders(folder: Path, count: int, name: str) -> None:
    """Make so many folders."""
    for number in range(count):
        os.mkdir(f"{folder}/{name.format(number)}")


# where, what, how many, how named, and how many MiB more than on an empty volume are enough: a list of the names, of 80
# bytes each or of 260, would need more, or, of profiles, a list of more than MOST_PROFILES
SIZES = {
    "hard links at the top": ("", fill_with_links, 25_000, "link-{:0200}", 4),
    "managed files at the top": ("", fill_with_links, 25_000, "state.db-{:0200}", 4),
    "temporary files at the top": ("", fill_with_links, 25_000, ".x.tmp-{:0200}", 4),
    "folders in a managed folder": ("sessions", fill_with_folders, 50_000, "a-folder-of-the-agents-{}", 3),
    "folders far down": ("workspace/a/b/c/d/e/f/g/h", fill_with_folders, 50_000, "a-folder-of-the-agents-{}", 3),
    "folders in profiles": ("profiles", fill_with_folders, 80_000, "a-folder-of-the-agents-{}", 5),
    "links in profiles": ("profiles", fill_with_links, 25_000, "link-{:0200}", 4),
    "files in a log folder": ("logs/gateways/default", fill_with_links, 25_000, "@{:0200}", 4),
}


NEEDED: list[int] = []


def needed(box) -> int:
    """Return with how many MiB of data doctor, which needs the most, comes to its end on an empty volume."""
    if not NEEDED:
        limits = range(4, 64)
        NEEDED.append(next(limit for limit in limits if not box.exec(*with_memory(limit), "doctor").returncode))
    return NEEDED[0]


def with_memory(limit: int) -> list[str]:
    """Return the argv of hermes-boot with so many MiB of data."""
    return ["prlimit", f"--data={limit << 20}", OURS]


@pytest.mark.long
@pytest.mark.parametrize("place, fill, count, name, more", SIZES.values(), ids=SIZES)
def test_memory_is_bounded_however_many_entries_there_are(container, in_memory, place, fill, count, name, more):
    """Listings are streamed: a process that kept the names of all entries would not have the memory for it."""
    volume = in_memory("nr_inodes=0")
    box = container(volume=volume)
    box.start("sleep", "infinity")
    limit = needed(box) + more
    (volume / place).mkdir(parents=True, exist_ok=True)
    fill(volume / place, count, name)
    (volume / "logs/gateways/default").mkdir(parents=True, exist_ok=True)
    (volume / "logs/gateways/default/current").touch()
    for words in (["setup"], ["reconcile"], ["doctor"], ["logs", "-n", "1"]):
        done = box.exec(*with_memory(limit), *words, timeout=200)
        assert done.returncode in (0, 1) and "Memory" not in done.stderr, (words, done.stderr[-1000:])
        assert words == ["doctor"] or done.returncode == 0
    box.stop(60)


def test_a_profile_among_very_many_folders_has_its_gateway(container, tmp_path, monkeypatch):
    """Folders without SOUL.md push no profile out, and the names are in order."""
    monkeypatch.setattr(hermes_boot, "MOST_PROFILES", 10)  # the real one would take 20,000 folders
    profiles = tmp_path / "profiles"
    for number in range(50):
        (profiles / f"a{number}").mkdir(parents=True)
    for name in ("zz", "zy"):
        (profiles / name).mkdir()
        (profiles / name / "SOUL.md").touch()
    with hermes_boot.Folder(str(profiles)) as folder:
        assert hermes_boot.profile_names(folder) == ["zy", "zz"]


@pytest.fixture
def in_memory(live, tmp_path):
    """A volume on a tmpfs; unmounted at the end."""
    volume = tmp_path / "memory"
    volume.mkdir()
    yield lambda options: mounted(volume, options)
    subprocess.run(["umount", "-l", volume], check=True)


def mounted(volume: Path, options: str) -> Path:
    """Mount a tmpfs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0755,{options}", "tmpfs", volume], check=True)
    return volume


# A setup that is killed


def test_a_setup_that_was_killed_counts_as_failed(container, needs_strace, tmp_path):
    """At its first change of an owner: no gateway comes up on what it left."""
    box = container()
    box.start("sleep", "infinity")
    assert wait_for(lambda: box.path("/run/hermes-command").exists())
    box.exec("rm", "/run/hermes-command")
    (tmp_path / "volume/skills/file").touch()
    kill = ["strace", "-f", "-o", "/dev/null", "-e", "inject=chown,fchown,fchownat,lchown:signal=KILL", OURS, "setup"]
    assert box.exec(*kill).returncode != 0 and box.path("/run/hermes-setup.failed").exists()
    done = box.exec(OURS, "reconcile")
    assert done.returncode == 1 and "the last setup failed (/run/hermes-setup.failed)" in done.stderr
    assert box.exec(OURS, "setup").returncode == 0 and not box.path("/run/hermes-setup.failed").exists()


def test_temporary_files_that_another_container_removes_stop_no_boot(container, tmp_path):
    """hermes there unlinks *.tmp all the time."""
    box = container()
    box.start("sleep", "infinity")
    script = (
        "import glob, os\nos.chdir('/opt/data')\nprint('ready', flush=True)\nwhile True:\n for name in os.listdir():\n"
        "  if name.endswith('.tmp'):\n   try: os.unlink(name)\n   except OSError: pass\n"
    )
    command = box.exec_command(["/usr/bin/python3", "-IBSc", script], "hermes")
    remover = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert remover.stdout.readline() == b"ready\n"
        for _ in range(5):
            done = box.exec(OURS, "setup")
            assert done.returncode == 0 and "cannot be written" not in done.stderr, done.stderr
    finally:
        remover.kill()
        remover.wait()


# What an operator sees


NASTY = b"2026-01-01 00:00:00.0  a\x1b]52;c;eA==\x07 \xe2\x80\xae \xc2\x9b31m \xff\r\xc3\xa9\xe6\x97\xa5\n"
HARMLESS = b"2026-01-01 00:00:00.0  a^[]52;c;eA==^G M-bM-^@M-. M-BM-^[31m M-^?^M\xc3\xa9\xe6\x97\xa5\r\n"


@pytest.mark.parametrize(
    "words, terminal, shown",
    [([], True, HARMLESS), (["--raw"], True, NASTY[:-1] + b"\r\n"), ([], False, NASTY)],
    ids=["terminal", "raw", "pipe"],
)
def test_a_log_cannot_act_on_a_terminal(plain, words, terminal, shown):
    """ESC, OSC 52, C1 and bidi are shown as by cat -v; text stays text; raw when asked for and in a pipe."""
    folder = plain.home / "logs/gateways/default"
    folder.mkdir(parents=True)
    (folder / "current").write_bytes(NASTY)
    script = str(PROJECT / "hermes_boot.py")
    environment = {"PATH": os.environ["PATH"], "HERMES_HOME": str(plain.home), "S6_PROFILE_GATEWAY_SCANDIR": "/none"}
    ours, theirs = pty.openpty() if terminal else os.pipe()
    subprocess.run([sys.executable, "-IS", script, "logs", *words], stdout=theirs, env=environment, check=True)
    os.close(theirs)
    assert os.read(ours, 4096) == shown
    os.close(ours)


def test_doctor_names_roots_files_at_the_top(container, tmp_path):
    """hermes can put them among its own, and the next boot would hand them over."""
    box = container()
    box.start("sleep", "infinity")
    (tmp_path / "volume/operators.key").touch()
    done = box.exec(OURS, "doctor")
    assert (
        "warn  owner: 1 entries at the top of /opt/data are neither hermes's nor the agent's own,"
        " the first: operators.key" in done.stdout
    )
    assert owner(tmp_path / "volume/operators.key") == (0, 0)


def test_no_advice_lets_root_act_on_the_volume(container, tmp_path):
    """What doctor says to paste there is hermes's to do, or `doctor --fix`, which does it as hermes."""
    box = container()
    box.start("sleep", "infinity")
    volume = tmp_path / "volume"
    for name in ("Bad Name", "nosoul"):
        (volume / "profiles" / name).mkdir()
    (volume / ".env").chmod(0o644)
    done = box.exec(OURS, "doctor")
    assert "warn  default: .env can be read by everyone; hermes-boot doctor --fix\n" in done.stdout
    for line in done.stdout.splitlines():
        for command in re.findall(r"(\S+ \S+ )?\b(mv|touch|rm|chmod|chown) [^(]*/opt/data", line):
            assert command[0] == "/command/s6-setuidgid hermes ", line
    (line,) = [line for line in done.stdout.splitlines() if " mv " in line]
    assert box.exec("sh", "-c", line.partition("; ")[2]).returncode == 0 and (volume / "profiles/NEW-NAME").is_dir()
    as_hermes = box.exec(OURS, "doctor", user="hermes").stdout
    assert "; touch '/opt/data/profiles/nosoul/SOUL.md'" in as_hermes


HOSTILE = r"""
import fcntl, os, socket, sys, time
home = "/opt/data"
kinds = {
    "fifo": os.mkfifo,
    "sparse": lambda path: os.truncate(os.open(path, os.O_RDWR | os.O_CREAT), 1 << 36),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(path),
    "link to a fifo": lambda path: os.symlink("/tmp/fifo", path),
    "leased": lambda path: fcntl.fcntl(os.open(path, os.O_RDWR | os.O_CREAT), fcntl.F_SETLEASE, fcntl.F_WRLCK),
}
if not os.path.exists("/tmp/fifo"):
    os.mkfifo("/tmp/fifo")
places = ".env auth.json config.yaml SOUL.md active_profile gateway_state.json gateway.pid".split()
places += [".hermes-agent-version"]
logs = ["current", "lock", "state", "@400000006a.s"]
for index, (kind, make) in enumerate(kinds.items()):
    if kind != sys.argv[1]:
        continue
    folders = {"": places, "/profiles/a": places, "/logs/gateways/a": logs, "/logs/gateways/default": logs}
    for folder, names in ((home + below, names) for below, names in folders.items()):
        os.makedirs(folder, exist_ok=True)
        for name in names:
            path = f"{folder}/{name}"
            if os.path.lexists(path):
                os.unlink(path)
            os.chdir(folder)
            if kind != "socket" or len(path) < 100:
                make(path)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["fifo", "sparse", "socket", "link to a fifo", "leased"])
def test_no_command_hangs_on_hostile_files(container, kind):
    """Whatever lies where they read, as root and as hermes, doctor, status and health come to their end."""
    box = container()
    box.start("sleep", "infinity")
    command = box.exec_command(["/usr/bin/python3", "-IBSc", HOSTILE, kind], "hermes")
    agent = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert agent.stdout.readline() == b"ready\n"
        box.exec("touch", "/opt/data/profiles/a/x", user="hermes")
        for words in (
            ["doctor"],
            ["doctor", "--fix"],
            ["status"],
            ["health"],
            ["gateway", "status"],
        ):
            for user in (None, "hermes"):
                done = box.exec("timeout", "-s", "KILL", "8", OURS, *words, user=user)
                assert done.returncode in (0, 1, 3, 4) and "Traceback" not in done.stderr, (words, done)
    finally:
        agent.kill()
        agent.wait()


def test_a_folder_on_the_way_that_hermes_may_not_enter_is_named(container):
    """HERMES_HOME=/root/.hermes."""
    done = container(environment={"HERMES_HOME": "/root/.hermes"}).run("true")
    assert done.returncode == 1 and re.search(
        rb"fatal: /root/\.hermes cannot be read by hermes \(10000:10000\): Permission denied;"
        rb" /root on the way, which hermes may not enter, belongs to 0:0, mode 0700; let hermes in, or set HERMES_HOME",
        done.stderr,
    ), done.stderr
