"""What hermes-agent itself makes at the top of its home, what it needs there, and what image and volume are to each
other."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from image import agent_venv
from sandbox import wait_for, write_script

import hermes_boot

OURS = "/opt/hermes/bin/hermes-boot"
sandbox_only = pytest.mark.sandbox


# What is managed

HOME_CALL = (
    r"\b(?:get_hermes_home\(\)|get_default_hermes_root\(\)|kanban_home\(\)|_?hermes_home|HERMES_HOME)\s*\)?\s*/\s*"
    r"(f?)[\"']([^\"'/{]+)"
)
TWO_GENERATIONS = r"get_hermes_dir\(\s*[\"']([^\"'/]+)[^\"']*[\"'],\s*[\"']([^\"'/]+)"
PACKAGES = "agent acp_adapter cron gateway hermes_cli plugins providers tools tui_gateway".split()
NOT_MADE = {  # names that the agent only reads, or makes elsewhere: on Windows or macOS, in a checkout, on PATH
    *"AppData Applications Library gateway-service hermes-agent optional-mcps optional-skills .cargo go".split(),
    *".brv-cli .hermes pythonw.exe .gateway-launchd-unsupported".split(),
}


@pytest.fixture(scope="session")
def source(live) -> Path:
    """The installed agent's own modules."""
    (folder,) = agent_venv().glob("lib/python3*/site-packages")
    return folder


def test_what_the_agents_source_puts_into_its_home_is_managed(source):
    """Every name that its modules join to the home, found in the source of the version in the image."""
    files = [*source.glob("*.py"), *(file for package in PACKAGES for file in (source / package).rglob("*.py"))]
    found: set[str] = set()
    for file in files:
        text = file.read_text(errors="replace")
        found |= {name for formatted, name in re.findall(HOME_CALL, text) if not formatted}
        found |= {name for pair in re.findall(TWO_GENERATIONS, text) for name in pair}
    assert {"kanban.db", "sandboxes", "state", ".hermes_history", "image_cache", "pastes"} <= found
    assert len(found) > 100
    missing = {
        name
        for name in found - NOT_MADE
        if name not in hermes_boot.MANAGED_TOPS and not hermes_boot.is_managed_file(name)
    }
    assert missing == set()


def test_what_a_person_keeps_there_is_not():
    """Ordinary names are nobody's but their owner's."""
    for name in ("photos", "notes.txt", "notes.tmp", "backup.tar", "my.db", "project", "README.md", "kanban-notes"):
        assert name not in hermes_boot.MANAGED_TOPS and not hermes_boot.is_managed_file(name)


