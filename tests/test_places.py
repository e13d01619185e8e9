"""Volumes and namespaces that refuse what root may do elsewhere, and the files for Compose and Kubernetes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sandbox import AGENT_VERSION, PROJECT

SLEEPER = "#!/bin/sh\nexec sleep infinity\n"


@pytest.fixture
def refusing(live, tmp_path):
    """Make a volume that refuses chown and shows modes as given, as CIFS, exFAT and many a NAS do; unmounted at the
    end."""
    if not shutil.which("bindfs") or not os.path.exists("/dev/fuse"):
        pytest.skip("needs bindfs and /dev/fuse")
    mounted: list[Path] = []

    def make(permissions: str) -> Path:
        volume, behind = tmp_path / "volume", tmp_path / "behind"
        (behind / "workspace").mkdir(parents=True)
        (behind / "workspace/file").touch()
        volume.mkdir()
        subprocess.run(["bindfs", "--chown-deny", "--chgrp-deny", "-p", permissions, behind, volume], check=True)
        mounted.append(volume)
        return volume

    yield make
    for volume in mounted:
        subprocess.run(["umount", "-l", volume], check=True)


@pytest.mark.sandbox
def test_a_volume_that_refuses_chown_but_can_be_used(refusing, container):
    """One warning, then it goes on: the seeds are there, the gateway is up."""
    refusing("a=rwX")
    box = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent(SLEEPER)
    done = box.run("sh", "-c", "s6-svwait -t 5000 -u /run/service/gateway-default && hermes-boot health && ls SOUL.md")
    assert (done.returncode, done.stdout) == (0, b"healthy: 1 up, 0 not wanted\nSOUL.md\n"), done.stderr.decode()
    assert done.stderr.count(b"could not be given to 10000:10000, the first: ") == 1 and b"Traceback" not in done.stderr


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
unshare -U sh -c 'until grep -q . /proc/self/gid_map; do sleep 0.02; done; exec setpriv --reuid 0 --regid 0 --clear-groups "$@"' sh "$@" &
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


# Compose and Kubernetes

COMPOSE, KUBERNETES, WORKFLOW = (
    PROJECT / name for name in ("compose.yaml", "docs/kubernetes.yaml", ".github/workflows/image.yaml")
)
CAPABILITIES = {"CHOWN", "SETUID", "SETGID", "DAC_OVERRIDE", "FOWNER", "KILL"}


def test_the_compose_file_fits_the_image():
    """The image's version, its entrypoint left alone, more time to stop than the gateways take, no secret in it."""
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"hermes", "dashboard"}
    for service in services.values():
        assert (
            service["image"] == "hermes-agent"
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
        ("readinessProbe", ["health"]),
    ):
        assert hermes[probe]["exec"]["command"] == ["/opt/hermes/bin/hermes-boot", *words]
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
