"""What only a real image can show: capabilities, a read-only root, login shells, what is written at run time. Needs
an engine."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
from conftest import ON_ENGINE
from engine import engine, image
from sandbox import AGENT_VERSION, ENTRYPOINT, wait_for, write_script

pytestmark = pytest.mark.skipif(not ON_ENGINE, reason="needs a real image: make test-engine")
SLEEPER = "#!/bin/sh\nexec sleep infinity\n"
UP = "s6-svwait -t 5000 -u /run/service/gateway-default && hermes-boot health"
CAPABILITIES = ("CHOWN", "SETUID", "SETGID", "DAC_OVERRIDE", "FOWNER", "KILL")


@pytest.fixture
def hermes(container):
    """Make containers whose default gateway runs."""

    def make(**options):
        box = container(
            environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"} | options.pop("environment", {}), **options
        )
        box.put_agent(SLEEPER)
        return box

    return make


def without(*missing: str) -> tuple[str, ...]:
    """Return the engine's options for the capabilities that README lists, some of them missing."""
    return (
        "--cap-drop",
        "ALL",
        *(word for name in CAPABILITIES if name not in missing for word in ("--cap-add", name)),
    )


def test_six_capabilities_are_enough(hermes, tmp_path):
    """As compose.yaml gives them: ownership is mended, hermes is dropped to, the gateway runs."""
    (tmp_path / "volume/workspace").mkdir(parents=True)
    (tmp_path / "volume/workspace/file").touch(0o600)
    done = hermes(options=(*without(), "--security-opt", "no-new-privileges")).run(
        "sh", "-c", f"id -u; stat -c %u workspace/file; {UP}"
    )
    assert (done.returncode, done.stdout) == (0, b"10000\n10000\nhealthy: 1 up, 0 not wanted\n"), done.stderr.decode()
    assert b"warning" not in done.stderr


# capability: the command, its exit code, what is said without it
FALLS = {
    "CHOWN": (UP, 1, "init: fatal: root lacks CHOWN, so it cannot take /run; add it with --cap-add"),
    "SETUID": (UP, 1, "fatal: root lacks SETUID; add with --cap-add, or start with `--user 10000:10000`"),
    "SETGID": (UP, 1, "fatal: root lacks SETGID; add with"),
    "DAC_OVERRIDE": (UP, 1, "fatal: root lacks DAC_OVERRIDE; add with"),
    "FOWNER": (UP, 0, "warning: 1 entries on /opt/data could not be given to 10000:10000, the first: /opt/data/.env"),
}


@pytest.mark.parametrize("capability", FALLS)
def test_what_falls_without_a_capability(hermes, tmp_path, capability):
    """One line says it."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/.env").touch(0o400)
    command, code, said = FALLS[capability]
    done = hermes(options=without(capability)).run("sh", "-c", command)
    err = done.stderr.decode()
    assert done.returncode == code and said in err and "Traceback" not in err, f"{done.returncode}\n{err}"


def test_without_kill_a_gateway_goes_on_and_the_engine_has_to_kill_the_container(hermes):
    """Root cannot signal hermes's processes, and s6-overlay waits for the last of them."""
    box = hermes(options=without("KILL"))
    box.start("sleep", "infinity")
    assert wait_for(lambda: box.exec("sh", "-c", UP).stdout == "healthy: 1 up, 0 not wanted\n", 20), box.log()
    assert box.exec("timeout", "3", "hermes", "gateway", "stop").returncode == 124
    told = box.exec("/command/s6-svstat", "-o", "up,wantedup", "/run/service/gateway-default")
    assert told.stdout == "true false\n"
    assert box.stop(timeout=3) == 137


READ_ONLY = ("--read-only", "--tmpfs", "/run:exec", "--tmpfs", "/tmp")


def test_a_read_only_root_boots(hermes):
    """With an executable /run; a remap there has nothing to write to, and says so."""
    box = hermes(options=READ_ONLY, environment={"S6_READ_ONLY_ROOT": "1"})
    assert box.run("sh", "-c", UP).stdout == b"healthy: 1 up, 0 not wanted\n"
    done = hermes(options=READ_ONLY, environment={"HERMES_UID": "1500"}).run("true")
    assert done.returncode == 1
    assert (
        b"fatal: cannot write /etc/passwd and /etc/group (Read-only file system), which the remap needs;"
        b" make /etc writable" in done.stderr
    )


def test_what_kubernetes_allows_at_its_strictest(hermes, tmp_path):
    """UID 10000, no capabilities, no new privileges, a read-only root, and a /run that is anybody's: full
    supervision."""
    (tmp_path / "volume").mkdir()
    subprocess.run(["chown", "10000:10000", tmp_path / "volume"], check=True)
    options = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp")
    options += ("--tmpfs", "/run:exec,mode=1777")
    box = hermes(user=10000, options=options)
    done = box.run("sh", "-c", f"id -u; {UP}; exit 42")
    assert (done.returncode, done.stdout) == (42, b"10000\nhealthy: 1 up, 0 not wanted\n"), done.stderr.decode()
    assert b"below this init (/run belongs to another user)" in done.stderr


