"""Secrets by file: NAME_FILE for what the agent takes from NAME, read by root, never on a disk."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
from image import agent_venv
from sandbox import PROJECT, wait_for

sys.path.insert(0, str(PROJECT))
import hermes_boot

AGENT = """#!/bin/sh
case "$*" in *gateway*) file=gateway;; dashboard*) file=dashboard;; *) file=hermes;; esac
printf %s "$OPENAI_API_KEY|$EMAIL_PASSWORD" > "/opt/data/$file.tmp"
mv "/opt/data/$file.tmp" "/opt/data/$file"
[ "$file" = hermes ] || exec sleep infinity
"""
FOLDER = "/run/secrets"


@pytest.fixture
def secret(tmp_path):
    """Write a secret as an engine mounts it: root's, for nobody else; return the mount."""

    def make(name: str, content: bytes, mode: int = 0o400) -> tuple[str, str]:
        (tmp_path / "secrets").mkdir(exist_ok=True)
        path = tmp_path / "secrets" / name
        path.write_bytes(content)
        path.chmod(mode)
        return str(path), f"{FOLDER}/{name}"

    return make


def test_secrets_reach_every_process_of_hermess_and_no_disk(container, secret, tmp_path):
    """Container command, gateway, dashboard, `docker exec`; a last newline is the editor's."""
    mounts = secret("openai", b"sk-123 $x'\n"), secret("mail", b"two\nlines")
    environment = {
        "OPENAI_API_KEY_FILE": f"{FOLDER}/openai",
        "EMAIL_PASSWORD_FILE": f"{FOLDER}/mail",
        "HERMES_DASHBOARD": "1",
        "HERMES_GATEWAY_BOOTSTRAP_STATE": "running",
    }
    box, volume = container(environment=environment, mounts=mounts), tmp_path / "volume"
    box.put_agent(AGENT)
    box.start("sh", "-c", "hermes chat; mv hermes command; exec sleep infinity")
    assert wait_for(lambda: all((volume / name).exists() for name in ("command", "gateway", "dashboard"))), box.log()
    box.exec("hermes", "chat")
    found = {(volume / name).read_text() for name in ("command", "gateway", "dashboard", "hermes")}
    assert found == {"sk-123 $x'|two\nlines"}
    assert "sk-123" not in box.log()
    script = "find /etc /opt/data /tmp /run -type f -exec grep -lF sk-123 {} +; stat -c '%U %G %a' $1"
    place = "/run/s6/container_environment/OPENAI_API_KEY"
    *files, mode = box.exec("sh", "-c", script, "sh", place).stdout.splitlines()
    told = {f"/opt/data/{name}" for name in ("command", "gateway", "dashboard", "hermes")}
    assert (set(files) - told, mode) == ({place, "/run/secrets/openai"}, "root hermes 640")


def test_auth_json_may_come_from_a_file(container, secret, tmp_path):
    """As from the variable."""
    environment = {"HERMES_AUTH_JSON_BOOTSTRAP_FILE": f"{FOLDER}/auth"}
    assert container(environment=environment, mounts=(secret("auth", b'{"a": 1}\n'),)).run("true").returncode == 0
    assert (tmp_path / "volume/auth.json").read_text() == '{"a": 1}'


def test_a_link_of_roots_is_followed_as_kubernetes_mounts_secrets(container, tmp_path):
    """NAME -> ..data/NAME -> ..2026/NAME, in folders that only root can change."""
    folder = tmp_path / "secrets"
    (folder / "..2026").mkdir(parents=True)
    (folder / "..2026/key").write_text("sk-9")
    (folder / "..data").symlink_to("..2026")
    (folder / "key").symlink_to("..data/key")
    box = container(environment={"SOME_API_KEY_FILE": "/run/keys/key"}, mounts=((str(folder), "/run/keys"),))
    done = box.run("sh", "-c", "echo $SOME_API_KEY")
    assert done.stdout == b"sk-9\n", done.stderr.decode()


@pytest.mark.parametrize("name", ["AZURE_FEDERATED_TOKEN_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "SSL_CERT_FILE"])
def test_what_the_agent_reads_as_a_path_stays_one(container, name):
    """Even where nothing is there."""
    done = container(environment={name: "/no/such/file"}).run("sh", "-c", f"echo ${name} ${{{name[:-5]}-none}}")
    assert (done.returncode, done.stdout) == (0, b"/no/such/file none\n"), done.stderr.decode()


def faults(container, secret, **environment: str):
    """Return the exit code of a boot and its fatal lines."""
    done = container(
        environment=environment, mounts=(secret("key", b"sk-1\n"), secret("empty", b"\n"), secret("nul", b"a\0b"))
    ).run("true")
    return done.returncode, [
        line for line in done.stderr.decode().splitlines() if "fatal: " in line and "s6" not in line
    ]


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"A_TOKEN_FILE": f"{FOLDER}/key", "A_TOKEN": "sk-2"}, "A_TOKEN and A_TOKEN_FILE are both set; unset one"),
        (
            {"A_TOKEN_FILE": f"{FOLDER}/none"},
            "A_TOKEN_FILE='/run/secrets/none' cannot be used (No such file or directory)",
        ),
        ({"A_TOKEN_FILE": f"{FOLDER}/empty"}, "A_TOKEN_FILE='/run/secrets/empty' is empty"),
        (
            {"A_TOKEN_FILE": f"{FOLDER}/nul"},
            "A_TOKEN_FILE='/run/secrets/nul' has a NUL byte, which no variable can hold",
        ),
        ({"A_TOKEN_FILE": FOLDER}, "A_TOKEN_FILE='/run/secrets' is not a regular file"),
        ({"A_TOKEN_FILE": "sk-1"}, "A_TOKEN_FILE is not an absolute path; set it to the path of the file"),
        (
            {"A_TOKEN_FILE": "/opt/data/key"},
            "A_TOKEN_FILE='/opt/data/key' is in a folder that others than root can write",
        ),
    ],
)
def test_a_secret_that_cannot_be_had_ends_the_boot_with_one_line(container, secret, tmp_path, environment, said):
    """And no line has a secret in it."""
    (tmp_path / "volume").mkdir(exist_ok=True)
    (tmp_path / "volume/key").write_text("sk-3")
    os.chown(tmp_path / "volume", 10000, 10000)
    code, lines = faults(container, secret, **environment)
    assert code == 1 and len(lines) == 1 and said in lines[0] and "sk-" not in lines[0], lines


