"""Volumes and namespaces that refuse what root may do elsewhere, and the files for Compose and Kubernetes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import busy
from sandbox import AGENT_VERSION, ENTRYPOINT, PROJECT, WRAPPER, wait_for

SLEEPER = "#!/bin/sh\nexec sleep infinity\n"


@pytest.fixture
def bindfs(live) -> None:
    """Skip where a volume cannot be served by bindfs."""
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("needs bindfs and /dev/fuse")


@pytest.fixture
def refusing(bindfs, tmp_path):
    """Make a volume that refuses chown and shows modes as given, as CIFS, exFAT and many a NAS do; unmounted at the
    end."""
    mounted: list[Path] = []

    def make(permissions: str, *options: str) -> Path:
        volume, behind = tmp_path / "volume", tmp_path / "behind"
        (behind / "workspace").mkdir(parents=True)
        (behind / "workspace/file").touch()
        volume.mkdir()
        words = ["bindfs", "--chown-deny", "--chgrp-deny", "-p", permissions, *options, behind, volume]
        subprocess.run(words, check=True)
        mounted.append(volume)
        return volume

    yield make
    for volume in mounted:
        subprocess.run(["umount", "-l", volume], check=True)


@pytest.mark.sandbox
def test_a_volume_that_refuses_chown_but_can_be_used(refusing, container):
    """One warning, then it goes on: the seeds are there, the gateway is up. A mode that stays is not called fixed."""
    refusing("a=rwX")
    box = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(SLEEPER)
    words = "s6-svwait -t 5000 -u /run/service/gateway-default && hermes-boot health && ls SOUL.md"
    words += "; hermes-boot doctor --fix"
    done = box.run("sh", "-c", words)
    assert done.stdout.startswith(b"healthy: 1 up, 0 not wanted\nSOUL.md\n"), done.stderr.decode()
    assert b"default: could not be fixed: the mount gives its files this mode" in done.stderr, done.stderr.decode()
    assert done.stderr.count(b"could not be given to 10000:10000, the first: ") == 1 and b"Traceback" not in done.stderr


CHATTY = "#!/bin/sh\nfor n in $(seq 3000); do echo line $n of many; done\nexec sleep infinity\n"


@pytest.mark.sandbox
def test_a_volume_whose_owner_is_the_mounts(refusing, container):
    """All there is root's by the mount's word, as on CIFS without uid=, so hermes and s6-log may chmod nothing:
    the gateway runs, and its log goes to the container's alone."""
    refusing("a=rwX", "-u", "root", "-g", "root")
    box = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(CHATTY)
    box.start("sleep", "infinity")
    assert wait_for(lambda: "line 3000 of many" in box.log(), 20), box.log()
    assert "so its log goes to the container's alone" in box.log() and "s6-log: fatal" not in box.log()
    assert box.exec("hermes-boot", "health").returncode == 0
    assert box.exec("hermes", "gateway", "stop").stdout == "default: stopped\n"
    done = box.exec("hermes-boot", "doctor", "--fix")
    assert "could not be fixed: Operation not permitted" in done.stderr and "HERMES_UID=0" not in done.stdout, done


@pytest.mark.sandbox
def test_a_log_of_another_owner(container, tmp_path):
    """On a group 0 volume, OpenShift's: only a file's owner may change its mode, as s6-log does."""
    logs = tmp_path / "volume/logs/gateways/default"
    logs.mkdir(parents=True)
    (logs / "current").touch()
    for path in (tmp_path / "volume", *(tmp_path / "volume").rglob("*")):
        path.chmod(0o2770 if path.is_dir() else 0o660)
        os.chown(path, 1000650000, 0)
    box = container(user=1000660000, gid=0, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(CHATTY)
    box.start("sleep", "infinity")
    assert wait_for(lambda: "line 3000 of many" in box.log(), 20), box.log()
    assert "logs/gateways/default cannot be used (Operation not permitted), so its log goes to" in box.log()


@pytest.mark.sandbox
def test_a_volume_that_refuses_chown_and_cannot_be_used(refusing, container):
    """Fatal, with the owner seen and the owner needed."""
    refusing("u=rwX:go=rX")
    done = container().run("true")
    assert done.returncode == 1
    assert (
        b"/opt/data cannot be written by hermes (10000:10000): Permission denied; it belongs to 0:0, mode 0755"
        in done.stderr
    )


def test_a_user_namespace_without_subordinate_ids(container):
    """Rootless with one UID alone: root there cannot become hermes, which is one line."""
    box = container()
    box.start("sleep", "infinity")
    box.exec("rm", "-f", "/run/hermes-setup.failed")
    done = box.exec("unshare", "-U", "-r", "/opt/hermes/docker/hermes_boot.py", "setup")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "fatal: root cannot become hermes (10000:10000) here: Operation not permitted; add the capabilities"
        in done.stderr
    )
    assert "or give a rootless engine subordinate IDs (/etc/subuid, /etc/subgid)" in done.stderr


