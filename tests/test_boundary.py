"""What root keeps from hermes in every mode, and what hermes cannot hold up: a boot, a command of an operator's, the
end."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import termios
import threading
import time

import pytest
from conftest import RUN, busy
from sandbox import PROJECT, WRAPPER, wait_for, write_script

INIT = ("/init", WRAPPER)
SERVICES = pytest.mark.parametrize("entrypoint", [(), INIT], ids=["s6-overlay", "fallback init"])
SCANDIR = "/run/service"


def modes(box, *paths: str) -> list[str]:
    """Return mode, owner and group of paths in a container."""
    return box.exec("stat", "-c", "%a %U %G", *paths).stdout.splitlines()


# The scandir


@SERVICES
def test_what_is_roots_in_the_scandir_stays_so(gateways, entrypoint):
    """hermes publishes, removes and controls gateways there, and moves and replaces nothing else."""
    host = gateways({"coder": RUN}, "running", entrypoint=entrypoint)
    for action in ("unregister", "register", "stop", "start", "restart"):
        assert host.do(action, "-p", "coder", user="hermes").returncode == 0, action
    assert modes(host.box, SCANDIR, f"{SCANDIR}/.s6-svscan", f"{SCANDIR}/.s6-svscan/control") == [
        "1775 root hermes",
        "755 root root",
        "620 root hermes",
    ]
    static = f"{SCANDIR}/dashboard"
    assert modes(host.box, f"{static}/supervise", f"{static}/supervise/control", f"{static}/event/") == [
        "711 root root",
        "620 root hermes",
        "3730 root hermes",
    ]
    assert modes(host.box, f"{SCANDIR}/main-hermes/supervise/control") == ["600 root root"]
    for words in (["/command/s6-svc", "-r", static], ["/command/s6-svwait", "-t", "5000", "-u", static]):
        assert host.box.exec(*words, user="hermes").returncode == 0, words
    refused = [f"mv {name} x" for name in ("dashboard", "main-hermes", ".s6-svscan")]
    refused += ["rm .s6-svscan/finish", "echo x >.s6-svscan/crash", "mv .s6-svscan/control x", "rm -r dashboard"]
    refused += ["/command/s6-svc -d main-hermes", "mkfifo dashboard/supervise/new", "rm dashboard/supervise/control"]
    if not entrypoint:
        refused += ["mv s6-linux-init-shutdownd x", "echo x >.s6-svscan/SIGTERM"]
    for command in refused:
        assert host.box.exec("sh", "-c", f"cd {SCANDIR} && {command}", user="hermes").returncode, command
    started = time.monotonic()
    assert host.box.stop() == 143 and time.monotonic() - started < 5 * busy()


@SERVICES
def test_without_gateways_hermes_has_nothing_of_s6s_but_the_dashboards_control(container, entrypoint):
    """HERMES_RECONCILE=0: s6-svscan, the oneshot runner's socket and event/ are root's alone."""
    box = container(environment={"HERMES_RECONCILE": "0"}, entrypoint=entrypoint)
    box.start("sleep", "infinity")
    found = box.exec("find", "/run/", "-writable", "!", "-type", "l", user="hermes").stdout.split()
    assert [path for path in found if not path.endswith("s6rc-oneshot-runner/s") and path != "/run/lock"] == []
    for words in (
        ["s6-svscanctl", "-t", SCANDIR],
        ["s6-svscanctl", "-an", SCANDIR],
        ["s6-svc", "-d", f"{SCANDIR}/main-hermes"],
    ):
        assert box.exec(f"/command/{words[0]}", *words[1:], user="hermes").returncode, words
    runner = "/run/s6-rc/servicedirs/s6rc-oneshot-runner/s"
    assert box.exec("/command/s6-sudo", "-e", runner, "up", "0", user="hermes").returncode
    assert box.exec("/command/s6-svc", "-r", f"{SCANDIR}/dashboard", user="hermes").returncode == 0
    assert box.exec("hermes-boot", "health", user="hermes").returncode == 0


FLOOD = "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY)\nwhile True:\n    os.write(fd, b'u' * 4096)\n"


@SERVICES
@pytest.mark.parametrize("reconcile", ["1", "0"])
def test_who_floods_a_static_service_does_not_hold_up_the_end(container, reconcile, entrypoint):
    """The command ends, and so does the container, with its code: s6-rc waits for the dashboard for 5 seconds."""
    box = container(environment={"HERMES_RECONCILE": reconcile}, entrypoint=entrypoint)
    box.start("sh", "-c", "until [ -e /opt/data/end ]; do sleep 0.1; done; exit 7")
    control = f"{SCANDIR}/%s/supervise/control"
    argv = ["/usr/bin/python3", "-IBSc", FLOOD]
    assert box.exec(*argv, control % "main-hermes", user="hermes").returncode == 1
    floods = [subprocess.Popen(box.exec_command([*argv, control % "dashboard"], "hermes")) for _ in range(2)]
    time.sleep(0.5)
    assert [flood.poll() for flood in floods] == [None, None]
    box.exec("touch", "/opt/data/end")
    try:
        assert box.process.wait(30) == 7
    finally:
        for flood in floods:
            flood.kill()
            flood.wait()


LOCK = """import fcntl, sys, time
file = open(sys.argv[1])
for lock in fcntl.flock, fcntl.lockf:
    lock(file, fcntl.LOCK_SH)
