"""What the image brings along and where more goes: libraries, programs, the agent's packages. Needs an engine."""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import ON_ENGINE
from engine import engine, image
from sandbox import PROJECT, wait_for

pytestmark = pytest.mark.skipif(not ON_ENGINE, reason="needs a real image: make test-engine")
VENV_PYTHON = "/opt/hermes/.venv/bin/python"


def argument(name: str) -> str:
    """Return a build argument's default."""
    return re.search(rf'^ARG {name}="?(.*?)"?$', (PROJECT / "Dockerfile").read_text(), re.M)[1]


@pytest.mark.parametrize("python", ["/usr/bin/python3", VENV_PYTHON])
def test_sqlite_is_one_that_two_writers_cannot_corrupt(container, python):
    """3.51.3 or later, with what the agent's search needs."""
    script = (
        "import sqlite3; db = sqlite3.connect(':memory:')\n"
        "db.execute('CREATE VIRTUAL TABLE texts USING fts5(text, tokenize = trigram)')\n"
        "db.execute('INSERT INTO texts VALUES (?)', ['supervision'])\n"
        "print(db.execute('SELECT count(*) FROM texts WHERE texts MATCH ?', ['ervis']).fetchone()[0])\n"
        "print(sqlite3.sqlite_version)"
    )
    found, version = container().run(python, "-c", script).stdout.decode().split()
    assert found == "1" and tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_apt_knows_nothing_of_the_later_debian_afterwards(container):
    """What is installed in a derived image comes from the base image's Debian alone."""
    done = container().run("sh", "-c", "grep -rl forky /etc/apt; ls /etc/apt/preferences.d /var/lib/apt/lists")
    assert done.stdout.split() == [b"/etc/apt/preferences.d:", b"/var/lib/apt/lists:"], done


def test_the_license_is_in_the_image(container):
    """Ours; Debian's packages bring their own."""
    assert container().run("cat", "/opt/hermes/docker/LICENSE").stdout == (PROJECT / "LICENSE").read_bytes()


def test_the_programs_that_the_agent_calls_are_there(container):
    """By the packages of the build argument."""
    done = container().run("sh", "-c", "for name in git rg ssh ps curl less; do command -v $name || exit 1; done")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(argument("APT_PACKAGES").split()), done


def test_the_platforms_that_people_use_come_up_without_a_network(container, tmp_path):
    """API server and Telegram, by the real agent: nothing is fetched first, and none is without its library."""
    environment = {
        "API_SERVER_ENABLED": "true",
        "API_SERVER_KEY": "0123456789abcdef0123456789abcdef",
        "TELEGRAM_BOT_TOKEN": "123456:no-such-bot",
        "HERMES_GATEWAY_BOOTSTRAP_STATE": "running",
    }
    volume, none = tmp_path / "volume", ("--network", "none")
    argv = [engine(), "run", "--rm", *none, "--entrypoint", "true", image()]
    taken = subprocess.run(argv, capture_output=True).returncode == 0  # else the engine here has none as it is
    box = container(environment=environment, options=none if taken else ())
    box.start("sleep", "infinity")
    assert len(box.exec("cat", "/proc/net/route").stdout.splitlines()) == 1, "there is a network"
    assert wait_for(lambda: box.exec("curl", "-fsS", "http://127.0.0.1:8642/health").returncode == 0, 60), box.log()
    state = volume / "gateway_state.json"
    assert wait_for(lambda: "telegram" in json.loads(state.read_text()).get("platforms", {}), 60), state.read_text()
    platforms = json.loads(state.read_text())["platforms"]
    assert platforms["api_server"]["state"] == "connected"
    assert platforms["telegram"]["state"] in ("connecting", "retrying"), platforms
    assert "No adapter available" not in box.log()
    assert list((volume / "lazy-packages").iterdir()) == []


def test_the_extras_are_all_installed(container):
    """By the agent's own metadata: every requirement of every extra of the build argument."""
    script = (
        "from importlib.metadata import requires, version; from packaging.requirements import Requirement\n"
        f"for extra in {argument('HERMES_AGENT_EXTRAS').split(',')!r}:\n"
        "    found = map(Requirement, requires('hermes-agent'))\n"
        "    wanted = [r for r in found if r.marker and r.marker.evaluate({'extra': extra})]\n"
        "    for r in wanted: assert r.specifier.contains(version(r.name)), r\n"
        "    print(extra, len(wanted))"
    )
    done = container().run(VENV_PYTHON, "-c", script)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 8 and not [line for line in lines if line.endswith(" 0")], done


