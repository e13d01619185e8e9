"""HERMES_SEALED=1: nothing that hermes writes is ever executed, or opened for writing, by root.

hermes gets the control FIFOs of its gateways, and what it needs to see them. The first tests show what it can do, then
what it cannot; at the end it does its worst on all of /run while root works there.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from conftest import ROUNDS, RUN
from sandbox import wait_for

SEALED = {"HERMES_SEALED": "1"}
INIT = ("/init", "/opt/hermes/docker/main-wrapper.sh")
# s6-rc's socket is everybody's to open, and answers root alone
WRITABLE = "find /run -writable ! -type l ! -path '/run/s6-rc*/s6rc-oneshot-runner/s' ! -path /run/lock 2>/dev/null"
SERVICES = [(), INIT]


@pytest.fixture(params=SERVICES, ids=["s6-overlay", "fallback init"])
def host(gateways, request):
    """A sealed container with a gateway that runs, coder."""
    host = gateways({"coder": RUN}, "running", environment=SEALED, entrypoint=request.param)
    assert wait_for(lambda: host.up("coder") and host.up("default"))
    return host


def new_profile(host, name: str) -> None:
    """Make a profile as hermes does, at run time."""
    script = (
        f"mkdir -p /opt/data/profiles/{name} && cd /opt/data/profiles/{name} && touch SOUL.md && echo '{RUN}' >does"
    )
    assert host.box.exec("sh", "-c", script, user="hermes").returncode == 0


@pytest.mark.long
def test_hermes_starts_stops_restarts_and_sees_its_gateways(host):
    """And s6's own words for that work too; health and doctor find nothing wrong."""
    for user in ("hermes", None):
        for action, said in (("stop", "stopped"), ("start", "started"), ("restart", "restarted")):
            done = host.do(action, "-p", "coder", user=user)
            assert (done.returncode, done.stdout) == (0, f"coder: {said}\n"), done
    slot = "/run/service/gateway-coder"
    assert host.box.exec("/command/s6-svc", "-d", slot, user="hermes").returncode == 0
    assert wait_for(lambda: host.box.exec("/command/s6-svstat", "-o", "up", slot, user="hermes").stdout == "false\n")
    assert host.do("start", "--all", user="hermes").returncode == 0
    for user in ("hermes", None):
        assert host.box.exec("hermes-boot", "health", user=user).stdout == "healthy: 2 up, 0 not wanted\n"
        assert host.box.exec("hermes-boot", "doctor", user=user).returncode == 0


def test_a_stop_in_a_back_off_and_the_restart_after_it_work(gateways):
    """finish waits as hermes on a FIFO that is root's, and the manager sets its time."""
    host = gateways({"a": "exit 1\n"}, "running", environment=SEALED)
    assert wait_for(lambda: "waiting 2 s" in host.box.log(), 30)
    assert host.do("stop", "-p", "a", user="hermes").returncode == 0
    (host.folder("a") / "does").write_text(RUN)
    assert host.do("start", "-p", "a", user="hermes").returncode == 0
    assert "crash loop" not in host.box.exec("hermes-boot", "status", "-p", "a").stdout


def test_a_container_without_gateways_gives_no_profile_a_slot(container, tmp_path):
    """As an API server beside the one that has them; by root too, who could."""
    (tmp_path / "volume/profiles/a").mkdir(parents=True)
    (tmp_path / "volume/profiles/a/SOUL.md").touch()
    box = container(environment=SEALED | {"HERMES_RECONCILE": "0"})
    box.start("sleep", "infinity")
    for words in (["start", "-p", "a"], ["register", "-p", "a"], ["restart", "--all"]):
        done = box.exec("hermes-boot", "gateway", *words)
        text = "hermes-boot: error: this container has no gateways, since HERMES_RECONCILE is off\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", text)
    assert not any("gateway-" in path.name for path in box.path("/run/service").iterdir())