LATE = "#!/bin/sh\nsleep 0.5\necho ready >>/run/order\necho >&3\nexec sleep 1000\n"
SERVICES = {  # files of s6-rc's source definition directories, see s6-rc-compile
    "first": {"type": "oneshot", "up": "redirfd -a 1 /run/order echo first", "dependencies.d/base": ""},
    "late": {"type": "longrun", "run": LATE, "notification-fd": "3", "dependencies.d/first": ""},
    "from": {"type": "longrun", "run": "#!/bin/sh\necho piped\nexec sleep 1000\n", "producer-for": "to"},
    "to": {"type": "longrun", "run": '#!/bin/sh\nexec sed -u "s/^/to: /" >>/run/order\n', "consumer-for": "from"},
    "down": {"type": "oneshot", "up": "", "down": "s6-touch /opt/data/went-down", "dependencies.d/late": ""},
}
SERVICES["from"]["dependencies.d/late"] = SERVICES["to"]["pipeline-name"] = "pipe"


@pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])
def test_a_derived_images_services(container, tmp_path, entrypoint):
    """In the order of their needs, pipelines, `down` scripts, services.d, fix-attrs.d and the hook too: all of that is
    s6-overlay's own, below another PID 1 as well."""
    mounts = []

    def add(path: str, text: str) -> None:
        source = tmp_path / "files" / path.replace("/", "-")
        write_script(source, text)
        mounts.append((str(source), path))

    for name, files in SERVICES.items():
        for file, text in files.items():
            add(f"/etc/s6-overlay/s6-rc.d/{name}/{file}", f"{text}\n" if text else "")
    for name in ("first", "late", "pipe", "down"):
        add(f"/etc/s6-overlay/s6-rc.d/user/contents.d/{name}", "")
    add("/etc/services.d/old/run", "#!/bin/sh\necho old >>/run/order\nexec sleep 1000\n")
    add("/etc/cont-init.d/99-last", "#!/bin/sh\necho cont-init >>/run/order\n")
    add("/etc/fix-attrs.d/10-home", "/srv false hermes 0600 0700\n")
    environment = {"S6_STAGE2_HOOK": "touch /run/hooked"}
    box = container(entrypoint=entrypoint, environment=environment, mounts=tuple(mounts))
    script = "s6-rc-compile 2>/dev/null; [ $? = 100 ] || exit 77; until grep -q old /run/order; do sleep 0.1; done"
    done = box.run("sh", "-c", f"PATH=$PATH:/command; {script}; cat /run/order; ls /run/hooked; stat -c %U /srv")
    if done.returncode == 77:
        pytest.skip("the image's s6-rc is a stand-in")
    order = "cont-init first ready to:piped old /run/hooked hermes"
    assert done.stdout.decode().replace("to: ", "to:").split() == order.split(), done
    assert (box.volume / "went-down").exists()


def test_a_login_shell_finds_hermes_and_s6(hermes):
    """`docker exec -it c bash -l`, and a shell that has nothing of the container's environment, as by ssh."""
    box = hermes()
    box.start("sleep", "infinity")
    for shell in (["bash", "-l"], ["env", "-i", "bash", "-l"]):
        done = box.exec(*shell, "-c", "command -v hermes hermes-boot s6-svc; hermes gateway stop")
        hermes_path, boot_path, s6_path, said = done.stdout.splitlines()
        assert (hermes_path, boot_path, said) == (
            "/opt/hermes/bin/hermes",
            "/opt/hermes/bin/hermes-boot",
            "default: stopped",
        ), done
        assert s6_path in ("/command/s6-svc", "/usr/bin/s6-svc")
        assert box.exec("hermes", "gateway", "start").returncode == 0


def test_a_shell_without_the_environment_knows_the_home_and_hermes_has_its_keys(hermes):
    """As by ssh: $HERMES_HOME is the container's, for people; `hermes` takes the rest, what was given with -e
    included."""
    box = hermes(environment={"HERMES_HOME": "/srv/my home", "SOME_API_KEY": "k-1"})
    box.put_agent(
        '#!/bin/sh\n[ "$1" = chat ] || exec sleep infinity\necho "$HERMES_HOME" "$HOME" "$SOME_API_KEY"; id -un\n'
    )
    box.start("sleep", "infinity")
    done = box.exec("env", "-i", "bash", "-l", "-c", 'echo "$HERMES_HOME" "$VIRTUAL_ENV"; hermes chat')
    assert done.stdout.splitlines() == ["/srv/my home /opt/hermes/.venv", "/srv/my home /srv/my home k-1", "hermes"], (
        done
    )


