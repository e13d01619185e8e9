"""No volume stops the boot: each fault stands between two good profiles, which must come up all the same.

Run over the real phases on real s6, as root that drops to hermes. Each row makes one fault and names what the boot says
of it. Faults that are not in each other's way are put on one volume.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MANAGER, ROUNDS, RUN
from sandbox import Sandbox, maker, wait_for

import hermes_boot

pytestmark = pytest.mark.sandbox

RUNNING = '{"desired_state": "running"}'
SLEEPER = "#!/bin/sh\nexec sleep infinity\n"
STATE = "gateway_state.json"
ENTRIES = 200 * ROUNDS


def bind_socket(path: Path) -> None:
    """Leave a socket at a path, however long that is."""
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def sparse(path: Path) -> None:
    """Make a file of 1 GiB that takes no space."""
    with open(path, "wb") as file:
        file.truncate(1 << 30)


def instead(path: Path, make) -> None:
    """Put something else in a file's place, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        subprocess.run(["rm", "-rf", path], check=True)
    path.unlink(missing_ok=True)
    make(path)


def state(content: str | bytes):
    """Make the fault that a state file has this content."""
    return lambda home: (home / "profiles/m" / STATE).write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    )


def at(name: str, make):
    """Make the fault that something else is in an entry's place."""
    return lambda home: instead(home / name, make)


def named(name: str):
    """Make the fault that a folder of profiles/ has this name."""

    def fault(home: Path) -> None:
        folder = home / "profiles" / name
        folder.mkdir()
        (folder / "SOUL.md").touch()
        (folder / STATE).write_text(RUNNING)

    return fault


AT_THE_END: list[list] = []


def immutable(home: Path) -> None:
    """Make a profile that even root cannot change."""
    subprocess.run(["chattr", "+i", home / "profiles/m"], check=True)
    AT_THE_END.append(["chattr", "-i", home / "profiles/m"])


def link_to(target: str):
    """Make a link to a target."""
    return lambda path: path.symlink_to(target)


def device(path: Path) -> None:
    """Make a device that never ends."""
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