MAPPED = """
unshare -U sh -c 'until grep -q . /proc/self/gid_map; do sleep 0.02; done
exec setpriv --reuid 0 --regid 0 --clear-groups "$@"' sh "$@" &
for map in uid_map gid_map; do until echo 0 0 65536 2>/dev/null >/proc/$!/$map; do sleep 0.02; done; done
wait $!
"""


def test_a_user_namespace_that_maps_hermes(container, tmp_path):
    """Rootless with subordinate UIDs: what belongs to nobody there is one warning, all else is mended."""
    box = container()
    box.start("sleep", "infinity")
    for name, owner in (("stranger", 70000), ("roots", 0)):
        file = tmp_path / "volume/workspace" / name
        file.touch()
        os.chown(file, owner, owner)
    done = box.exec("sh", "-c", MAPPED, "sh", "/opt/hermes/docker/hermes_boot.py", "setup")
    assert done.returncode == 0, done
    assert (
        "warning: 1 entries on /opt/data could not be given to 10000:10000, the first: /opt/data/workspace/stranger: "
        in done.stderr
    )
    assert [(tmp_path / "volume/workspace" / name).stat().st_uid for name in ("stranger", "roots")] == [70000, 10000]


def test_a_home_below_a_folder_that_root_may_not_enter(container, tmp_path):
    """As on NFS with root_squash, where root is nobody: hermes finds its home there, and only it is asked."""
    box = container(environment={"HERMES_HOME": "/opt/data/share/home"})
    box.start("sleep", "infinity")
    share = tmp_path / "volume/share"
    os.chown(share, 10000, 70000)  # a group that is not mapped, so root there has no right but anybody's
    share.chmod(0o700)
    (share / "home/SOUL.md").unlink()
    setup = ["sh", "-c", MAPPED, "sh", "/opt/hermes/docker/hermes_boot.py", "setup"]
    done = box.exec(*setup)
    assert done.returncode == 0 and (share / "home/SOUL.md").exists(), done
    (share / "home").rename(share / "gone")
    done = box.exec(*setup)
    line = "fatal: HERMES_HOME='/opt/data/share/home' does not exist; mount a volume there, or correct it\n"
    assert done.returncode == 1 and done.stderr.endswith(line), done


# Compose and Kubernetes

COMPOSE, KUBERNETES, WORKFLOW = (
    PROJECT / name for name in ("compose.yaml", "docs/kubernetes.yaml", ".github/workflows/image.yaml")
)
CAPABILITIES = {"CHOWN", "SETUID", "SETGID", "DAC_OVERRIDE", "FOWNER", "KILL"}