time.sleep(100)
"""


@SERVICES
def test_hermes_cannot_lock_what_s6_rc_waits_for(container, entrypoint):
    """s6-rc takes a lock before it ends anything, and waits for that without a limit."""
    box = container(entrypoint=entrypoint)
    box.start("sleep", "infinity")
    argv = ["/usr/bin/python3", "-IBSc", LOCK, "/run/s6-rc/lock"]
    holder = subprocess.Popen(box.exec_command(argv, "hermes"), stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.5)
        assert box.stop() == 143
    finally:
        holder.kill()
        holder.wait()


def test_doctor_takes_nothing_in_the_scandir_for_the_volumes(gateways):
    """A folder of root's stays root's, whatever its name."""
    host = gateways({}, "running")
    host.box.exec("sh", "-c", f"cd {SCANDIR} && mkdir -p gateway-x/supervise .x && touch gateway-x/run")
    assert host.box.exec("hermes-boot", "doctor", "--fix").returncode in (0, 1)
    assert modes(host.box, *(f"{SCANDIR}/{name}" for name in ("gateway-x", "gateway-x/run", ".x"))) == [
        "755 root root",
        "644 root root",
        "755 root root",
    ]


# /run and the environment


@SERVICES
def test_only_root_and_hermes_read_the_containers_environment(gateways, entrypoint):
    """Whose group follows a remap; a gateway has it all the same."""
    secrets = {"SOME_API_KEY": "k-1", "HERMES_GID": "1234"}
    host = gateways(
        {"coder": "echo $SOME_API_KEY >$folder/key\n" + RUN}, "running", environment=secrets, entrypoint=entrypoint
    )
    assert wait_for(lambda: (host.folder("coder") / "key").exists())
    assert wait_for(lambda: (host.folder("coder") / "key").read_text() == "k-1\n")
    path = "/run/s6/container_environment"
    assert modes(host.box, path, f"{path}/SOME_API_KEY") == ["750 root hermes", "640 root hermes"]
    script = (
        "import os\nos.setgroups([]); os.setgid(33); os.setuid(33)\nopen('/run/s6/container_environment/SOME_API_KEY')"
    )
    assert "PermissionError" in host.box.exec("/usr/bin/python3", "-IBSc", script).stderr
    for user in ("hermes", None):
        assert host.box.exec("cat", f"{path}/SOME_API_KEY", user=user).stdout == "k-1\n"


def test_an_environment_that_is_kept_is_no_more_open(container):
    """S6_KEEP_ENV=1, for which s6-overlay has a folder of its own."""
    box = container(environment={"S6_KEEP_ENV": "1", "SOME_API_KEY": "k-1"})
    box.start("sleep", "infinity")
    script = (
        "import os\nos.setgroups([]); os.setgid(33); os.setuid(33)\nos.execlp('grep', 'grep', '-rsl', 'k-1', '/run')"
    )
    assert box.exec("/usr/bin/python3", "-IBSc", script).stdout == ""


DEEP = """import os, sys
for path in "/run/service/x", "/run/s6-rc:x/servicedirs/dashboard/event/x":
    os.makedirs(path); os.chdir(path)
    for _ in range(3000): os.mkdir("deep"); os.chdir("deep")