@pytest.mark.long
def test_all_that_a_real_gateway_leaves_follows_a_remap(container, tmp_path):
    """It runs for some seconds as 10000; then the container is made anew as 1500, and nothing is the old one's."""
    volume = tmp_path / "volume"
    box = container(agent=True, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.start("sleep", "infinity")
    assert wait_for(lambda: (volume / "kanban.db").exists() and (volume / "state.db").exists(), 50), box.log()
    box.exec("/opt/hermes/bin/hermes", "profile", "create", "coder")
    box.stop(20)
    made = {path.name for path in volume.iterdir()}
    assert {"kanban.db", "state.db", ".local", ".hermes-agent-version"} <= made
    for name in ("photos", "notes.txt"):
        (volume / name).touch()
    done = container(agent=True, environment={"HERMES_UID": "1500", "HERMES_RECONCILE": "0"}).run("true")
    assert done.returncode == 0, done.stderr
    left = {str(path.relative_to(volume)) for path in volume.rglob("*") if os.lstat(path).st_uid != 1500}
    assert left == {"photos", "notes.txt"}


@sandbox_only
def test_a_stale_install_method_goes(container, tmp_path):
    """Older images wrote `docker` there; any other word stays."""
    file = tmp_path / "volume/.install_method"
    file.parent.mkdir()
    file.write_text("docker\n")
    box = container()
    assert b"remove the stale .install_method" in box.run("true").stderr and not file.exists()
    file.write_text("pip\n")
    box.run("true")
    assert file.read_text() == "pip\n"


# Migration

VERSIONS = (
    "v0.19.0 0.19 0.19.0rc1 0.19.0a1 0.19.0b2 0.19.0.dev3 0.19.0rc1.dev2 0.19.0.post1 0.19.0.post1.dev1 0.19.1rc1"
    " 0.18.9 0.20 1!0.1 0.19.0 0 0.dev1 0.0.0.1 1.0a0 1.0.post0 1.0"
).split()


def test_versions_have_pep_440s_order():
    """As the packaging library has it, each with each."""
    version = pytest.importorskip("packaging.version").Version
    for one, other in itertools.product(VERSIONS, VERSIONS):
        assert hermes_boot.is_newer(one, other) == (version(one) > version(other)), (one, other)
    assert hermes_boot.is_newer("0.0.1.dev0", "") and not hermes_boot.is_newer("no version", "0.1")


@pytest.mark.parametrize("stamp, wanted", [("v0.19.0", False), ("0.19", False), ("0.19.0rc1", True)])
def test_another_spelling_of_the_version_is_no_older_one(container, tmp_path, stamp, wanted):
    """doctor and the boot agree, and after the boot doctor has nothing more to say."""
    box = container(agent=True)
    box.run("true")
    (tmp_path / "volume/.hermes-agent-version").write_text(f"{stamp}\n")
    done = box.run("hermes-boot", "doctor")
    assert (b"migrate the configuration from" in done.stderr) == wanted
    assert b"pass  versions: " in done.stdout


def test_a_configuration_that_is_gone_is_no_older_one(container):
    """The next boot seeds it and has nothing to migrate."""
    done = container(agent=True).run("sh", "-c", "rm /opt/data/config.yaml; hermes-boot doctor")
    assert b"pass  versions: hermes-agent 0.19.0 in the image, 0.19.0 on the volume" in done.stdout, done.stdout


def test_every_profile_with_a_configuration_is_migrated(container, tmp_path):
    """A line each, what the agent says in logs/, a backup beside each; a profile without a config.yaml gets none."""
    volume = tmp_path / "volume"
    for folder in (volume, volume / "profiles/coder", volume / "profiles/writer", volume / "profiles/bare"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "SOUL.md").touch()
        if folder.name != "bare":
            (folder / "config.yaml").write_text("_config_version: 1\n")
    (volume / "active_profile").write_text("coder\n")  # which must not capture the others
    box = container(agent=True)
    done = box.run("true")
    lines = done.stderr.decode().splitlines()
    assert [line.partition(": info: ")[2] for line in lines if "migrated" in line] == [
        f"{name}: configuration migrated" for name in ("default", "coder", "writer")
    ]
    assert len(lines) < 15, done.stderr.decode()
    for folder in (volume, volume / "profiles/coder", volume / "profiles/writer"):
        assert "_config_version: 33" in (folder / "config.yaml").read_text()
        (saved,) = [path for path in (folder / "backups").iterdir() if path.name.startswith("config.yaml.")]
        assert saved.read_text() == "_config_version: 1\n" and saved.stat().st_uid == 10000
    assert not (volume / "profiles/bare/config.yaml").exists()
    assert "33" in (volume / "logs/config-migration.log").read_text()
    assert b"migrate" not in box.run("true").stderr


def test_a_configuration_of_no_version_costs_no_other_its_migration(container, tmp_path):
    """A number that Python takes for none, in the profile before."""
    volume = tmp_path / "volume"
    for name, version in (("a", "1" * 5000), ("b", "1")):
        (volume / "profiles" / name).mkdir(parents=True)
        (volume / "profiles" / name / "SOUL.md").touch()
        (volume / "profiles" / name / "config.yaml").write_text(f"_config_version: {version}\n")
    (volume / "config.yaml").write_text("_config_version: 1\n")
    done = container(agent=True).run("true")
    assert b"b: configuration migrated" in done.stderr and b"Traceback" not in done.stderr, done.stderr
    assert "_config_version: 33" in (volume / "profiles/b/config.yaml").read_text()


def test_a_configuration_that_is_mounted_read_only_is_one_line(container, tmp_path):
    """No backup, no migration, no traceback, at each boot; doctor's way out is one."""
    volume, mounted = tmp_path / "volume", tmp_path / "config.yaml"
    mounted.write_text("_config_version: 1\n")
    subprocess.run(["mount", "--bind", mounted, mounted], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mounted], check=True)
        box = container(agent=True, mounts=((str(mounted), "/opt/data/config.yaml"),))
        for _ in range(2):
            done = box.run("hermes-boot", "doctor")
            said = b"default: configuration not migrated, since config.yaml is mounted by itself and not writable;"
            assert done.stderr.count(said) == 1 and b"Traceback" not in done.stderr
            assert list((volume / "backups").iterdir()) == []
            assert b"config.yaml is mounted read-only: migrate what is mounted, or set HERMES_SKIP" in done.stdout
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def test_a_migration_that_fails_again_makes_no_other_backup(container, tmp_path):
    """An unchanged configuration has one copy, however often the boot tries."""
    volume, failing = tmp_path / "volume", tmp_path / "failing"
    container(agent=True).run("true")
    (volume / ".hermes-agent-version").write_text("0.1\n")
    (volume / "config.yaml").write_text("_config_version: 1\n")
    write_script(failing, "#!/bin/sh\nexit 3\n")
    box = container(agent=True, mounts=((str(failing), "/opt/hermes/.venv/bin/hermes"),))
    for _ in range(2):
        done = box.run("true")
        assert b"default: configuration migration ended with code 3; logs/config-migration.log says why" in done.stderr
    assert len([path for path in (volume / "backups").iterdir() if path.name.startswith("config.yaml.")]) == 1