def test_doctor_on_a_profile_that_is_gone(host):
    """Names what root does, and does not say more at each --fix."""
    host.box.exec("rm", "-r", "/opt/data/profiles/coder")
    before = host.box.log()
    for _ in range(2):
        done = host.box.exec("hermes-boot", "doctor", "--fix")
        assert done.stderr == "" and "`hermes-boot gateway unregister -p coder`" in done.stdout, done
    assert host.do("unregister", "-p", "coder").returncode == 0
    assert host.box.log().startswith(before)


def test_a_profile_gets_its_slot_from_root(host):
    """By register, or by the first start; hermes is told who can."""
    new_profile(host, "new")
    done = host.do("register", "-p", "new", user="hermes")
    assert done.returncode == 1 and "HERMES_SEALED leaves that to root" in done.stderr
    assert not (host.volume / "logs/gateways/new").exists()
    done = host.box.exec("hermes", "-p", "new", "gateway", "start", user="hermes")
    assert done.returncode == 4 and "`hermes-boot gateway register -p new`" in done.stderr
    done = host.box.exec("hermes", "-p", "new", "gateway", "start")
    assert (done.returncode, done.stdout) == (0, "new: registered\nnew: started\n"), done
    assert wait_for(lambda: host.up("new")) and host.state("new")["desired_state"] == "running"
    assert host.do("register", "-p", "new").returncode == 1
    assert wait_for(lambda: host.up("new"))
    done = host.do("unregister", "-p", "new", user="hermes")
    assert done.returncode == 1 and "gateway unregister -p new`" in done.stderr and host.up("new"), done
    done = host.do("start", "-p", "gateway-new")  # a service's name, as everywhere
    assert (done.returncode, done.stdout) == (0, "gateway-new: started\n"), done
    done = host.do("unregister", "-p", "new")
    assert (done.returncode, done.stdout) == (0, "new: unregistered\n"), done
    done = host.do("register", "-p", "new")
    assert (done.returncode, done.stdout) == (0, "new: registered, started\n"), done
    assert host.do("list").stdout == "coder\ndefault\nnew\n"
    for name, code in (("none", 4), ("../x", 2), ("A", 2)):
        assert host.do("register", "-p", name).returncode == code
    assert host.box.exec("find", "/run/service", "-user", "hermes").stdout == ""


def test_doctor_gives_a_missing_slot(host):
    """As root, with --fix."""
    new_profile(host, "new")
    assert host.box.exec("hermes-boot", "doctor").returncode == 1
    host.box.exec("hermes-boot", "doctor", "--fix", user="hermes")
    assert host.do("list").stdout == "coder\ndefault\n"
    done = host.box.exec("hermes-boot", "doctor", "--fix")
    assert done.returncode == 0 and host.do("list").stdout == "coder\ndefault\nnew\n", done


def test_all_in_run_is_roots_and_hermes_may_write_fifos_alone(host):
    """Files, folders and the FIFOs themselves belong to root."""
    new_profile(host, "new")
    assert host.do("register", "-p", "new").returncode == 0
    assert host.box.exec("find", "/run", "-user", "hermes").stdout == ""
    found = host.box.exec("sh", "-c", WRITABLE, user="hermes").stdout.split()
    fifos = {f"gateway-{name}/{path}" for name in ("coder", "default", "new") for path in SLOT_FIFOS}
    assert {path for path in found if "dashboard" not in path} == {f"/run/service/{path}" for path in fifos}
    modes = host.box.exec("stat", "-c", "%a %U %G %F", "/run/service/gateway-coder/supervise/control").stdout
    assert modes == "620 root hermes fifo\n"


SLOT_FIFOS = ("supervise/control", "log/supervise/control", "back-off")