M = "profiles/m"
SILENT = ""
STATE_FAULT = f'profile=m prior_state=none action=registered reason="{STATE} '
SKIPPED = 'profile=m prior_state=none action=skipped reason="'
PROFILES = {
    # folder names
    "name Coder": (named("Coder"), "profile=Coder prior_state=none action=skipped reason=\"a profile's name has only"),
    "name with a space": (named("my profile"), "profile='my profile' "),
    "name with a newline": (named("a\nb"), "profile='a\\nb' "),
    "name -rf": (named("-rf"), "profile=-rf "),
    "name ..x": (named("..x"), "profile=..x "),
    "name of invalid UTF-8": (named("\udcff\udcfe"), "profile='\\udcff\\udcfe' "),
    "name of 252 bytes": (
        named("m" * 252),
        '(252 characters) prior_state=none action=skipped reason="the name is longer',
    ),
    "name default": (named("default"), 'reason="the name is reserved for the root profile'),
    # the state file's content
    "state list": (state("[]"), STATE_FAULT + "is not a JSON object"),
    "state number": (state("7"), STATE_FAULT),
    "state string": (state('"running"'), STATE_FAULT),
    "state null": (state("null"), STATE_FAULT),
    "state empty": (state(""), STATE_FAULT),
    "state truncated": (state('{"desired_state": "run'), STATE_FAULT),
    "state invalid UTF-8": (state(b'{"desired_state": "\xff"}'), STATE_FAULT),
    "state with BOM": (state(b"\xef\xbb\xbf" + RUNNING.encode()), "profile=m prior_state=running action=started"),
    "state nested": (state("[" * 60_000), STATE_FAULT),
    "state nested in a key": (state('{"a":' * 12_000), STATE_FAULT),
    "state of 1 GiB": (lambda home: sparse(home / M / STATE), STATE_FAULT + "is longer than"),
    "state with duplicate keys": (
        state('{"desired_state": "running", "desired_state": "stopped"}'),
        "profile=m prior_state=stopped action=registered",
    ),
    "state NaN": (state('{"desired_state": NaN}'), STATE_FAULT + "has a state that is no string"),
    "state huge number": (state('{"pid": ' + "9" * 60_000 + "}"), STATE_FAULT),
    "intent dict": (state('{"desired_state": {}}'), STATE_FAULT + "has a state that is no string"),
    "intent list": (state('{"desired_state": []}'), STATE_FAULT),
    "intent number": (state('{"desired_state": 1}'), STATE_FAULT),
    "state dict": (state('{"gateway_state": {}}'), STATE_FAULT),
    "intent of 60 KB": (
        state('{"desired_state": "' + "x" * 60_000 + '"}'),
        "...(1000 characters) action=registered",
    ),
    "intent with newlines": (
        state('{"desired_state": "x\\nprofile=z prior_state=none action=skipped"}'),
        "prior_state='x\\nprofile",
    ),
    # the state file's kind
    "state FIFO": (at(f"{M}/{STATE}", os.mkfifo), STATE_FAULT + "is not a regular file"),
    "state socket": (at(f"{M}/{STATE}", bind_socket), STATE_FAULT),
    "state device": (at(f"{M}/{STATE}", device), STATE_FAULT),
    "state folder": (at(f"{M}/{STATE}", Path.mkdir), STATE_FAULT),
    "state dangling link": (at(f"{M}/{STATE}", link_to("/no/such")), STATE_FAULT + "is a link"),
    "state link to shadow": (at(f"{M}/{STATE}", link_to("/etc/shadow")), STATE_FAULT + "is a link"),
    "state link to itself": (at(f"{M}/{STATE}", link_to(STATE)), STATE_FAULT + "is a link"),
    "state link to a FIFO": (
        lambda home: (os.mkfifo(home / "fifo"), instead(home / M / STATE, link_to("../../fifo"))),
        STATE_FAULT + "is a link",
    ),
    "state of mode 000": (lambda home: (home / M / STATE).chmod(0), STATE_FAULT + "cannot be used (Permission denied)"),
    # SOUL.md
    "SOUL.md FIFO": (at(f"{M}/SOUL.md", os.mkfifo), SKIPPED + "SOUL.md is not a file"),
    "SOUL.md folder": (at(f"{M}/SOUL.md", Path.mkdir), SKIPPED + "SOUL.md is not a file"),
    "SOUL.md dangling link": (at(f"{M}/SOUL.md", link_to("/no/such")), SKIPPED + "SOUL.md is not a file"),
    "SOUL.md link to itself": (at(f"{M}/SOUL.md", link_to("SOUL.md")), SKIPPED + "SOUL.md is not a file"),
    # stale files
    "gateway.pid folder": (
        at(f"{M}/gateway.pid", Path.mkdir),
        "gateway.pid cannot be used (Is a directory); remove it",
    ),
    "gateway.pid link": (at(f"{M}/gateway.pid", link_to("/etc/passwd")), SILENT),
    "processes.json folder": (at(f"{M}/processes.json", Path.mkdir), "processes.json cannot be used (Is a directory)"),
    # the profile
    "profile a link": (at(M, link_to("/etc")), SKIPPED + "profiles/m is a link"),
    "profile a dangling link": (at(M, link_to("/no/such")), SKIPPED + "profiles/m is a link"),
    "profile a link to a good one": (at(M, link_to("a-good")), SKIPPED + "profiles/m is a link"),
    "profile a file": (at(M, Path.touch), SILENT),
    "profile a FIFO": (at(M, os.mkfifo), SILENT),
    "profile of mode 000": (
        lambda home: (home / M).chmod(0),
        SKIPPED + "profiles/m cannot be used (Permission denied)",
    ),
    "profile with a setuid folder": (lambda home: (home / M).chmod(0o6755), SILENT),
}
VOLUMES = {
    "managed entries": {
        "skills a link": (at("skills", link_to("/etc")), "skills on the volume is a link"),
        "platforms a file": (
            at("platforms", Path.touch),
            "platforms/pairing on the volume is a link, or not of the kind",
        ),
        "config.yaml a folder": (at("config.yaml", Path.mkdir), SILENT),
        ".env a link to shadow": (at(".env", link_to("/etc/shadow")), SILENT),
        "active_profile a FIFO": (at("active_profile", os.mkfifo), SILENT),
        "a folder named like a temporary file": (
            at(".config.yaml.1-2.tmp", lambda path: (path / "x").mkdir(parents=True)),
            SILENT,
        ),
        "version stamp a FIFO": (at(".hermes-agent-version", os.mkfifo), SILENT),
    },
    "a file for logs": {
        "logs a file": (at("logs", Path.touch), "logs on the volume is a link, or not of the kind it should be"),
    },
    "a link for logs": {
        "logs a link to /etc": (at("logs", link_to("/etc")), "logs on the volume is a link"),
        ".env a FIFO": (at(".env", os.mkfifo), SILENT),
    },
    "an immutable folder": {
        "profile immutable": (immutable, "could not be given to 10000:10000"),
    },
    "files in logs": {
        "logs/gateways a file": (at("logs/gateways", Path.touch), "logs/gateways/m is a link, or not of the kind"),
        "boot log a folder": (
            at("logs/container-boot.log", Path.mkdir),
            "logs/container-boot.log cannot be used (Is a directory)",
        ),
    },
    "links in logs": {
        "a log folder a link": (at("logs/gateways/m", link_to("/etc")), "logs/gateways/m is a link"),
        "boot log a link": (at("logs/container-boot.log", link_to("/etc/passwd")), "logs/container-boot.log is a link"),
    },
    "a FIFO in logs": {
        "boot log a FIFO": (at("logs/container-boot.log", os.mkfifo), "logs/container-boot.log cannot be used"),
    },
}


