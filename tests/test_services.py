"""A derived image's services and scripts, under s6-overlay and below another PID 1: they start and end by s6-overlay's
own scripts in both places, and the gateways start after the last script of /etc/cont-init.d."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sandbox import ENTRYPOINT, wait_for, write_script

import hermes_boot

PLACES = pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])


def service(box, name: str, kind: str, text: str, *needs: str, bundle: str = "user", **files: str) -> Path:
    """Add a service to the image."""
    services = box.upper / "etc/s6-overlay/s6-rc.d"
    folder = services / name
    (folder / ("contents.d" if kind == "bundle" else "dependencies.d")).mkdir(parents=True)
    (folder / "type").write_text(f"{kind}\n")
    for need in needs:
        (folder / ("contents.d" if kind == "bundle" else "dependencies.d") / need).touch()
    if kind == "longrun":
        write_script(folder / "run", text)
    elif kind == "oneshot":
        (folder / "up").write_text(text)
    for file, content in files.items():
        (folder / file.replace("_", "-")).write_text(content)
    if bundle:
        (services / bundle / "contents.d").mkdir(parents=True, exist_ok=True)
        (services / bundle / "contents.d" / name).touch()
    return folder


def note(word: str) -> str:
    """Return an execline script that appends a word to a file."""
    return f'redirfd -a 1 /run/order echo "{word}"\n'


@PLACES
@pytest.mark.sandbox
def test_services_of_a_derived_image_start(container, entrypoint):
    """After the scripts of cont-init.d: s6-overlay's own rc.init starts them, below another PID 1 too."""
    box = container(entrypoint=entrypoint)
    service(box, "first", "oneshot", note("first"), "base", bundle="user2")
    longrun = "#!/bin/sh\nsleep 0.5\necho ready >>/run/order\necho >&3\nexec sleep 1000\n"
    service(box, "late", "longrun", longrun, "base", notification_fd="3\n", down="nothing\n")
    write_script(box.upper / "etc/cont-init.d/99-last", "#!/bin/sh\necho cont-init >>/run/order\n")
    done = box.run("sh", "-c", "cat /run/order; /command/s6-svok /run/service/late")
    assert (done.returncode, done.stdout) == (0, b"cont-init\nfirst\nready\n"), done
    assert b"warning" not in done.stderr, done.stderr.decode()


@PLACES
@pytest.mark.parametrize("strict", ["2", "1"])
@pytest.mark.sandbox
def test_a_service_that_does_not_start(container, entrypoint, strict):
    """With S6_BEHAVIOUR_IF_STAGE2_FAILS=2 the container ends with code 1, else the command runs."""
    environment = {"S6_BEHAVIOUR_IF_STAGE2_FAILS": strict, "S6_VERBOSITY": "1"}
    box = container(entrypoint=entrypoint, environment=environment)
    service(box, "bad", "oneshot", "exit 3\n", "base")
    done = box.run("echo", "command")
    assert b"s6-rc: warning: bad " in done.stderr, done.stderr.decode()
    assert (done.returncode, done.stdout) == ((1, b"") if strict == "2" else (0, b"command\n"))


@PLACES
@pytest.mark.parametrize("on_term", ["", "exit 5"], ids=["a deaf command", "a command that ends"])
@pytest.mark.sandbox
def test_a_service_ends_the_container_with_a_code_of_its_own(container, entrypoint, on_term):
    """As s6-overlay has it: the code in its file, then its `halt`; whatever the command makes of that."""
    box = container(entrypoint=entrypoint, environment={"HERMES_SHUTDOWN_TIMEOUT": "1"})
    results = "/run/s6-linux-init-container-results/exitcode"
    ends = f"until [ -e /tmp/ready ]; do sleep 0.05; done\necho 42 >{results}\n/run/s6/basedir/bin/halt\n"
    service(box, "main", "longrun", f"#!/bin/sh\n{ends}exec sleep 1000\n", "base")
    done = box.run("sh", "-c", f"trap '{on_term}' TERM; touch /tmp/ready; while :; do sleep 0.05; done")
    assert done.returncode == 42, done


@PLACES
@pytest.mark.sandbox
def test_stdin_is_the_commands_alone(container, entrypoint):
    """No service takes a part of it."""
    box = container(entrypoint=entrypoint)
    service(box, "reader", "longrun", "#!/bin/sh\ncat >>/run/read\nexec sleep 1000\n", "base")
    done = box.run("sh", "-c", "sleep 0.5; cat; cat /run/read", input=b"mine\n" * 1000)
    assert (done.returncode, done.stdout) == (0, b"mine\n" * 1000), done.stdout[:100]


