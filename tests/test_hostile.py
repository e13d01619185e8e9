"""Root is never turned against the machine, and a boot that is killed leaves nothing half done.

The agent is played by a process that runs as hermes and does its worst on the volume while the phases run as root
beside it; the volume is on the same file system as what it aims at, so that hard links work too.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import ROUNDS

pytestmark = pytest.mark.sandbox

AGENT = r"""
import os, shutil, subprocess
home, watched, rounds = "/srv/home", "/srv/watched", 0
os.chdir(home)

def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        pass

def swap(name, other):
    # the folder or file, a link out of the volume, a hard link, and the thing itself again
    attempt(os.rename, name, name + ".away")
    attempt(other, watched + "/secret" if other is os.link else watched, name)
    attempt(os.unlink, name)
    attempt(os.rename, name + ".away", name)

# where users may have namespaces of their own: folders of the volume under mounts that only this one sees, held open by
# a process
turn = "mount --bind /srv/watched $at && umount -l $at"
mounts = f"while [ ! -e /srv/stop ]; do for at in memories skills profiles; do {turn}; done; done"
quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
mounter = subprocess.Popen(["unshare", "-Urm", "sh", "-c", mounts], **quiet)
for name in ("tool", "mine"):
    shutil.copy("/bin/true", "workspace/" + name)
os.chmod("workspace/tool", 0o6755)
print(rounds, flush=True)
while not os.path.exists("/srv/stop"):
    folders = "skills", "hooks", "logs/gateways", "logs/gateways/default", "memories/sub", "profiles/a"
    for name in (*folders, "config.yaml", "SOUL.md"):
        swap(name, os.symlink)
    for entry in os.listdir("workspace"):
        if entry.startswith("root"):
            swap("workspace/" + entry, os.link)
            swap("workspace/" + entry, os.symlink)
    links = {".env": watched + "/planted", "auth.json": watched + "/secret", "state.db-x": "/etc/passwd"}
    for name, target in links.items():
        attempt(os.unlink, name)
        attempt(os.symlink, target, name)
        attempt(os.unlink, name)
        attempt(os.link, watched + "/secret", name)
    for slot in ("", "/log"):
        try:
            control = os.open("/run/service/gateway-default" + slot + "/supervise/control", os.O_WRONLY | os.O_NONBLOCK)
            os.write(control, b"t")
            os.close(control)
        except OSError:
            pass
    rounds += 1
    if rounds % 100 == 0:
        print(rounds, flush=True)
mounter.wait()
print(rounds, flush=True)
"""
WATCH = r"""
import hashlib, json, os, sys
seen = {}
for path, folders, files in os.walk("/srv/watched"):
    for name in [path, *(os.path.join(path, entry) for entry in files)]:
        status = os.lstat(name)
        data = open(name, "rb").read() if os.path.isfile(name) else b""
        # a hard link changes ctime and the link count, which is the agent's doing and harms nobody
        seen[name] = [status.st_uid, status.st_gid, status.st_mode, status.st_size, status.st_mtime_ns]
        seen[name].append(hashlib.sha256(data).hexdigest())