def test_the_state_at_a_boot_counts_as_ever(gateways):
    """What was stopped stays so, also where the command is `gateway run`; bad profiles cost nobody else theirs."""
    host = gateways({"a": RUN, "b": RUN}, "running", environment=SEALED)
    assert wait_for(lambda: host.up("a")) and host.do("stop", "-p", "a", user="hermes").returncode == 0
    (host.volume / "profiles/Bad").mkdir()
    (host.volume / "profiles/no-soul").mkdir()
    host.box.restart()
    assert wait_for(lambda: host.up("b") and host.up("default")) and not host.up("a")
    log = (host.volume / "logs/container-boot.log").read_text().splitlines()[-5:]
    assert [" ".join(line.split()[1:4]) for line in log] == [
        "profile=default prior_state=running action=started",
        "profile=Bad prior_state=none action=skipped",
        "profile=a prior_state=stopped action=registered",
        "profile=b prior_state=running action=started",
        "profile=no-soul prior_state=none action=skipped",
    ]


def test_the_end_is_graceful(gateways):
    """The gateways get SIGTERM and their time, though root has told them as hermes."""
    does = "trap 'sleep 1; touch $folder/drained; exit 0' TERM\nwhile :; do sleep 0.05; done\n"
    host = gateways({"a": does}, "running", environment=SEALED)
    assert wait_for(lambda: host.up("a"))
    host.box.stop()
    assert (host.folder("a") / "drained").exists()


def test_without_root_one_line_says_that_nothing_is_sealed(container):
    """As docs/kubernetes.yaml has it."""
    box = container(environment=SEALED, user=10000)
    os.makedirs(box.volume)
    os.chown(box.volume, 10000, 10000)
    done = box.run("true")
    assert done.returncode == 0 and b"warning: HERMES_SEALED seals nothing here: without root" in done.stderr


def test_another_scandir_cannot_be_sealed(container):
    """Who owns a folder above it could put another in its place."""
    done = container(environment=SEALED | {"S6_PROFILE_GATEWAY_SCANDIR": "/opt/data/slots"}).run("true")
    assert done.returncode == 1 and b"HERMES_SEALED cannot seal S6_PROFILE_GATEWAY_SCANDIR" in done.stderr


@pytest.mark.sandbox
def test_the_mode_of_the_container_counts_and_not_a_commands(gateways):
    """`docker exec -e HERMES_SEALED=` switches nothing on or off."""
    host = gateways({}, environment=SEALED)
    new_profile(host, "new")
    done = host.box.exec("hermes-boot", "gateway", "register", "-p", "new", environment={"HERMES_SEALED": "0"})
    assert done.returncode == 1
    host.box.environment.pop("HERMES_SEALED")
    host.box.restart()
    done = host.box.exec("hermes-boot", "gateway", "unregister", "-p", "new", environment=SEALED)
    assert done.returncode == 0
    done = host.box.exec("hermes-boot", "gateway", "register", "-p", "new", environment=SEALED)
    assert done.returncode == 0
    assert host.box.exec("stat", "-c", "%U", "/run/service/gateway-new/run").stdout == "hermes\n"


def test_what_hermes_says_to_root_is_checked(gateways):
    """hermes is played by a boot whose reconciler asks for anything: no name but a profile's becomes a slot."""
    host = gateways({}, environment=SEALED)
    done = host.box.exec("/usr/bin/python3", "-IBSc", LIAR)
    assert (done.returncode, done.stdout) == (0, "['gateway', 'fine', 'start', '0']\n"), done
    slots = host.box.exec("ls", "-A", "/run/service").stdout.split()
    assert [name for name in slots if name.startswith(("gateway", ".gateway"))] == ["gateway-default", "gateway-fine"]


LIAR = r"""
import os, sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
def lie(boot, output):
    lines = ["../../etc start", "A start", "x/y log", "-rf start", "", " ", "\0", "\x1b[2J start", "gateway run"]
    lines += ["fine", "fine start"]
    lines += ["n" * 300, "e\u0301 start"]
    os.write(output, "\n".join(lines).encode() + b"\n\xff\xfe\n" + b"start log\n" * 3)
    for _ in range(400):
        os.write(output, b"0\n" * 4096)
    return 0
boot = hermes_boot.Boot(hermes_boot.container_environment())
code, wanted = hermes_boot.asked_by_hermes(boot, lie)
print([*wanted])
hermes_boot.publish_for_hermes(boot, {name: wanted[name] for name in ("fine",)})
"""