@pytest.mark.sandbox
def test_a_start_anew_is_as_good_as_the_first(container):
    """Where /run is kept, what lies there is of the last time."""
    box = container(entrypoint=ENTRYPOINT, mounts=())
    service(box, "twice", "oneshot", note("up"))
    script = "/init /opt/hermes/docker/main-wrapper.sh true && /init /opt/hermes/docker/main-wrapper.sh cat /run/order"
    box.entrypoint = ("/bin/sh", "-c", script)
    done = box.run()
    assert (done.returncode, done.stdout) == (0, b"up\nup\n"), done


@PLACES
@pytest.mark.sandbox
def test_a_boot_script_that_is_not_executable_is_one_line(container, entrypoint):
    """It fails, as any other that fails; it is not skipped in silence."""
    box = container(entrypoint=entrypoint)
    (box.upper / "etc/cont-init.d/50-mine").write_text("#!/bin/sh\n")
    done = box.run("echo", "command")
    assert (done.returncode, done.stdout) == (1, b"")
    lines = [line for line in done.stderr.decode().splitlines() if "50-mine" in line]
    assert len(lines) == 1 and "Permission denied" in lines[0], done.stderr.decode()


# Gateways come after the last boot script

RUNNING = {"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
SLEEPS = "#!/bin/sh\nexec sleep infinity\n"
GATEWAY = "#!/bin/sh\necho $(cat /run/secret 2>&1) >>$HERMES_HOME/gateway-saw\nexec sleep infinity\n"


@PLACES
@pytest.mark.sandbox
def test_scripts_that_sort_after_ours_come_before_every_gateway(container, tmp_path, entrypoint):
    """A user's 50-secrets is in time, slow as it is; with the slots published already."""
    box = container(entrypoint=entrypoint, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(GATEWAY)
    script = "#!/bin/sh\nls -d /run/service/gateway-default >&2\nsleep 1\necho secret >/run/secret\n"
    write_script(box.upper / "etc/cont-init.d/50-secrets", script)
    box.start("sleep", "infinity")
    saw = tmp_path / "volume/gateway-saw"
    assert wait_for(saw.exists, 20) and wait_for(lambda: saw.read_text() == "secret\n", 5)
    assert "/run/service/gateway-default\n" in box.log()


@PLACES
def test_a_reconcile_by_hand_is_taken_up_at_once(container, tmp_path, entrypoint):
    """By either of its names; it is not at the boot that it runs."""
    box = container(entrypoint=entrypoint)
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    for name, command in (
        ("a", ["/opt/hermes/bin/hermes-boot", "reconcile"]),
        ("b", ["/etc/cont-init.d/02-reconcile-profiles"]),
    ):
        (tmp_path / "volume/profiles" / name).mkdir()
        (tmp_path / "volume/profiles" / name / "SOUL.md").touch()
        assert box.exec(*command).returncode == 0
        slot = f"/run/service/gateway-{name}"
        assert wait_for(lambda slot=slot: box.exec("/command/s6-svok", slot).returncode == 0, 5)


# Setup and reconcile in one process


@PLACES
@pytest.mark.sandbox
def test_the_setup_reconciles_too_unless_a_script_comes_between(container, tmp_path, entrypoint):
    """Each profile is reconciled once in either case, and one that a script between the two has made is not missed."""
    box = container(entrypoint=entrypoint)
    assert box.run("true").stderr.decode().count("profile=default ") == 1
    between = "#!/bin/sh\n[ ! -e /run/service/gateway-default ] || exit 1\n"
    between += "mkdir -p /opt/data/profiles/late && touch /opt/data/profiles/late/SOUL.md\n"
    write_script(box.upper / "etc/cont-init.d/01-later", between)
    done = box.run("ls", "-d", "/run/service/gateway-late")
    assert done.returncode == 0, done.stderr.decode()
    assert [done.stderr.decode().count(f"profile={name} ") for name in ("default", "late")] == [1, 1]


@pytest.mark.sandbox
def test_an_earlier_starts_reconcile_does_not_count(container, tmp_path):
    """Where /run outlives the container, what the last setup has left there keeps nobody from reconciling."""
    box = container(entrypoint=("/bin/sh", "-c"))
    start = "/init /opt/hermes/docker/main-wrapper.sh"
    script = "/etc/cont-init.d/01-later"
    make = f"printf '#!/bin/sh\\n' >{script}; chmod +x {script}; mkdir -p /opt/data/profiles/late"
    done = box.run(
        f"{start} true && {make} && touch /opt/data/profiles/late/SOUL.md && {start} ls -d /run/service/gateway-late"
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("last", ["exec", ""], ids=["PID 1", "below another one"])
@pytest.mark.sandbox
def test_what_hermes_leaves_in_run_stops_no_start(container, tmp_path, last):
    """Without root /run is hermes's, and may outlive the container: a FIFO there is waited for by nobody."""
    names = " ".join(f"/run/hermes-{name}" for name in ("command", "supervisor", "setup.failed", "reconciled"))
    (tmp_path / "volume").mkdir()
    os.chown(tmp_path / "volume", 10000, 10000)
    box = container(entrypoint=("/bin/sh", "-c"), user=10000)
    done = box.run(f"mkfifo {names}; {last} /init /opt/hermes/docker/main-wrapper.sh ls /run/service", timeout=20)
    assert done.returncode == 0 and b"gateway-default\n" in done.stdout, done.stderr.decode()


@pytest.mark.parametrize("last", ["exec", ""], ids=["PID 1", "below another one"])
@pytest.mark.sandbox
def test_what_others_have_in_run_stays(container, last):
    """As a folder of the host's, whose name begins as ours do."""
    box = container(entrypoint=("/bin/sh", "-c"))
    make = "mkdir -p /run/hermes-keys && touch /run/hermes-keys/key"
    done = box.run(f"{make}; {last} /init /opt/hermes/docker/main-wrapper.sh ls /run/hermes-keys", timeout=20)
    assert done.returncode == 0 and b"key\n" in done.stdout, done.stderr.decode()


@pytest.mark.sandbox
def test_an_svscan_of_somebodys_own(container):
    """On another scandir, where it makes a folder that hermes cannot look into: gateways come up there at the boot."""
    box = container(environment={"S6_PROFILE_GATEWAY_SCANDIR": "/run/mine"} | RUNNING)
    box.put_agent(SLEEPS)
    svscan = "#!/bin/sh\nmkdir -p /run/mine && s6-svscan /run/mine &\n"
    write_script(box.upper / "etc/cont-init.d/00-svscan", svscan)
    box.start("sleep", "infinity")
    assert wait_for(lambda: box.exec("s6-svstat", "-o", "up", "/run/mine/gateway-default").stdout == "true\n", 10)
    assert box.exec("hermes", "gateway", "restart").stdout == "default: restarted\n"


# An end with nothing to end

ASKED = f"#!/bin/sh\n[ ! -e /run/service/{hermes_boot.ENDING} ] || : >/opt/data/asked\n"
DRAINS = "#!/bin/sh\ntrap 'sleep 1; touch /opt/data/drained; exit 0' TERM\nwhile :; do sleep 0.05; done\n"
UP = "until [ $(/command/s6-svstat -o up /run/service/gateway-default) = true ]; do sleep 0.05; done"
WAITS = "grep -qsx cat /proc/[0-9]*/comm"
# the gateway, the container's environment, its command, and what the end does then
ENDS = {
    "nothing lives": (SLEEPS, {}, "true", False),
    "a gateway": (DRAINS, RUNNING, f"{UP}; sleep 0.3", True),
    "a gateway that was stopped": (SLEEPS, RUNNING, f"{UP}; hermes gateway stop >&2", False),
    "a gateway in its back-off": (
        "#!/bin/sh\nexit 1\n",
        RUNNING,
        f"until {WAITS} && sleep 0.3 && {WAITS}; do :; done",
        True,
    ),
    "a gateway that s6 is about to start": ("#!/bin/sh\nexit 1\n", RUNNING, "sleep 0.6", True),
    "a process of the command's": (SLEEPS, {}, "sleep infinity >/dev/null 2>&1 & sleep 0.1", True),
}


@pytest.mark.overlay
@pytest.mark.sandbox
@pytest.mark.parametrize("agent, environment, command, asked", ENDS.values(), ids=ENDS)
def test_the_end_starts_no_python_where_only_s6_lives(container, agent, environment, command, asked):
    """In every other case it does its work."""
    box = container(environment=environment)
    box.put_agent(agent)
    write_script(box.upper / "etc/cont-finish.d/20-look", ASKED)
    done = box.run("sh", "-c", command)
    assert done.returncode == 0, done.stderr.decode()
    assert (box.volume / "asked").exists() == asked, done.stderr.decode()
    assert (box.volume / "drained").exists() == (agent == DRAINS)