def test_the_compose_file_fits_the_image():
    """The image by a variable, its entrypoint left alone, more time to stop than the gateways take, no secret in it."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"hermes", "dashboard"}
    for service in services.values():
        assert (
            service["image"] == "${HERMES_IMAGE:-hermes-agent}"
            and "entrypoint" not in service
            and "init" not in service
        )
        assert (
            "mem_limit" in service and service["env_file"] == ["hermes.env"] and "data:/opt/data" in service["volumes"]
        )
        assert set(service["cap_add"]) == CAPABILITIES and service["cap_drop"] == ["ALL"]
    hermes = services["hermes"]
    assert int(hermes["stop_grace_period"].rstrip("s")) > int(hermes["environment"]["HERMES_SHUTDOWN_TIMEOUT"])
    assert hermes["healthcheck"]["test"][1:] == ["/opt/hermes/bin/hermes-boot", "health"]
    assert not re.search(r"(?i)(key|token|password):", COMPOSE.read_text())


def test_the_kubernetes_file_fits_the_image():
    """The strictest security context, probes, and more time to end than the gateways take."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    (_, stateful) = yaml.safe_load_all(KUBERNETES.read_text())
    pod = stateful["spec"]["template"]["spec"]
    (hermes,) = pod["containers"]
    timeout = next(
        int(variable["value"]) for variable in hermes["env"] if variable["name"] == "HERMES_SHUTDOWN_TIMEOUT"
    )
    assert pod["terminationGracePeriodSeconds"] > timeout
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10000
    assert (
        hermes["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        and hermes["securityContext"]["readOnlyRootFilesystem"]
    )
    assert {mount["mountPath"] for mount in hermes["volumeMounts"]} == {"/opt/data", "/run", "/tmp"}
    for probe, words in (
        ("startupProbe", ["health", "--live"]),
        ("livenessProbe", ["health", "--live"]),
    ):
        assert hermes[probe]["exec"]["command"] == ["/opt/hermes/bin/hermes-boot", *words]
    assert "readinessProbe" not in hermes  # a pod that is not ready is never updated
    assert hermes["image"] == f"hermes-agent:{AGENT_VERSION}" and "command" not in hermes


FROM_PYPI = [
    ("kubernetes-validate", "--strict", KUBERNETES),
    ("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE),
    ("check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW),
    ("hadolint", "--config", PROJECT / ".hadolint.yaml", PROJECT / "Dockerfile"),
]


@pytest.mark.parametrize("validator", FROM_PYPI, ids=["Kubernetes", "Compose", "GitHub Actions", "Dockerfile"])
def test_the_published_schemas_and_rules_accept_them(validator):
    """Where the validator is installed, as it is in CI."""
    if not shutil.which(validator[0]):
        (pytest.fail if os.environ.get("HERMES_TEST_REQUIRE_LIVE") else pytest.skip)(
            f"{validator[0]} is not installed; it is on PyPI"
        )
    accepts(validator)


@pytest.mark.parametrize(
    "validator",
    [("docker", "compose", "-f", COMPOSE, "config", "-q"), ("docker", "build", "--check", PROJECT)],
    ids=["compose", "build"],
)
def test_docker_accepts_them(validator):
    """Docker's own word, where it answers."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers")
    accepts(validator)


def accepts(validator: tuple) -> None:
    """Run a validator, which finds nothing."""
    done = subprocess.run(validator, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What the program gets of the container's places


@pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])
def test_stdio_can_be_opened_by_name(container, entrypoint):
    """Pipes are hermes's, as engines make them with --user: `tee /dev/stderr`."""
    script = "echo out | tee /dev/stderr; echo err >/dev/stderr; cat </dev/stdin >/dev/stdout"
    done = container(entrypoint=entrypoint).run("sh", "-c", script, input=b"words\n")
    assert (done.returncode, done.stdout) == (0, b"out\nwords\n"), done.stderr.decode()
    assert done.stderr.endswith(b"out\nerr\n"), done.stderr.decode()


@pytest.mark.sandbox
def test_a_terminal_can_be_opened_by_name(container):
    """It is hermes's too, and its group stays."""
    import pty

    ours, theirs = pty.openpty()
    before = os.fstat(theirs)
    argv = container().command(["sh", "-c", "stat -Lc %u /dev/stdin; echo opened >/dev/stderr"])
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs)
    assert process.wait(60) == 0
    assert os.fstat(theirs).st_gid == before.st_gid
    assert os.read(ours, 65536).decode().replace("\r", "").endswith("10000\nopened\n")


@pytest.mark.parametrize("words", [["hermes", "x"], [WRAPPER, "hermes", "x"]])
@pytest.mark.sandbox
def test_a_call_in_a_running_container_keeps_its_stdio(container, words):
    """It is the caller's, perhaps root's own terminal."""
    box = container()
    box.put_agent("#!/bin/sh\nstat -Lc %u /dev/stdin\n")
    box.start("sleep", "infinity")
    assert box.exec("sh", "-c", f"echo | {' '.join(words)}").stdout == "0\n"


PORTS = {"tcp://10.96.0.10:9119": "9119", "0": "9119", "65536": "9119", "x": "9119", "9120": "9120", "": "9119"}


@pytest.mark.parametrize("port", PORTS)
def test_the_dashboards_port_is_a_number(container, port):
    """Kubernetes' service links set HERMES_DASHBOARD_PORT for a service of that name: one line, and the default."""
    box = container(environment={"HERMES_DASHBOARD": "1", "HERMES_DASHBOARD_PORT": port})
    box.put_agent('#!/bin/sh\necho "started: $*" >&2\nexec sleep infinity\n')
    box.start("sleep", "infinity")
    assert wait_for(lambda: f"started: dashboard --host 127.0.0.1 --port {PORTS[port]} " in box.log()), box.log()
    line = f"HERMES_DASHBOARD_PORT={port!r} is not a number from 1 to 65535; using 9119\n"
    assert box.log().count(line) == (PORTS[port] != port != "")


KEEP_ID = """
unshare -U sh -c 'until grep -q . /proc/self/gid_map; do sleep 0.02; done; exec "$@"' sh "$@" &
for map in uid_map gid_map; do until echo 1000 0 1 2>/dev/null >/proc/$!/$map; do sleep 0.02; done; done
wait $!
"""


def test_rootless_podmans_keep_id_is_told_its_way(container):
    """Where UIDs are mapped, what fits is named; where they are not, it is not."""
    box = container()
    box.start("sleep", "infinity")
    done = box.exec("sh", "-c", KEEP_ID, "sh", "/opt/hermes/docker/hermes_boot.py", "setup")
    assert done.returncode == 1 and "started as UID 1000, which is not hermes's" in done.stderr, done
    assert done.stderr.endswith("; with rootless Podman: --userns=keep-id:uid=10000,gid=10000\n"), done.stderr
    done = box.exec("setpriv", "--reuid=1000", "--clear-groups", "/opt/hermes/docker/hermes_boot.py", "setup")
    assert done.returncode == 1 and "keep-id" not in done.stderr and "started as UID 1000" in done.stderr


@pytest.mark.sandbox
def test_doctor_on_a_volume_as_kubernetes_leaves_it(container, tmp_path):
    """With fsGroup root keeps it, and the group is hermes's: what hermes can use is right."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    volume.chmod(0o2775)
    os.chown(volume, 0, 10000)
    done = container(user=10000, gid=10000).run("hermes-boot", "doctor")
    assert done.returncode == 0 and b"pass  owners: " in done.stdout and b" owner: " not in done.stdout, done


@pytest.mark.parametrize("mode, level", [(0o660, "pass"), (0o640, "fail")])
@pytest.mark.sandbox
def test_doctor_on_a_group_0_volume(container, tmp_path, mode, level):
    """OpenShift's UID: what it can use by its group is right, whoever owns it; what it cannot is not."""
    volume = tmp_path / "volume"
    (volume / "sessions").mkdir(parents=True)
    (volume / "sessions/old").touch()
    (volume / "sessions/old").chmod(mode)
    (volume / "sessions").chmod(0o2770)
    volume.chmod(0o2775)
    for path in (volume, volume / "sessions", volume / "sessions/old"):
        os.chown(path, 10000, 0)
    box = container(user=1000650000, gid=0)
    done = box.run("hermes-boot", "doctor")
    (line,) = (line for line in done.stdout.decode().splitlines() if " owner" in line)
    assert line.startswith(f"{level}  owners: "), done.stdout.decode()
    assert level == "pass" or "/opt/data/sessions/old belongs to 10000:0" in line


# Strangers, and what an image's layers refuse


@pytest.mark.parametrize("words", [["gateway", "stop"], ["gateway", "restart"], ["gateway", "start", "--all"]])
def test_another_user_may_not_control_gateways(container, words):
    """`docker exec -u 1234`: one line, at once, and nothing is recorded."""
    box = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(SLEEPER)
    box.start("sleep", "infinity")
    slot = "/run/service/gateway-default"
    assert box.exec("/command/s6-svwait", "-t", "10000", "-u", slot).returncode == 0
    before = (box.volume / "gateway_state.json").read_bytes()
    drop = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
    done = box.exec(*drop, "/opt/hermes/bin/hermes", *words, timeout=10)
    line = "hermes-boot: error: default: UID 1234 may not control it; run this as hermes or root\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert (box.volume / "gateway_state.json").read_bytes() == before
    assert box.exec("/command/s6-svstat", "-o", "up", slot).stdout == "true\n"


def test_another_user_gets_no_advice_for_the_volume(container):
    """`docker exec -u 1234` has root's group, which is not OpenShift's way here."""
    box = container()
    box.start("sleep", "infinity")
    box.volume.chmod(0o700)
    done = box.exec("setpriv", "--reuid=1234", "--regid=0", "--clear-groups", "/opt/hermes/bin/hermes-boot", "status")
    line = "hermes-boot: fatal: UID 1234 cannot read /opt/data; run this as hermes or root\n"
    assert done.returncode == 1 and done.stderr == line, done


def test_a_capability_that_is_missing_is_named(container):
    """With what falls without it."""
    box = container()
    box.start("sleep", "infinity")
    for name, what in (("kill", "nothing of hermes's can be stopped"), ("chown", "no gateway runs")):
        done = box.exec("setpriv", f"--bounding-set=-{name}", "/opt/hermes/docker/hermes_boot.py", "setup")
        assert f"warning: root lacks {name.upper()}, so {what}; add it with --cap-add\n" in done.stderr, done


def test_folders_of_a_lower_layer_are_removed(live, tmp_path):
    """`docker commit` keeps /run/service, however much is in it. What somebody has mounted there stays."""
    for name in ("lower/scandir/a/b/c/d/e", "lower/mounted/a/b", "upper", "work", "root"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/scandir/a/b/file").touch()
    script = """
mount -t tmpfs tmpfs "$1/upper"; mkdir "$1/upper/upper" "$1/upper/work"
mount -t overlay overlay -o "lowerdir=$1/lower,upperdir=$1/upper/upper,workdir=$1/upper/work" "$1/root"
mount --bind "$1/root/scandir" "$1/root/mounted/a/b"
python3 -ISc '
import sys; sys.path.insert(0, sys.argv[2]); import hermes_boot, os
with hermes_boot.Folder(sys.argv[1]) as root:
    try: root.remove("mounted")
    except OSError as error: print(error.errno, os.listdir(sys.argv[1] + "/mounted/a/b/a"))
    root.remove("scandir")
print(os.listdir(sys.argv[1]))' "$1/root" "$2"
"""
    argv = ["unshare", "-m", "sh", "-ec", script, "sh", tmp_path, PROJECT]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stdout == "16 ['b']\n['mounted']\n", done


TELLS = "trap ': >/tmp/told-{0}; exit 0' TERM; : >/tmp/ready-{0}; while :; do sleep 0.05; done"


@pytest.mark.sandbox
def test_the_end_does_not_wait_for_a_volume_that_does_not_answer(bindfs, container, tmp_path):
    """Gateways and command are told at once, though whoever serves the volume has stopped."""
    volume, behind = tmp_path / "volume", tmp_path / "behind"
    volume.mkdir()
    behind.mkdir()
    server = subprocess.Popen(["bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0", behind, volume])
    try:
        assert wait_for(lambda: os.path.ismount(volume))
        box = container(volume=volume, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
        box.put_agent(f"#!/bin/sh\n{TELLS.format('gateway')}\n")
        box.start("sh", "-c", TELLS.format("command"))
        ready, told = ([box.path(f"/tmp/{what}-{who}") for who in ("gateway", "command")] for what in ("ready", "told"))
        assert wait_for(lambda: all(map(os.path.exists, ready)))
        server.send_signal(signal.SIGSTOP)
        box.signal(signal.SIGTERM)
        assert wait_for(lambda: all(map(os.path.exists, told)), 5 * busy())
    finally:
        server.kill()  # what waits for it goes on
        server.wait()
        subprocess.run(["umount", "-l", volume], check=True)