os.chdir("/")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.overlay
@pytest.mark.sandbox
def test_what_hermes_has_left_in_a_run_that_is_kept_stops_no_start(container):
    """By an engine that restarts a container; s6-overlay cannot remove what is too deep, and would end with 111."""
    done = container(first=("/usr/bin/python3", "-c", DEEP, *INIT)).run("echo", "done")
    assert (done.returncode, done.stdout) == (0, b"done\n"), done.stderr[-1000:]


@pytest.mark.sandbox
def test_a_run_that_everybody_may_write_becomes_roots(container):
    """As an emptyDir is, and s6-overlay makes it; what hermes has put there does not count."""
    planted = "mkdir -p /run/s6/container_environment && echo /opt/data/bin >/run/s6/container_environment/PATH"
    script = f'chmod 777 /run; {planted}; chown -R 10000 /run/s6; exec "$@"'
    box = container(entrypoint=("/bin/sh", "-c", script, "sh", *INIT))
    box.start("sleep", "infinity")
    assert modes(box, "/run", "/run/s6", "/run/s6/container_environment") == [
        "755 root root",
        "755 root root",
        "750 root hermes",
    ]
    assert "/opt/data/bin" not in box.exec("cat", "/run/s6/container_environment/PATH").stdout
    assert box.exec("mv", "/run/s6", "/run/x", user="hermes").returncode


@pytest.mark.sandbox
def test_a_variable_whose_name_cannot_be_a_files_is_left_out_with_a_line(container):
    """And the rest is there."""
    box = container(environment={".": "x", "a/b": "y", "n" * 256: "z", "A": "1\n"}, entrypoint=INIT)
    done = box.run("/command/with-contenv", "sh", "-c", 'echo "$A"')
    assert (done.returncode, done.stdout) == (0, b"1\n\n"), done
    said = done.stderr.decode()
    assert "warning: the variable . cannot be a file's name" in said and said.count("cannot be a file's name") == 3


SYSTEM = "/usr/local/bin:/usr/bin:/bin"
PATHS = {
    f"/opt/data/bin:{SYSTEM}": {},
    "/usr/bin:/opt/data/bin:/bin": {},
    f".:{SYSTEM}": {},
    f":{SYSTEM}": {},
    f"/srv/../opt/data/x:{SYSTEM}": {},
    f"/srv/home/bin:{SYSTEM}": {"HERMES_HOME": "/srv/home"},
    "/opt/data/bin:/usr/bin:/bin ": {"HERMES_HOME": "/srv/home/profiles/a"},
}
LOADED = {
    "LD_LIBRARY_PATH": ["/opt/data/lib", "/usr/lib:/opt/data/lib", "/usr/lib:", "lib"],
    "LD_PRELOAD": ["/opt/data/x.so", "libm.so.6 /opt/data/x.so"],
    "LD_AUDIT": ["/opt/data/x.so"],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "user, entrypoint", [(None, ()), (10000, ()), (None, INIT)], ids=["root", "hermes", "fallback init"]
)
def test_a_folder_of_the_volume_before_the_systems_is_refused(container, path, user, entrypoint):
    """In one line, before s6-overlay runs a program by its name as root."""
    box = container(environment={"PATH": path} | PATHS[path], user=user, entrypoint=entrypoint)
    done = box.run("true")
    assert (done.returncode, done.stdout) == (1, b""), done
    assert done.stderr.startswith(b"init: fatal: PATH has ") and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize("name, value", [(name, value) for name, values in LOADED.items() for value in values])
def test_a_library_of_the_volume_is_refused(container, name, value):
    """Root would load it with each of its programs. Others are the operator's to give."""
    done = container(environment={name: value}, entrypoint=INIT).run("true")
    assert done.returncode == 1 and f"init: fatal: {name} has '".encode() in done.stderr, done