def add_profile(home: Path, name: str) -> None:
    """Make a good profile."""
    folder = home / "profiles" / name
    folder.mkdir(parents=True)
    (folder / "SOUL.md").touch()
    (folder / STATE).write_text(RUNNING)


@pytest.fixture
def home(tmp_path):
    """A volume with a good profile before and after the fault, in name order; unprotected again at the end."""
    home = tmp_path / "volume"
    for name in ("a-good", "m", "z-good"):
        add_profile(home, name)
    yield home
    while AT_THE_END:
        subprocess.run(AT_THE_END.pop())


def snapshot() -> list[tuple]:
    """Return owner, mode, size and times of what must not change outside the volume; in place, all but the times."""
    fields = ["uid", "gid", "mode", "size"] + (["mtime_ns", "ctime_ns"] if maker()[0] is Sandbox else [])
    paths = ["/etc", "/etc/passwd", "/etc/shadow", "/etc/group"]
    return [(path, *(getattr(os.lstat(path), f"st_{field}") for field in fields)) for path in paths]


CHECK = """PATH=/command:$PATH
for p in a-good z-good; do # s6-svwait fails as long as nobody supervises the slot
  n=0
  until s6-svwait -t 10000 -u /run/service/gateway-$p 2>/dev/null; do
    [ $((n += 1)) -lt 200 ] || { echo missing $p; break; }
    sleep 0.05
  done
done
stat -c '%n %u:%g %a' /etc/shadow
"""