def test_a_root_with_few_capabilities_and_many_pipes_gives_slots(gateways):
    """As engines have it, on a machine where root's processes have more pipes than pipe-user-pages-soft."""
    host = gateways({}, environment=SEALED)
    argv = "setpriv --bounding-set -sys_resource,-sys_admin /usr/bin/python3 -IBSc".split()
    done = host.box.exec(*argv, PIPES)
    assert (done.returncode, done.stdout) == (0, "{'fine': (True, False)}\n"), done


PIPES = r"""
import os, resource, sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
pipes = [os.pipe() for _ in range(1100)]
boot = hermes_boot.Boot(hermes_boot.container_environment())
def ask(boot, output):
    hermes_boot.ask_for(output, "fine", start=True, to_folder=False)
    return 0
print(hermes_boot.asked_by_hermes(boot, ask)[1])
"""


# The attack

ATTACK = r"""
import errno, glob, itertools, json, os, random, subprocess, sys, time
least, spared, watched = int(sys.argv[1]), tuple(sys.argv[2:]), "/srv/watched/secret"
done, tools, letters = set(), "/opt/data/tools", b"abcdhiknopqrtuxyDORUQ12"
os.makedirs(tools, exist_ok=True)
for name in ("sh", "s6-setuidgid", "s6-envdir", "sleep", "python3", "rm", "cat", "id"):
    with open(f"{tools}/{name}", "w") as file:
        file.write("#!/usr/bin/python3\nimport os\nopen('/opt/data/ran', 'a').write(f'{os.getuid()}\\n')\n")
    os.chmod(f"{tools}/{name}", 0o755)
os.chdir(tools)

def attempt(action, *arguments, **options):
    try:
        action(*arguments, **options)
    except OSError:
        return
    done.add(f"{action.__name__} {arguments[:2]}")

def write(path):
    if path.endswith(spared):
        return
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    if os.fstat(fd).st_mode & 0o170000 != 0o010000:
        done.add(f"opened {path}")
    else:
        os.write(fd, bytes(random.choices(letters, k=50)))
    os.close(fd)

def attack(path, number):
    away = path + ".away"
    for _ in range(3):
        try:
            write(path)
        except OSError:
            pass
    attempt(os.rename, path, away)
    attempt(os.unlink, path)
    attempt(os.chmod, path, 0o777)
    attempt(os.symlink, watched, away)
    attempt(os.link, path, away)
    attempt(os.utime, path, (0, 0))
    attempt(os.truncate, path, 0)
    attempt(os.mkdir, f"{path}/new")
    attempt(os.mkfifo, f"{path}/fifo")
    attempt(os.symlink, watched, f"{path}/ftrig1:@{number:032x}"[: len(path) + 40])
    attempt(os.symlink, f"{tools}/sh", f"{path}/run")
    attempt(os.rename, f"{tools}/sh", f"{path}/sh")

def is_roots(process):
    try:
        with open(f"/proc/{process}/status") as file:
            return "\nUid:\t0\t0\t0\t0\n" in file.read()
    except OSError:
        return False

def signal_root(process, number):
    os.kill(process, number)
    if not is_roots(process):
        raise OSError("it has become hermes's in the meantime")

rounds, paths = 0, []
while not os.path.exists("/srv/stop"):
    if rounds % 50 == 0:
        paths = ["/run", "/run/hermes-command", *glob.glob("/run/s6*/**", recursive=True)]
        paths += glob.glob("/run/service/**", recursive=True)
        paths += glob.glob("/run/service/.*") + glob.glob("/run/service/.s6-svscan/*")
        services = "dashboard", "main-hermes", "s6rc-fdholder"
        paths += [f"/run/s6-rc/servicedirs/{name}/supervise/control" for name in services]
        for process in filter(is_roots, filter(str.isdigit, os.listdir("/proc"))):
            attempt(signal_root, int(process), 0)
            attempt(signal_root, int(process), 19)
    for path in random.sample(paths, min(4, len(paths))):
        attack(path, rounds)
    rounds += 1
    if rounds == least:
        print(rounds, flush=True)
print(json.dumps(sorted(done)), flush=True)
"""
WATCH = r"""
import hashlib, json, os
seen = {}
def look(path):
    status = os.lstat(path)
    data = open(path, "rb").read() if os.path.isfile(path) and not os.path.islink(path) else b""
    seen[path] = [status.st_uid, status.st_gid, status.st_mode, hashlib.sha256(data).hexdigest()]
tops = "/srv/watched", "/run/service", "/run/s6-rc/servicedirs", "/run/s6/basedir", "/run/s6/container_environment"
for top in (*tops, "/etc"):
    for path, folders, files in os.walk(top):
        for name in [path, *(os.path.join(path, entry) for entry in files + folders)]:
            changing = name.rpartition("/")[2] in ("status", "status.new", "death_tally", "lock", "state", "down")
            if not changing and not os.path.basename(path).startswith("."):
                try:
                    look(name)
                except FileNotFoundError:
                    pass  # s6-supervise's, for as long as it writes a file anew
print(json.dumps(seen))
"""
ROOT_AT_WORK = (
    "hermes-boot reconcile",
    "hermes-boot gateway register -p other",
    "hermes-boot status",
    "hermes-boot doctor --fix",
    "hermes-boot health",
    "hermes-boot gateway unregister -p other",
    "hermes -p coder gateway restart",
)