def test_other_libraries_are_the_operators_to_give(container):
    """A GPU's, or an allocator; without root all of them."""
    given = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib:/usr/lib", "LD_PRELOAD": "libm.so.6"}
    done = container(environment=given).run("printenv", "LD_PRELOAD")
    assert (done.returncode, done.stdout) == (0, b"libm.so.6\n"), done
    assert container(environment={"LD_LIBRARY_PATH": "/opt/data/lib"}, user=10000).run("true").returncode == 0


@SERVICES
def test_a_folder_of_the_volume_after_the_systems_is_not(gateways, entrypoint):
    """People keep tools there. Root finds s6's programs before them, and a gateway the image's `hermes`, though this
    PATH has got neither."""
    path = f"{SYSTEM}:/opt/data/bin:/opt/data/x"
    host = gateways({}, "running", environment={"PATH": path}, entrypoint=entrypoint)
    assert host.box.exec("cat", "/run/s6/container_environment/PATH").stdout == f"/command:{path}\n"
    assert wait_for(lambda: host.starts("default")), host.box.log()


# Processes that hermes stops


STOP = r"""
import os, signal, sys
print("ready", flush=True)
while True:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = open(f"/proc/{name}/cmdline").read()
            if "finish" in line or sys.argv[1] not in line:  # a gateway's own finish is hermes's affair
                continue
            if os.stat(f"/proc/{name}").st_uid == os.getuid() and int(name) != os.getpid():
                while True:
                    os.kill(int(name), signal.SIGSTOP)
        except OSError:
            pass
"""
COMMANDS = ("status", "doctor", "health", "gateway status", "gateway restart -p coder", "gateway register -p new")


def stopper(box, pattern: str) -> subprocess.Popen:
    """Let hermes stop whatever runs as hermes with this in its command line, as long as it lives."""
    argv = box.exec_command(["/usr/bin/python3", "-IBSc", STOP, pattern], "hermes")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.long
def test_a_lock_of_hermess_does_not_keep_a_gateway_from_an_operator(gateways):
    """Who can read a slot can lock it, sealed too: after the time that any command takes, a stop goes on."""
    host = gateways({"a": RUN}, "running", environment={"HERMES_SEALED": "1", "HERMES_GATEWAY_STOP_TIMEOUT": "1"})
    assert wait_for(lambda: host.up("a"))
    lock = "import fcntl, os, time; fcntl.flock(os.open('/run/service/gateway-a', 0), 2); print('held', flush=True)"
    argv = host.box.exec_command(["/usr/bin/python3", "-IBSc", f"{lock}; time.sleep(600)"], "hermes")
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        done = host.do("stop", "-p", "a")
        holder.kill()
    assert (done.returncode, done.stdout) == (0, "a: stopped\n"), done
    assert "warning: a: somebody has locked its slot for 16 s, longer than any command; going on" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("sealed", ["0", "1"])
def test_a_command_of_roots_ends_though_hermes_stops_it(gateways, sealed):
    """It is woken many times, which may be enough, then killed, and one line says so. A restart takes a second."""
    drains = "trap 'sleep 1; exit 0' TERM\nwhile :; do sleep 0.05; done\n"
    host = gateways({"coder": drains}, "running", environment={"HERMES_SEALED": sealed})
    (host.volume / "profiles/new").mkdir()
    (host.volume / "profiles/new/SOUL.md").touch()
    process, ended = stopper(host.box, "hermes-boot"), 0
    try:
        for number, command in enumerate(COMMANDS * 20):
            if number >= 3 * len(COMMANDS) and ended:
                break
            done = host.box.exec("hermes-boot", *command.split(), timeout=30)
            said = done.stderr.count("error: what ran as hermes was stopped by somebody")
            assert said == 0 or (said, done.returncode) == (1, 1), done
            ended += said
    finally:
        process.kill()
        process.wait()
    assert ended >= 1
    # by a name that the stopper, which outlives `docker exec`, does not look for
    done = host.box.exec("/opt/hermes/docker/hermes_boot.py", "gateway", "restart", "-p", "coder")
    assert done.returncode == 0, done