print(json.dumps(seen))
"""
GIFT = (
    "rm -rf /srv/gift && mkdir -p /srv/gift/deep && echo x > /srv/gift/deep/file"
    " && mv -nT /srv/gift /srv/home/workspace/root$1"
)
OURS = "/opt/hermes/docker/boot"
NAIVE = "cd /srv/home && { [ -e .env ] || echo A=1 > .env; }; chown -R hermes:hermes /srv/home"


@pytest.fixture
def hard_links_allowed(live):
    """Let users link to files that are not theirs, as kernels without fs.protected_hardlinks do; put back
    afterwards."""
    switch = Path("/proc/sys/fs/protected_hardlinks")
    before = switch.read_text()
    switch.write_text("0")
    yield
    switch.write_text(before)


def play(box, boot: str, least: int) -> tuple[dict, dict, int]:
    """Let the agent race a boot for at least so many rounds; return the watched tree before and after, and the
    rounds."""
    box.exec("rm", "-f", "/srv/stop")
    box.exec(
        "sh", "-c", "mkdir -p /srv/watched/sub && echo secret > /srv/watched/secret && echo x > /srv/watched/sub/file"
    )
    box.exec(
        "sh",
        "-c",
        "chmod 0600 /srv/watched/secret; chmod 0755 /srv/watched; mkdir -p /srv/home/memories/sub /srv/home/profiles/a",
    )
    box.exec("chown", "-R", "hermes:hermes", "/srv/home/memories", "/srv/home/profiles")
    before = json.loads(box.exec("/usr/bin/python3", "-c", WATCH).stdout)
    command = box.exec_command(["/usr/bin/python3", "-IBSc", AGENT], "hermes")
    agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rounds, number = int(agent.stdout.readline()), 0
    try:
        while rounds < least:
            for _ in range(5):
                number += 1
                box.exec("sh", "-c", GIFT, "gift", str(number % 20))
                done = box.exec("sh", "-c", boot)
                assert "Traceback" not in done.stderr, done.stderr
            rounds = int(agent.stdout.readline())
    finally:
        box.exec("touch", "/srv/stop")
        _, errors = agent.communicate(timeout=30)
    assert errors == ""
    return before, json.loads(box.exec("/usr/bin/python3", "-c", WATCH).stdout), rounds


@pytest.mark.long
@pytest.mark.parametrize("at_boot", [False, True], ids=["beside the command", "as at a boot"])
def test_the_agent_cannot_turn_root_against_the_machine(container, hard_links_allowed, at_boot):
    """Links, hard links, swaps and restarts while setup and reconcile run as root: the watched tree is unchanged. The
    sweep goes another way before the container's command has started; that one is attacked too."""
    box = container(environment={"HERMES_HOME": "/srv/home"})
    box.start("sleep", "infinity")
    if at_boot:
        box.exec("rm", "/run/hermes-command")
    before, after, rounds = play(box, OURS, ROUNDS)
    assert after == before and rounds >= ROUNDS
    found = box.exec("find", "/srv/home", "-user", "hermes", "-perm", "/6000", "-type", "f").stdout
    assert found == "/srv/home/workspace/tool\n"
    assert box.exec("stat", "-c", "%U", "/srv/home/workspace/mine").stdout == "hermes\n"
    assert box.exec("stat", "-c", "%u %a", "/etc/passwd").stdout == "0 644\n"


REMAPS = "; ".join(f"echo {uid} >/run/s6/container_environment/HERMES_UID; {OURS} setup" for uid in (1500, 10000))