def boots(box, said: list[str]) -> None:
    """Both good gateways start, the boot ends with 0, a line names each fault, nothing outside changes."""
    box.put_agent(SLEEPER)
    before = snapshot()
    done = box.run("sh", "-c", CHECK, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"missing" not in done.stdout, done.stderr.decode()
    err = done.stderr.decode()
    assert [text for text in said if text not in err] == [] and "Traceback" not in err, err
    assert snapshot() == before
    assert (box.upper / "etc/passwd").stat().st_uid == 0 and b"/etc/shadow 0:" in done.stdout


@pytest.mark.parametrize("faults", VOLUMES.values(), ids=VOLUMES)
def test_the_good_profiles_come_up_beside(container, home, faults):
    """In a volume's other entries."""
    for fault, _ in faults.values():
        fault(home)
    boots(container(), [said for _, said in faults.values()])


def test_the_good_profiles_come_up_beside_every_bad_one(container, home, tmp_path):
    """All of them at once, each with its own line: a fault is made in the profile m, which then gets another name."""
    expected = []
    for number, (name, (fault, said)) in enumerate(PROFILES.items()):
        made, own = tmp_path / str(number), f"m{number:02}"
        add_profile(made, "m")
        add_profile(made, "a-good")  # where a link leads to
        fault(made)
        for path in (made / "profiles").iterdir():
            if path.name not in ("a-good", "m") or (path.name == "m" and not name.startswith("name ")):
                path.rename(home / "profiles" / (own if path.name == "m" else path.name))
        expected.append(said.replace("profile=m ", f"profile={own} ").replace("profiles/m ", f"profiles/{own} "))
    boots(container(), expected)


@pytest.fixture
def in_memory(tmp_path, home):
    """Make a volume like home on a tmpfs with mount options of its own; unmounted at the end."""
    mounted: list[Path] = []

    def make(options: str) -> Path:
        volume = tmp_path / "memory"
        volume.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", volume], check=True)
        mounted.append(volume)
        subprocess.run(["cp", "-a", f"{home}/.", volume], check=True)
        return volume

    yield make
    for volume in mounted:
        subprocess.run(["umount", "-l", volume], check=True)


def test_a_full_volume_starts_what_it_has(container, in_memory):
    """No byte left: the seeds are missing and that is said, the gateways start."""
    full = in_memory("size=256k")
    subprocess.run(["dd", "if=/dev/zero", f"of={full}/fill", "bs=4k"], capture_output=True)
    box = container(volume=full)
    box.put_agent(SLEEPER)
    done = box.run("sh", "-c", CHECK)
    assert done.returncode == 0 and b"missing" not in done.stdout, done.stderr.decode()
    assert done.stderr.count(b"No space left on device; free some space") == 1, done.stderr.decode()
    assert b"put a plain folder there" not in done.stderr
    assert not [path for path in full.iterdir() if path.name.endswith(".tmp")]


def test_a_read_only_volume_ends_the_boot_with_the_reason(container, tmp_path, home):
    """It cannot serve: code 1 and what to do."""
    subprocess.run(["mount", "--bind", home, home], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", home], check=True)
        done = container().run("true")
    finally:
        subprocess.run(["umount", "-l", home], check=True)
    assert done.returncode == 1
    assert (
        b"cannot be written by hermes (10000:10000): Read-only file system" in done.stderr
        and b"mount it writable" in done.stderr
    )


def test_very_many_entries_and_renames_during_the_sweep(container, in_memory):
    """A wide folder, with names that change while it is swept. In memory, where so many files come and go quickly."""
    workspace = in_memory("nr_inodes=0") / "workspace"
    wide = workspace / "wide"
    wide.mkdir(parents=True)
    for number in range(ENTRIES):
        os.close(os.open(f"{wide}/{number}", os.O_CREAT))
    (workspace / "moves/deep/er").mkdir(parents=True)
    script = (
        "import os, sys\nos.chdir(sys.argv[1])\nwhile True:\n"
        " for a, b in (('moves', 'moved'), ('moved/deep', 'deep'), ('deep', 'moved/deep'), ('moved', 'moves')):\n"
        "  try: os.rename(a, b)\n  except OSError: pass\n"
    )
    mover = subprocess.Popen([sys.executable, "-IS", "-c", script, str(workspace)])
    try:
        started = time.monotonic()
        done = container(volume=workspace.parent).run("true", timeout=120)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert time.monotonic() - started < 60
        assert (wide / f"{ENTRIES - 1}").stat().st_uid == 10000
    finally:
        mover.kill()
        mover.wait()


@pytest.mark.parametrize(
    "make", [Path.touch, link_to("/etc"), link_to("/no/such"), os.mkfifo], ids=["file", "link", "dangling link", "FIFO"]
)
def test_profiles_that_are_no_folder_cost_only_themselves(container, home, make):
    """The root profile's gateway is there all the same."""
    instead(home / "profiles", make)
    done = container().run("ls", "/run/service")
    assert done.returncode == 0 and b"gateway-default" in done.stdout
    assert (
        b"profiles on the volume is a link, or not of the kind it should be, so default alone has a gateway"
        in done.stderr
    )


def test_a_volume_out_of_inodes_starts_what_it_has(container, in_memory):
    """No file more can be made."""
    full = in_memory("nr_inodes=40")
    for number in range(40):
        try:
            (full / f"fill{number}").touch()
        except OSError:
            break
    box = container(volume=full)
    box.put_agent(SLEEPER)
    done = box.run("sh", "-c", CHECK)
    assert done.returncode == 0 and b"missing" not in done.stdout, done.stderr.decode()


@pytest.mark.parametrize("make", [Path.touch, link_to("/no/such")], ids=["file", "dangling link"])
def test_a_scandir_that_is_none_is_one_line(plain, make):
    """No gateway can run, and that is said."""
    make(plain.scandir)
    done = plain.reconcile()
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "fatal: the scandir " in line and "so no gateway can run" in line


def test_a_read_only_scandir_costs_the_gateways_and_says_so(live, plain):
    """Nothing can be published: each profile gets a line with the reason; slots that are there already stay as they
    are."""
    plain.profile("a", RUNNING)
    plain.scandir.mkdir()
    try:
        for options, expected in (("ro", "skipped"), ("remount,rw", "started"), ("remount,ro", "started")):
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", plain.scandir], check=True)
            done = plain.reconcile()
            assert done.returncode == 0 and f"profile=a prior_state=running action={expected}" in done.stderr
            assert ("could not be made (Read-only file system); make" in done.stderr) is (expected == "skipped")
        assert plain.slots() == {"a": True, "default": False}
    finally:
        subprocess.run(["umount", "-l", plain.scandir], check=True)


HOMES = [
    "/srv/with space",
    "/srv/it's",
    '/srv/"quoted"',
    "/srv/$(touch /tmp/pwned)`touch /tmp/pwned`",
    "/srv/line\nbreak",
    "/srv/-x;y&z",
]


@pytest.mark.parametrize("path", HOMES)
def test_any_home_boots_and_logs_to_the_right_folder(container, path):
    """Its name reaches the scripts as data."""
    box = container(environment={"HERMES_HOME": path, "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent('#!/bin/sh\necho "here: $PWD"\nexec sleep infinity\n')
    log = '"$HERMES_HOME/logs/gateways/default/current"'
    wait = f"for i in 1 2 3 4 5 6 7 8 9 10; do grep -q here: {log} && break; sleep 0.2; done"
    done = box.run("sh", "-c", f"{wait}; cat {log}; ls -d /tmp/pwned")
    assert done.returncode == 2 and f"here: {path.splitlines()[0]}" in done.stdout.decode(), done


def test_a_container_that_is_for_one_profile_logs_to_the_root_home(container):
    """HERMES_HOME=<root>/profiles/<name>: the slots have <root>, as the boot does."""
    box = container(
        environment={"HERMES_HOME": "/opt/data/profiles/coder", "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
    )
    box.put_agent('#!/bin/sh\necho "home: $HOME $HERMES_HOME"\nexec sleep infinity\n')
    log = "/opt/data/logs/gateways/default/current"
    done = box.run(
        "sh", "-c", f"for i in 1 2 3 4 5 6 7 8 9; do grep -q home: {log} && break; sleep 0.2; done; cat {log}"
    )
    assert b"home: /opt/data /opt/data\n" in done.stdout and b"unable to" not in done.stderr, done


@pytest.mark.parametrize("version", ["0.1\u00b2", "\u0661.2", "9" * 99, ""])
def test_any_version_on_the_volume(version):
    """It is only compared."""
    assert hermes_boot.is_newer("0.19.0", version) == (version != "9" * 99)


def test_what_hermes_puts_into_the_scandir_stops_no_command(gateways):
    """Names that would reach a terminal, a FIFO or nonsense in s6's files, a deep folder in a slot's way."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    assert wait_for(lambda: host.up("a") and host.up("b"))
    script = """
        mkdir "gateway-$(printf '\\033')[31m" gateway-c gateway-c/supervise
        mkfifo gateway-c/supervise/status gateway-c/supervise/control
        sleep 60 <>gateway-c/supervise/control >&- 2>&- &
        rm gateway-b/supervise/death_tally && printf '%014d' 0 | tr 0 '\\177' >gateway-b/supervise/death_tally
        mkdir -p gateway-e/supervise && mkfifo gateway-e/supervise/control
        sleep 60 <>gateway-e/supervise/control >&- 2>&- &
        printf '%034d\\4' 0 | tr 0 '\\0' >gateway-e/supervise/status
        printf '%084d' 0 | tr 0 '\\177' >gateway-e/supervise/death_tally
        mkdir .gateway-d.tmp && cd .gateway-d.tmp && for i in $(seq 1500); do mkdir d; cd -P d; done
    """
    assert host.box.exec("sh", "-c", f"cd /run/service; {script}", user="hermes").returncode == 0
    host.folder("d").mkdir()
    (host.folder("d") / "SOUL.md").touch()
    for words in (
        ["status"],
        ["doctor"],
        ["health"],
        ["gateway", "list"],
        ["gateway", "register", "-p", "d"],
        ["gateway", "stop", "-p", "b"],
    ):
        done = host.box.exec(MANAGER, *words, timeout=20)
        assert "Traceback" not in done.stderr and "\033" not in done.stdout + done.stderr, done
    assert host.up("a") and host.box.exec("test", "-e", "/run/service/gateway-d").returncode == 0


def test_a_slots_file_is_whole_or_refused(in_memory):
    """What fits only in part would be a script or a variable that ends half-way; and no descriptor stays open."""
    full = in_memory("size=256k")
    before = len(os.listdir("/proc/self/fd"))
    with hermes_boot.Folder(str(full)) as folder, pytest.raises(OSError, match="No space left"):
        hermes_boot.put(folder, "value", "x" * (300 << 10), 0o644)
    assert len(os.listdir("/proc/self/fd")) == before