def test_without_root_hermes_has_to_be_able_to_read_it(container, tmp_path):
    """It is a file already; what is missing is said."""
    for name in ("volume", "key"):
        (tmp_path / name).mkdir() if name == "volume" else (tmp_path / name).write_text("sk-1")
        os.chown(tmp_path / name, 10000 * (name == "volume"), 0)
    (tmp_path / "key").chmod(0o600)
    box = container(user=10000, environment={"A_KEY_FILE": "/key"}, mounts=((str(tmp_path / "key"), "/key"),))
    done = box.run("true")
    said = b"fatal: A_KEY_FILE='/key' cannot be used (Permission denied); let hermes read it\n"
    assert done.returncode == 1 and said in done.stderr, done.stderr.decode()


def test_hermes_cannot_have_root_read_for_it(container, tmp_path):
    """A link that hermes made, at any step of the way, leads to nothing."""
    volume = tmp_path / "volume"
    (volume / "folder").mkdir(parents=True)
    (volume / "folder/key").symlink_to("/etc/shadow")
    (volume / "etc").symlink_to("/etc")
    subprocess.run(["chown", "-hR", "10000:10000", volume], check=True)
    for path in ("/opt/data/folder/key", "/opt/data/etc/shadow"):
        done = container(environment={"A_KEY_FILE": path}).run("sh", "-c", 'echo "$A_KEY"')
        assert (done.returncode, done.stdout) == (1, b"") and b"fatal: A_KEY_FILE=" in done.stderr


def test_a_setup_by_hand_reads_a_changed_secret_anew(container, secret):
    """What the boot exported is no second source."""
    mount = secret("key", b"old\n", 0o600)
    box = container(environment={"A_TOKEN_FILE": f"{FOLDER}/key"}, mounts=(mount,))
    box.put_agent('#!/bin/sh\necho "$A_TOKEN"\n')
    box.start("sleep", "infinity")
    assert box.exec("hermes", "chat").stdout == "old\n"
    with open(mount[0], "w") as file:
        file.write("new\n")
    done = box.exec("hermes-boot", "setup")
    assert done.returncode == 0, done.stderr
    assert box.exec("hermes", "chat").stdout == "new\n"


def test_without_the_environments_folder_it_is_said(container, secret):
    """S6_KEEP_ENV=1 leaves no place to hand a secret on."""
    environment = {"S6_KEEP_ENV": "1", "A_TOKEN_FILE": f"{FOLDER}/key"}
    done = container(environment=environment, mounts=(secret("key", b"sk-1\n"),)).run("true")
    assert (
        done.returncode == 1 and b"fatal: A_TOKEN cannot be handed on" in done.stderr and b"S6_KEEP_ENV" in done.stderr
    )


# The pattern, held against the agent


def test_the_pattern_covers_every_secret_that_the_agent_asks_for():
    """Its own list of variables that are passwords, from its source."""
    (site,) = agent_venv().glob("lib/python3*/site-packages")
    tree = ast.parse((site / "hermes_cli/config.py").read_text())
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "OPTIONAL_ENV_VARS" in ast.unparse(node).split("=")[0]
    ]
    names = [
        key.value
        for key, value in zip(table.keys, table.values, strict=True)
        if re.search(r"'password': True", ast.unparse(value))
    ]
    assert len(names) > 60 and {"OPENROUTER_API_KEY", "TELEGRAM_BOT_TOKEN"} <= set(names)
    assert [name for name in names if not hermes_boot.secret_of(f"{name}_FILE")] == []


def test_no_path_that_the_agent_itself_reads_is_taken_for_a_secret():
    """Every variable in its source whose name ends in _FILE."""
    (site,) = agent_venv().glob("lib/python3*/site-packages")
    folders = "agent acp_adapter cron gateway hermes_cli plugins providers tools tui_gateway".split()
    found = set()
    for path in (path for folder in folders for path in (site / folder).rglob("*.py")):
        found |= set(
            re.findall(
                r"(?:environ(?:\.get)?|getenv|get_env_value)\s*[(\[]\s*[\"']([A-Z0-9_]+_FILE)[\"']", path.read_text()
            )
        )
    assert "AZURE_FEDERATED_TOKEN_FILE" in found and len(found) >= 3
    assert [name for name in sorted(found) if hermes_boot.secret_of(name)] == []