def test_a_container_of_the_former_uid_cannot_turn_a_remap_against_the_machine(container, hard_links_allowed):
    """It runs on the volume while that goes to another UID, and back."""
    box = container(environment={"HERMES_HOME": "/srv/home"})
    box.start("sleep", "infinity")
    box.exec("rm", "-f", "/run/hermes-command")
    before, after, rounds = play(box, REMAPS, ROUNDS // 2)
    assert after == before and rounds >= ROUNDS // 2
    assert box.exec("stat", "-c", "%u %a", "/etc/passwd").stdout == "0 644\n"


def test_a_naive_boot_fails_the_same_attack(container, hard_links_allowed):
    """`chown -R` and seeding by path: the attack above is a real one."""
    box = container(environment={"HERMES_HOME": "/srv/home"})
    box.start("sleep", "infinity")
    assert any(after != before for before, after, _ in (play(box, NAIVE, 300) for _ in range(10)))


# A boot that is killed

DRIVER = r"""
import json, mmap, os, shutil, signal, subprocess, sys, time
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
HOME, SCANDIR, SEEN = "/srv/home", "/srv/scandir", {}
ENVIRONMENT = {"HERMES_HOME": HOME, "S6_PROFILE_GATEWAY_SCANDIR": SCANDIR, "S6_KEEP_ENV": "1",
               "HERMES_UID": "1500", "HERMES_GID": "1501",
               "HERMES_AUTH_JSON_BOOTSTRAP": "{\"a\": 1}", "HERMES_BOOT_QUIET": "1"}
counter = mmap.mmap(-1, 9)

def fresh():
    for path in (HOME, SCANDIR):
        shutil.rmtree(path, ignore_errors=True)
    for name in ("passwd", "group"):
        shutil.copy2("/srv/" + name, "/etc/" + name)
        if os.path.exists("/etc/" + name + "+"):
            os.unlink("/etc/" + name + "+")
    for name, state in (("a", "running"), ("b", "stopped")):
        os.makedirs(f"{HOME}/profiles/{name}")
        state = json.dumps({"desired_state": state})
        for file, text in (("SOUL.md", ""), ("gateway_state.json", state), ("gateway.pid", "1")):
            with open(f"{HOME}/profiles/{name}/{file}", "w") as output:
                output.write(text)

def kill_at(limit):
    # every call that changes a file system counts, in the children too; at the limit the whole boot dies, before that
    # change
    def counted(function, changes=lambda *a, **k: True):
        def call(*arguments, **keywords):
            if changes(*arguments, **keywords):
                count = int.from_bytes(counter[:8], "little") + 1
                counter[:8] = count.to_bytes(8, "little")
                if count == limit:
                    counter[8] = 1  # the driver, being root, kills us all
                    signal.pause()
            return function(*arguments, **keywords)
        return call
    for name in "mkdir rename link unlink rmdir chmod chown fchmod fchown mkfifo write fsync".split():
        setattr(os, name, counted(getattr(os, name)))
    os.open = counted(os.open, lambda path, flags, *a, **k: bool(flags & (os.O_CREAT | os.O_TRUNC)))

def boot(limit=0):
    counter[:] = bytes(9)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.environ.clear()
        hermes_boot.process_environment = lambda: dict(ENVIRONMENT)
        hermes_boot.CONTAINER_ENVIRONMENT = "/none"
        kill_at(limit)
        os._exit(hermes_boot.main(["/opt/hermes/docker/boot"]))
    pid = 0
    while not pid:
        pid, status = os.waitpid(child, os.WNOHANG)
        if counter[8]:
            counter[8] = 0
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.001)
    status = os.waitstatus_to_exitcode(status)
    return status, int.from_bytes(counter[:8], "little")

def tree():
    found = {}
    for top in (HOME, SCANDIR, "/etc/passwd", "/etc/group"):
        for path, folders, files in os.walk(top) if os.path.isdir(top) else [(top, [], [])]:
            for name in {path, *(os.path.join(path, entry) for entry in files + folders)}:
                status = os.lstat(name)
                data = open(name).read() if os.path.isfile(name) and not name.endswith("container-boot.log") else ""
                found[name] = [status.st_uid, status.st_gid, oct(status.st_mode), data]
    return found

def visible():
    # what is in place is whole, at any moment: old or new, never half
    halves = []
    for name in (".env", "config.yaml", "SOUL.md", "auth.json"):
        path = f"{HOME}/{name}"
        if os.path.exists(path) and open(path).read() != SEEN[path][3]:
            halves.append(path)
    for name in ("passwd", "group"):
        if open("/etc/" + name).read() not in (open("/srv/" + name).read(), REMAPPED, SEEN["/etc/" + name][3]):
            halves.append(name)
    return halves

for name in ("passwd", "group"):
    shutil.copy2("/etc/" + name, "/srv/" + name)
fresh()
boot()  # hands the static services over, which fresh() does not undo
fresh()
status, total = boot()
SEEN.update(tree())
# between the remap and the home that follows HERMES_HOME
accounts = [line + b"\n" for line in open("/srv/passwd", "rb").read().splitlines()]
REMAPPED = b"".join(hermes_boot.with_field(accounts, b"hermes", {2: 1500, 3: 1501})).decode()
problems = [f"undisturbed boot ended with {status}"] if status else []
for limit in range(1, total + 1):
    fresh()
    status, _ = boot(limit)
    problems += [f"{limit}: not killed but {status}"] * (status != -9)
    problems += [f"{limit}: half written: {halves}" for halves in visible()]
    shutil.rmtree(SCANDIR, ignore_errors=True)  # /run is new at the next boot
    status, _ = boot()
    after = tree()
    if status or after != SEEN:
        both = {path: (after.get(path), SEEN.get(path)) for path in after.keys() | SEEN.keys()}
        problems.append(f"{limit}: {status} {({path: pair for path, pair in both.items() if pair[0] != pair[1]})}")
print(json.dumps([total, problems[:10]]))
"""


@pytest.mark.long
def test_a_boot_killed_at_any_change_is_finished_by_the_next(container):
    """SIGKILL before each change the boot makes to a file: no half-written file is ever in place, and the next boot
    ends in the same tree."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec("/usr/bin/python3", "-IBSc", DRIVER, timeout=240)
    assert done.returncode == 0, done
    total, problems = json.loads(done.stdout.splitlines()[-1])
    assert problems == [] and total > 100
    assert os.path.exists("/etc/passwd")
