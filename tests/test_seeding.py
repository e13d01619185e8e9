"""What a volume starts with, what is never overwritten, and the agent's own helpers that the boot runs."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from conftest import ours


def mode(path: Path) -> int:
    """Return a file's permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_a_first_boot_seeds_and_later_ones_never_overwrite(container, tmp_path):
    """Missing files are put in place with their modes, at every boot; what is there stays."""
    box, home = container(), tmp_path / "volume"
    box.run("true")
    seeded = {name: mode(home / name) for name in (".env", "config.yaml", "SOUL.md")}
    assert seeded == {".env": 0o600, "config.yaml": 0o640, "SOUL.md": 0o644}
    (home / "config.yaml").write_text("mine\n")
    (home / ".env").unlink()
    box.run("true")
    assert (home / "config.yaml").read_text() == "mine\n"
    assert (home / ".env").exists() and mode(home / ".env") == 0o600
    assert [path.name for path in home.iterdir() if path.name.endswith(".tmp")] == []


@pytest.mark.sandbox
def test_the_images_templates_win_over_built_in_ones(container, tmp_path):
    """An image that ships templates seeds those."""
    box = container()
    for name, text in ((".env.example", "A=1\n"), ("cli-config.yaml.example", "b: 2\n"), ("docker/SOUL.md", "soul\n")):
        (box.upper / "opt/hermes" / name).write_text(text)
    box.run("true")
    assert [(tmp_path / "volume" / name).read_text() for name in (".env", "config.yaml", "SOUL.md")] == [
        "A=1\n",
        "b: 2\n",
        "soul\n",
    ]


def test_auth_json_and_the_first_state_come_from_the_environment(container, tmp_path):
    """Once: an existing file wins over the variable, and the secret is in no line of ours."""
    environment = {"HERMES_AUTH_JSON_BOOTSTRAP": '{"token": "s3cret"}', "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
    box, home = container(environment=environment), tmp_path / "volume"
    done = box.run("test", "-e", "/run/service/gateway-default/down")
    assert done.returncode == 1  # no `down` file: it starts
    assert (home / "auth.json").read_text() == '{"token": "s3cret"}' and mode(home / "auth.json") == 0o600
    assert b"s3cret" not in done.stderr
    (home / "auth.json").write_text("mine")
    (home / "gateway_state.json").write_text('{"desired_state": "stopped"}')
    assert box.run("test", "-e", "/run/service/gateway-default/down").returncode == 0
    assert (home / "auth.json").read_text() == "mine"


def test_a_wrong_bootstrap_state_is_said_and_ignored(container, tmp_path):
    """It is no reason to stop a boot."""
    done = container(environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "started"}).run("true")
    assert done.returncode == 0 and b"HERMES_GATEWAY_BOOTSTRAP_STATE='started' is ignored" in done.stderr
    assert not (tmp_path / "volume/gateway_state.json").exists()


def test_an_env_file_that_others_can_read_is_only_warned_about(container, tmp_path):
    """A host's compose file may read it."""
    box, home = container(), tmp_path / "volume"
    box.run("true")
    (home / ".env").chmod(0o644)
    done = box.run("true")
    assert b".env on the volume can be read by everyone (mode 0644); run `hermes-boot doctor --fix`" in done.stderr
    assert mode(home / ".env") == 0o644


def test_a_dangling_link_in_a_seeds_place_is_kept(container, tmp_path):
    """A link to a secret that is mounted later is the user's."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/.env").symlink_to("/run/secrets/env")
    assert container().run("true").returncode == 0
    assert os.readlink(tmp_path / "volume/.env") == "/run/secrets/env"


def test_a_volume_that_hermes_cannot_write_ends_the_boot(container, tmp_path):
    """Read-only, it names the owner seen; the program does not run."""
    (tmp_path / "volume").mkdir()
    done = container(user=10000).run("echo", "ran")
    assert (done.returncode, done.stdout) == (1, b"")
    assert (
        b"/opt/data cannot be written by hermes (10000:10000): Permission denied; it belongs to 0:0, mode 0755;"
        b" chown -R 10000:10000 it on the host\n" in done.stderr
    )
    os.chown(tmp_path / "volume", 1234, 1235)
    for mode, verb in ((0o755, b"written"), (0o700, b"read")):
        (tmp_path / "volume").chmod(mode)
        done = container(user=10000).run("echo", "ran")
        assert done.returncode == 1 and re.search(
            b"cannot be %s by hermes .* it belongs to 1234:1235, mode 0%o; drop `--user` and start with"
            b" HERMES_UID=1234 HERMES_GID=1235, or chown -R 10000:10000 it on the host\n" % (verb, mode),
            done.stderr,
        ), done.stderr.decode()


def test_a_home_that_cannot_be_read_or_made_ends_the_boot_with_one_line(container, tmp_path):
    """A folder of somebody else's, and a file where the folder should be."""
    (tmp_path / "volume").mkdir(mode=0o700)
    done = container(user=10000).run("true")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"/opt/data cannot be read by hermes (10000:10000): Permission denied; it belongs to 0:0" in done.stderr
    done = container(environment={"HERMES_HOME": "/etc/passwd"}).run("true")
    (line,) = ours(done.stderr)[-1:]
    assert (
        done.returncode == 1
        and "HERMES_HOME='/etc/passwd' cannot be made: Not a directory; mount a volume there" in line
    )