def wheel(folder: Path) -> str:
    """Write a package that pip can install without a network; return its path in the container."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "small-1.0-py3-none-any.whl", "w") as file:
        file.writestr("small.py", "")
        file.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        file.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\nRoot-Is-Purelib: true\n")
        file.writestr("small-1.0.dist-info/RECORD", "")
    return "/wheels/small-1.0-py3-none-any.whl"


INSTALLS = {
    # what hermes runs in its terminal, and where the package is then
    "plain": ("pip install -q --no-index $1", VENV_PYTHON, "/opt/data/.local/lib/python3.*/site-packages"),
    "by the agent": (f"{VENV_PYTHON} -m pip install -qU --no-index $1", VENV_PYTHON, "/opt/data/.local/lib/python3.*"),
    "--user": ("pip install -q --no-index --user $1", "python", "/opt/data/.local/lib/python3.*/site-packages"),
    "from a profile": ("HOME=/opt/data/home pip install -q --no-index $1", "python", "/opt/data/.local/lib/python3.*"),
    "--prefix": (
        "pip install -q --no-index --prefix /opt/data/p $1; export PYTHONPATH=$(echo /opt/data/p/lib/*/site-packages)",
        "python",
        "/opt/data/p/lib/python3.*/site-packages",
    ),
    "an environment of its own": (
        "python -m venv --without-pip /opt/data/v; pip -q --python /opt/data/v/bin/python install --no-index $1",
        "/opt/data/v/bin/python",
        "/opt/data/v/lib/python3.*/site-packages",
    ),
}


@pytest.mark.parametrize("install, python, place", INSTALLS.values(), ids=INSTALLS)
def test_hermess_packages_go_to_the_volume_and_can_be_used(container, tmp_path, install, python, place):
    """Where pip is told to put them, or where the user's are; what is made with them finds them."""
    path = wheel(tmp_path / "wheels")
    box = container(mounts=((str(tmp_path / "wheels"), "/wheels"),))
    done = box.run("sh", "-c", f"{install}; {python} -c 'import small; print(small.__file__)'", "sh", path)
    assert re.fullmatch(f"{place}/(site-packages/)?small.py\n", done.stdout.decode()), done


def test_a_derived_images_pip_installs_into_the_environment(container, tmp_path):
    """It is root's, and has no variable of ours."""
    path = wheel(tmp_path / "wheels")
    box = container(mounts=((str(tmp_path / "wheels"), "/wheels"),), entrypoint=())
    box.start("sleep", "infinity")
    script = (
        f"pip install -q --no-index --root-user-action ignore {path}; python -c 'import small; print(small.__file__)'"
    )
    done = box.exec("sh", "-c", script)
    assert re.fullmatch(r"/opt/hermes/\.venv/lib/python3\.\d+/site-packages/small\.py\n", done.stdout), done


def test_the_agents_own_packages_win_over_hermess(container):
    """A package of the user's does not shadow one of the agent's."""
    script = (
        "d=$(python -c 'import site; print(site.getusersitepackages())')\n"
        "mkdir -p $d; echo raise SystemExit >$d/httpx.py\n"
        "python -c 'import httpx; print(httpx.__file__)'"
    )
    assert container().run("sh", "-c", script).stdout.startswith(b"/opt/hermes/.venv/")


def test_update_says_that_this_is_an_image(container):
    """The real agent's word, after ours."""
    done = container().run("hermes", "update")
    assert done.returncode == 1 and b"doesn't apply inside the Docker container" in done.stdout, done
    box = container()
    box.start("sleep", "infinity")
    assert "info: the agent is part of this container's image" in box.exec("hermes", "update").stderr


def test_the_images_environment_is_no_burden_for_what_is_built_on_it():
    """No pip settings, none of Python's but the two for gateways' logs and a volume without bytecode, no limit on where
    the agent writes; labels in place."""
    done = subprocess.run([engine(), "inspect", image()], capture_output=True, text=True, check=True)
    config = json.loads(done.stdout)[0]["Config"]
    names = {pair.partition("=")[0] for pair in config["Env"]} - {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    assert not [name for name in names if re.match(r"PIP_|PYTHON|XDG_|UMASK|HERMES_WRITE_SAFE_ROOT", name)]
    assert config["Labels"]["org.opencontainers.image.base.name"]


def test_the_history_has_no_secret_and_no_pipe_into_a_shell():
    """What `docker history` shows to everyone who has the image."""
    form = ["history", "--no-trunc", "--format", "{{.CreatedBy}}", image()]
    text = subprocess.run([engine(), *form], capture_output=True, text=True, check=True).stdout
    assert "apt-get" in text and not re.search(
        r"curl|wget|\|\s*(ba)?sh\b|(?i:token|password|secret)=", text.replace(argument("APT_PACKAGES"), "")
    )