def test_an_env_file_that_hermes_cannot_read_is_named(container, tmp_path):
    """A mounted secret of root's, with its owner and mode."""
    secret = tmp_path / "env"
    secret.write_text("A=1\n")
    secret.chmod(0o400)
    done = container(mounts=((str(secret), "/opt/data/.env"),)).run("true")
    assert (
        b".env on the volume cannot be read by hermes: it belongs to 0:0, mode 0400; give it to hermes" in done.stderr
    )


@sandbox_only
@pytest.mark.parametrize("number", ["EINVAL", "EBADF", "EOPNOTSUPP"])
def test_a_volume_that_cannot_sync_a_folder_works(container, tmp_path, number):
    """virtiofs, vboxsf, old CIFS: all is seeded, nothing is said; another error still counts."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    box = container()
    box.start("sleep", "infinity")
    for path in ("SOUL.md", "config.yaml"):
        (tmp_path / "volume" / path).unlink()
    inject = ["strace", "-f", "-o", "/tmp/trace", "-P", "/opt/data", "-e"]
    done = box.exec(*inject, f"inject=fsync:error={number}", OURS, "setup")
    assert "INJECTED" in box.path("/tmp/trace").read_text()
    assert done.returncode == 0 and "could not" not in done.stderr and (tmp_path / "volume/SOUL.md").exists()
    (tmp_path / "volume/SOUL.md").unlink()
    assert "SOUL.md could not be seeded" in box.exec(*inject, "inject=fsync:error=EIO", OURS, "setup").stderr


@sandbox_only
def test_doctor_names_a_slow_volume(container):
    """As a network's may be: by the time that a small file takes."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    box = container()
    box.start("sleep", "infinity")
    delay = "inject=fsync:delay_enter=600000"
    done = box.exec("strace", "-f", "-o", "/tmp/trace", "-e", delay, "/opt/hermes/bin/hermes-boot", "doctor")
    slow = r"^warn  volume: writing a file took \d{3,4} ms \(.+\); keep HERMES_HOME on a local volume$"
    assert re.search(slow, done.stdout, re.MULTILINE), done


# Where things are