def test_a_boot_goes_on_though_somebody_stops_it(container, tmp_path):
    """As a process of hermes's UID can that shares the PID namespace: what takes long is ended, and the rest goes
    on."""
    for number in range(400):
        (tmp_path / f"volume/profiles/p{number}").mkdir(parents=True)
        (tmp_path / f"volume/profiles/p{number}/SOUL.md").touch()
    box = container()
    box.start("sleep", "infinity")
    process, said = stopper(box, "docker/boot"), ""
    try:
        for _ in range(20):
            if "was stopped by somebody" not in said:
                done = box.exec("/opt/hermes/docker/boot")
                assert done.returncode == 0, done
                said += done.stderr
    finally:
        process.kill()
        process.wait()
    assert said.count("was stopped by somebody") >= 1, said


WAIT = r"""
import os, signal, sys, time
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot as boot
def stop_now_and_then():
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGSTOP)
    return 3
def stop_for_ever():
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)
owner, started = boot.account(), time.monotonic()
codes = [boot.as_owner(owner, stop_now_and_then), boot.as_owner(owner, stop_for_ever)]
print([*codes, boot.as_owner(owner, time.sleep, 60, timeout=1)])
print(time.monotonic() - started < 5, boot.descendants(os.getpid()))
"""


def test_what_became_hermes_is_woken_and_has_a_deadline(container):
    """A stop is undone; for who is stopped all the time, or takes too long, there is SIGKILL and a line."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec("/usr/bin/python3", "-IBSc", WAIT)
    assert done.stdout == "[3, 124, 124]\nTrue []\n" and done.stderr.count("so it was ended") == 2, done


# What helpers leave


CHAIN = r"""#!/usr/bin/python3 -IBS
import os, signal, time
def stop_the_boot():
    while True:
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if b"02-reconcile" in open(f"/proc/{name}/cmdline", "rb").read():
                    os.kill(int(name), signal.SIGSTOP)
            except OSError:
                pass
def forks_for_ever():
    while True:
        if os.fork():
            os._exit(0)
        os.setsid()
if os.fork() == 0:
    for path in (1, 2):
        os.close(path)
    for _ in range(800):  # each waits for the next one
        if os.fork():
            signal.pause()
    stop_the_boot()
for _ in range(8):
    if os.fork() == 0:
        for path in (1, 2):
            os.close(path)
        forks_for_ever()
time.sleep(1)
"""


@pytest.mark.sandbox
@SERVICES
def test_nothing_that_a_helper_left_is_alive_after_it(container, entrypoint):
    """A chain of 800 processes, of which the last stops the reconciler, and eight that fork for ever."""
    box = container(environment={"HERMES_BUNDLED_SKILLS": "/srv"}, entrypoint=entrypoint)
    write_script(box.upper / "opt/hermes/tools/skills_sync.py", "")
    write_script(box.upper / "opt/hermes/.venv/bin/python", CHAIN)
    started = time.monotonic()
    done = box.run("sh", "-c", "find /proc -path '/proc/[0-9]*/cmdline' -user hermes -exec cat {} \\; -exec echo \\;")
    left = done.stdout.decode().replace("\0", " ").splitlines()
    assert time.monotonic() - started < 40 * busy() and any(line.startswith("find ") for line in left), done
    assert b"profile=default prior_state=none action=registered" in done.stderr, done
    assert [line for line in left if "python" in line] == [], left


# The terminal


STOP_OUTPUT = """
import termios
termios.tcflow(2, termios.TCOOFF)
"""


def run_on_terminal(box, *words: str) -> tuple[int, bytes]:
    """Run a container on a terminal that somebody reads; return its code and what was written."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(box.command(list(words)), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 4096):
                said.extend(part)
        except OSError:
            pass  # the other side is closed

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(30)
    finally:
        process.kill()
        process.wait()
    reader.join(5)
    os.close(ours)
    return code, bytes(said)