def test_a_dry_run_lists_and_changes_nothing(container, tmp_path):
    """The plan goes to stdout, being what was asked for."""
    box = container(environment={"HERMES_RECONCILE": "0"})
    box.run("true")
    home = tmp_path / "volume"
    (home / "skills/mine").write_text("x")
    box.start("sleep", "infinity")
    (home / "SOUL.md").unlink()
    os.chown(home / "skills/mine", 0, 10000)
    (home / "skills/mine").chmod(0o660)
    (box.path("/run/s6/container_environment/HERMES_UID")).write_text("1500")
    done = box.exec(
        "sh",
        "-c",
        "cp -a /etc/passwd /tmp; /opt/hermes/docker/hermes_boot.py --dry-run; cmp /etc/passwd /tmp/passwd && echo same",
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["would remap hermes from 10000:10000 to 1500:10000", "would run as 1500:10000"]
    assert re.fullmatch(r"would give (\d+) of \1 entries on /opt/data to 1500:10000", lines[2])
    assert lines[3:] == ["would seed SOUL.md", "would leave the gateways alone, since HERMES_RECONCILE is off", "same"]
    assert not (home / "SOUL.md").exists() and (home / "skills/mine").stat().st_uid == 0


@pytest.mark.sandbox
def test_skills_are_synced_as_hermes(container, tmp_path):
    """With the agent's own tool and the image's bundled skills, when there are any; a failure is a warning."""
    box = container(agent=True)
    skill = box.upper / "opt/hermes/skills/demo/greet"
    skill.mkdir(parents=True)
    (skill / "SKILL.md").write_text("---\nname: greet\ndescription: says hello\n---\nSay hello.\n")
    done = box.run("true")
    assert done.returncode == 0, done.stderr
    copied = tmp_path / "volume/skills/demo/greet/SKILL.md"
    assert copied.stat().st_uid == 10000, done.stderr
    assert b"info: sync the bundled skills" in done.stderr and done.stdout == b""


def test_the_configuration_is_migrated_when_the_image_is_newer(container, tmp_path):
    """By `hermes config migrate`, after a backup, once; not on a fresh volume, not when switched off."""
    home = tmp_path / "volume"
    box = container(agent=True)
    assert b"migrate" not in box.run("true").stderr
    assert (home / ".hermes-agent-version").read_text() == "0.19.0\n"
    (home / ".hermes-agent-version").write_text("0.9.1\n")
    (home / "config.yaml").write_text("_config_version: 1\n")
    (home / ".env").write_text("A=secret\n")
    os.mkfifo(home / "logs/config-migration.log")  # by hermes
    skipped = container(agent=True, environment={"HERMES_SKIP_CONFIG_MIGRATION": "1"}).run("true")
    assert b"migrate" not in skipped.stderr and (home / "config.yaml").read_text() == "_config_version: 1\n"
    done = box.run("true")
    assert done.stdout == b"" and b"migrate the configuration from 0.9.1 to 0.19.0" in done.stderr
    assert "_config_version: 33" in (home / "config.yaml").read_text(), done.stderr
    saved = sorted((home / "backups").iterdir())
    assert [path.name.split(".2")[0] for path in saved] == [".env", "config.yaml"]
    assert [path.read_text() for path in saved] == ["A=secret\n", "_config_version: 1\n"] and {
        mode(path) for path in saved
    } == {0o600}
    assert b"migrate" not in box.run("true").stderr


def test_a_failing_migration_is_a_warning_and_tried_again(container, tmp_path):
    """The boot goes on; the next one tries again."""
    home = tmp_path / "volume"
    box = container(agent=True)
    box.run("true")
    (home / ".hermes-agent-version").write_text("0.9.1\n")
    (home / "config.yaml").unlink()
    (home / "config.yaml").mkdir()
    for _ in range(2):
        done = box.run("echo", "ran")
        assert done.stdout == b"ran\n"
        assert b"default: configuration not migrated, since config.yaml is not a regular file" in done.stderr


@pytest.mark.sandbox
def test_what_a_helper_leaves_behind_ends_with_it(container, tmp_path):
    """The agent's migration runs what it finds on the volume; a process of that cannot stop the reconcile, and so
    the boot."""
    home = tmp_path / "volume"
    home.mkdir()
    (home / ".hermes-agent-version").write_text("0.1\n")
    (home / "config.yaml").touch()
    box = container()
    (box.upper / "opt/hermes/.venv/lib/python3.11/site-packages/hermes_agent-0.19.0.dist-info").mkdir(parents=True)
    stopper = "while :; do pkill -STOP -f 02-reconcile; sleep 0.01; done"
    box.put_agent(
        f"#!/bin/sh\n[ $3 != config ] || setsid setsid sh -c 'touch /tmp/left; {stopper}' >/dev/null 2>&1 &\n"
        "sleep 0.5\n"
    )
    done = box.run("sh", "-c", "ls /tmp/left; ps -eo args", timeout=30)
    assert done.returncode == 0 and b"/tmp/left\n" in done.stdout and b"pkill" not in done.stdout, done
    assert (
        b"profile=default prior_state=none action=registered" in done.stderr and b"migration ended" not in done.stderr
    )