@pytest.mark.parametrize("entrypoint", SERVICES, ids=["s6-overlay", "fallback init"])
def test_hermes_at_its_worst_gets_nothing_of_roots(gateways, entrypoint):
    """Renames, links, letters and signals in all of /run while root registers, reconciles and diagnoses. Nothing
    succeeds but letters to its own services; root's files and processes are what they were, PID 1 cannot be signalled,
    nothing of hermes's ran as root, and the container ends as ever."""
    host = gateways(
        {"coder": RUN}, "running", environment=SEALED | {"HERMES_GATEWAY_STOP_TIMEOUT": "2"}, entrypoint=entrypoint
    )
    box = host.box
    new_profile(host, "other")
    box.exec("sh", "-c", "mkdir -p /srv/watched && echo secret >/srv/watched/secret && chmod 600 /srv/watched/secret")
    before = json.loads(box.exec("/usr/bin/python3", "-IBSc", WATCH).stdout)
    argv = box.exec_command(["/usr/bin/python3", "-IBSc", ATTACK, str(ROUNDS)], "hermes")
    agent = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.set_blocking(agent.stdout.fileno(), False)
    try:
        while not agent.stdout.readline() and agent.poll() is None:
            for command in ROOT_AT_WORK:
                assert "Traceback" not in box.exec("sh", "-c", command).stderr
    finally:
        box.exec("touch", "/srv/stop")
    os.set_blocking(agent.stdout.fileno(), True)
    said, errors = agent.communicate(timeout=60)
    assert (said.splitlines()[-1:], errors) == (["[]"], "")
    done = box.exec("hermes-boot", "gateway", "unregister", "-p", "other")  # which hermes may have kept from it in time
    assert done.returncode in (0, 4), done
    after = json.loads(box.exec("/usr/bin/python3", "-IBSc", WATCH).stdout)
    assert {
        path: (before.get(path), after.get(path))
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path)
    } == {}
    assert not (host.volume / "ran").exists()
    assert box.stop() in (0, 143)


def test_the_same_attack_is_a_real_one(gateways):
    """In the default mode, where the slots are hermes's, it writes what root runs. (It could end the container too.)"""
    host = gateways({"coder": RUN}, "running")
    host.box.exec("mkdir", "-p", "/srv")
    argv = host.box.exec_command(["/usr/bin/python3", "-IBSc", ATTACK, "1000", ".s6-svscan/control"], "hermes")
    agent = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert agent.stdout.readline() == "1000\n", agent.communicate(timeout=60)
    host.box.exec("touch", "/srv/stop")
    got = json.loads(agent.communicate(timeout=60)[0])
    assert any(line.startswith("opened /run/service/gateway-") for line in got), got