@sandbox_only
@pytest.mark.parametrize("name", ["auth.json", "gateway_state.json"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/no/such"), Path.mkdir], ids=["link", "folder"])
def test_a_bootstrap_value_in_front_of_something_else_is_said(container, tmp_path, name, make):
    """It is not dropped without a word."""
    (tmp_path / "volume").mkdir()
    make(tmp_path / "volume" / name)
    environment = {"HERMES_AUTH_JSON_BOOTSTRAP": '{"token": "s3cret"}', "HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
    done = container(environment=environment).run("true")
    variable = hermes_boot.BOOTSTRAPS[name].encode()
    line = variable + b" is not used, since " + name.encode() + b" on the volume is a link or a folder; remove that"
    assert done.stderr.count(line) == 1 and b"s3cret" not in done.stderr


def test_the_home_in_etc_passwd_is_the_volume(container):
    """For ssh and the like; a second boot changes nothing."""
    box = container(environment={"HERMES_HOME": "/srv/agent"})
    box.start("sleep", "infinity")
    look = "getent passwd hermes | cut -d: -f6; echo ~hermes"
    assert box.exec("sh", "-c", look).stdout == "/srv/agent\n/srv/agent\n"
    assert "set the home" in box.log() and "set the home" not in box.exec(OURS, "setup").stderr


def test_a_login_shell_keeps_the_containers_path(container):
    """-e PATH=/potato:...; the commands of profiles come last, and not for root."""
    path = "/potato:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    box = container(environment={"PATH": path, "HERMES_HOME": "/srv/agent"})
    box.start("sleep", "infinity")
    for user in (None, "hermes"):
        folders = (
            box.exec("bash", "-lc", "echo $PATH", user=user, environment={"HOME": "/none"}).stdout.strip().split(":")
        )
        assert folders[:2] == ["/opt/hermes/bin", "/opt/hermes/.venv/bin"] and "/command" in folders
        assert folders.index("/potato") < folders.index("/usr/bin")
        assert (folders[-1] == "/srv/agent/.local/bin") == (user == "hermes")


def test_a_command_that_profile_create_has_made_is_found(container, tmp_path):
    """As the container's command and from within hermes's programs, after every other folder; never by root."""
    folder = tmp_path / "volume/.local/bin"
    folder.mkdir(parents=True)
    for name in ("coder", "ls"):
        (folder / name).write_text("#!/bin/sh\necho mine as $(id -un)\n")
        (folder / name).chmod(0o755)
    box = container()
    assert box.run("coder").stdout == b"mine as hermes\n"
    assert box.run("sh", "-c", "coder; ls -d /opt").stdout == b"mine as hermes\n/opt\n"
    box.start("sleep", "infinity")
    assert box.exec("sh", "-c", "command -v coder").returncode != 0


@sandbox_only
def test_something_mounted_over_the_images_files_is_said(container):
    """By the boot and by doctor."""
    box = container()
    box.mounts = ((str(box.upper / "opt/hermes"), "/opt/hermes"),)
    done = box.run("hermes-boot", "doctor")
    said = b"something is mounted over /opt/hermes, so what runs is not what the image has; remove the mount;"
    assert said in done.stderr and b"warn  volume: " + said in done.stdout


KINDS = {
    **dict.fromkeys(("9p", "cifs", "smb3", "nfs", "nfs4", "virtiofs", "vboxsf", "fakeowner"), True),
    **dict.fromkeys(("fuse", "fuse.sshfs", "fuse.grpcfuse", "fuseblk"), True),
    **dict.fromkeys(("ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs"), False),
}


@pytest.mark.parametrize("kind, unsafe", KINDS.items())
def test_file_systems_that_lose_sqlites_wal(kind, unsafe):
    """By the kind that /proc/self/mountinfo gives."""
    assert hermes_boot.loses_wal(kind) == unsafe


@sandbox_only
def test_a_volume_on_fuse_is_said(container, tmp_path):
    """Once at a boot, and by doctor each time, with what helps."""
    if not shutil.which("bindfs"):
        pytest.skip("needs bindfs")
    volume, behind = tmp_path / "volume", tmp_path / "behind"
    volume.mkdir()
    behind.mkdir()
    subprocess.run(["bindfs", behind, volume], check=True)
    try:
        done = container().run("hermes-boot", "doctor")
    finally:
        subprocess.run(["umount", "-l", volume], check=True)
    said = b"/opt/data is on fuse, where SQLite's WAL is not safe, so state.db may be damaged; keep it on a disk"
    assert done.stderr.count(said) == 1 and b"warn  volume: " + said in done.stdout