@pytest.mark.sandbox
@SERVICES
def test_a_command_that_stops_the_terminals_output_does_not_hold_up_the_end(container, entrypoint):
    """Lines of ours give up after a second, and the end sets it going."""
    box = container(entrypoint=entrypoint)
    write_script(box.upper / "etc/cont-finish.d/99-say", "#!/bin/sh\necho at the end >&2\n")
    code, said = run_on_terminal(box, "/usr/bin/python3", "-IBSc", STOP_OUTPUT + "import os\nos._exit(9)")
    assert code == 9 and b"at the end" in said, said


@pytest.mark.sandbox
@SERVICES
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_command_that_a_signal_ends_on_a_stopped_terminal(container, entrypoint, name):
    """The shell that started it says nothing of that there."""
    end = f"import os, signal\nos.kill(os.getpid(), signal.{name})\n"
    code, _ = run_on_terminal(container(entrypoint=entrypoint), "/usr/bin/python3", "-IBSc", STOP_OUTPUT + end)
    assert code == 128 + getattr(signal, name)


@pytest.mark.sandbox
@SERVICES
def test_a_helper_that_stops_the_terminals_output_does_not_hold_up_the_boot(container, entrypoint):
    """Nor does it keep the command from writing."""
    box = container(environment={"HERMES_BUNDLED_SKILLS": "/srv"}, entrypoint=entrypoint)
    write_script(box.upper / "opt/hermes/tools/skills_sync.py", "")
    write_script(box.upper / "opt/hermes/.venv/bin/python", f"#!/usr/bin/python3 -IBS\n{STOP_OUTPUT}")
    code, said = run_on_terminal(box, "echo", "from the command")
    assert code == 0 and b"from the command" in said, said


def test_a_line_on_a_stopped_terminal_is_given_up_and_all_lines_together_take_a_second():
    """Then it flows again, and so do the lines."""
    ours, theirs = os.openpty()
    script = """
import hermes_boot, sys, time
started = time.monotonic()
for number in range(50):
    hermes_boot.warn(number)
print(time.monotonic() - started, flush=True)
sys.stdin.read(1)
hermes_boot.warn("again")
"""
    argv = ["python3", "-BSc", script]
    termios.tcflow(theirs, termios.TCOOFF)
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, cwd=PROJECT)
    assert 0.9 < float(process.stdout.readline()) < 5
    termios.tcflow(theirs, termios.TCOON)
    process.communicate(b"x", timeout=20)
    assert b"warning: again" in os.read(ours, 4096)


# The end


NO_FORK = r"""
import os, sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
def refuse(*_):
    raise OSError(11, "Resource temporarily unavailable")
os.fork = os.posix_spawn = os.posix_spawnp = refuse
sys.exit(hermes_boot.main(["10-hermes-shutdown"]))
"""


def test_the_end_needs_no_further_process(gateways):
    """As under a limit on these that hermes has reached: the gateways are told, and waited for."""
    host = gateways(
        {"a": "trap 'sleep 1; touch $folder/drained; exit 0' TERM\nwhile :; do sleep 0.05; done\n"}, "running"
    )
    assert wait_for(lambda: host.up("a"))
    host.box.exec("rm", "/run/hermes-command")  # the command goes on, and so does the container
    done = host.box.exec("/usr/bin/python3", "-IBSc", NO_FORK)
    assert done.returncode == 0 and (host.folder("a") / "drained").exists(), done
    assert stat.S_ISREG((host.folder("a") / "drained").stat().st_mode)


ALONE = r"""
import os, sys
sys.path.insert(0, "/opt/hermes/docker")
import hermes_boot
def refuse():
    raise OSError(11, "Resource temporarily unavailable")
os.fork = refuse
hermes_boot.own_volume(hermes_boot.Boot(hermes_boot.container_environment()))
"""


def test_owners_are_checked_where_no_further_process_may_be_made(container):
    """As under a limit on these: by one process, all of it, and without a word of trouble."""
    box = container()
    box.start("sleep", "infinity")
    box.exec("sh", "-c", "cd /opt/data/workspace && for n in $(seq 200); do mkdir -p $n/below; done; chown -R 0:0 .")
    done = box.exec("/usr/bin/python3", "-IBSc", ALONE)
    assert done.returncode == 0 and "warning" not in done.stderr, done
    assert box.exec("find", "/opt/data/workspace", "!", "-user", "hermes").stdout == ""