def test_nothing_is_written_to_the_image_at_run_time(hermes):
    """No bytecode, no caches; the files of accounts only when there is a remap."""
    box = hermes()
    box.start("sleep", "infinity")
    assert box.exec("hermes-boot", "doctor").returncode == 0
    lines = subprocess.run([engine(), "diff", box.name], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [
        line
        for line in lines
        if not line.split()[1].startswith(("/run", "/tmp", "/dev", "/proc", "/sys", "/opt/data", "/etc/mtab"))
    ]
    assert [line for line in ours if ".pyc" in line] == [] and [
        line for line in ours if not line.startswith("C ")
    ] == []


def test_the_image_says_what_it_is():
    """Labels, health check, entrypoint; nothing of the build is left."""
    done = subprocess.run([engine(), "inspect", image()], capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)
    config = found["Config"]
    assert config["Labels"]["org.opencontainers.image.version"] == AGENT_VERSION
    assert config["Entrypoint"] == ["/init", "/opt/hermes/docker/main-wrapper.sh"]
    assert config.get("Healthcheck", {}).get("Test") in (None, ["CMD", "/opt/hermes/bin/hermes-boot", "health"])


def test_the_build_leaves_nothing_behind(hermes):
    """No package lists, no caches, no compiler, no tarball."""
    script = (
        "ls /var/lib/apt/lists /tmp /var/log/apt /root/.cache; ls /opt/hermes/.venv/bin; find / -xdev -name '*.tar.xz'"
    )
    done = hermes().run("sh", "-c", f"({script}) 2>/dev/null")
    words = done.stdout.decode().split()
    assert "hermes" in words and not [word for word in words if word.endswith((".xz", "_Packages", "gcc", "pip:"))], (
        words
    )


def test_the_agent_can_fetch_what_a_platform_needs(hermes):
    """It has pip, and a place on the volume; its own environment is not hermes's to write."""
    script = (
        "touch /opt/hermes/.venv/mine; python -m pip --version"
        " && echo $HERMES_DISABLE_LAZY_INSTALLS $HERMES_LAZY_INSTALL_TARGET"
    )
    done = hermes().run("sh", "-c", script)
    assert (
        b"touch: cannot touch" in done.stderr
        and done.stdout.startswith(b"pip ")
        and done.stdout.endswith(b"\n1 /opt/data/lazy-packages\n")
    )


def restarted(box) -> str:
    """Restart a container as its users do, with all that it has written; return the line of the default gateway at
    the new boot."""

    def lines() -> list[str]:
        return box.exec("cat", "/opt/data/logs/container-boot.log").stdout.splitlines()

    before = len(lines())
    subprocess.run([engine(), "restart", "-t", "10", box.name], capture_output=True, check=True)
    assert wait_for(lambda: len(lines()) > before and box.exec("hermes-boot", "health").returncode == 0)
    return lines()[-1]


def test_a_restart_keeps_what_the_container_wrote(hermes):
    """`docker restart`: the remap is made once, what is left in /run is in nobody's way, what ran runs and what was
    stopped does not."""
    box = hermes(environment={"HERMES_UID": "1500"})
    box.start("sleep", "infinity")
    assert "remap hermes from 10000:10000 to 1500:10000" in box.log()
    assert box.exec("id", "-u", "hermes").stdout == "1500\n"
    accounts = box.exec("stat", "-c", "%i %Y", "/etc/passwd", "/etc/group").stdout
    assert "prior_state=running action=started" in restarted(box)
    assert box.exec("stat", "-c", "%i %Y", "/etc/passwd", "/etc/group").stdout == accounts
    assert box.exec("hermes", "gateway", "stop").stdout == "default: stopped\n"
    assert "prior_state=stopped action=registered" in restarted(box)
    assert box.exec("hermes-boot", "gateway", "status", "-p", "default").returncode == 3


def test_a_container_whose_setup_failed_starts_once_the_volume_is_mended(hermes, tmp_path):
    """That it failed is not remembered against it: `docker start` looks again."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/profiles").mkdir()
    box = hermes(options=(*without("CHOWN"), "--tmpfs", "/run:exec"))  # which is root's
    argv = box.command(["true"])
    assert subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL).returncode == 1
    for path in (tmp_path / "volume", tmp_path / "volume/profiles"):
        os.chown(path, 10000, 10000)
    done = subprocess.run([engine(), "start", "--attach", box.name], capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()


def test_a_stop_reaches_a_gateway_as_sigterm(hermes):
    """And without the capability KILL it does not: that promise alone falls, and the container still ends."""
    for options, drained in (((), True), (without(), True), (without("KILL"), False)):
        box = hermes(options=options, environment={"HERMES_SHUTDOWN_TIMEOUT": "2"})
        box.put_agent("#!/bin/sh\ntrap 'echo drained; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n")
        box.start("sleep", "infinity")
        assert wait_for(lambda: "ready" in box.log())
        box.stop()
        assert ("drained" in box.log()) is drained, box.log()
