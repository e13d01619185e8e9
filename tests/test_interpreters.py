"""Every Python that the scripts are for: the rules and plain tests pass with it. One that cannot be had is a skip.

An interpreter is one on PATH or, with HERMES_TEST_REQUIRE_LIVE, one of Debian's that is kept below .cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import image
import pytest
from sandbox import CACHE, PROJECT

SUITES = {"3.11": "bookworm", "3.13": "forky", "3.14": "forky", "3.15": "forky"}  # the Debian that has it
LIBRARIES = {"libc6", "libexpat1", "libgcc-s1", "libzstd1", "zlib1g"}
FILES = ("test_rules.py", "test_reconcile.py", "test_wrapper.py")
PYTEST = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py")  # for any version
# The program runs with its own libc; its name is this file's, so Python finds its library beside it.
START = '#!/bin/sh\nexec "{libraries}/{loader}" --library-path "{libraries}" --argv0 "$0" "$0.real" "$@"\n'


def works(program: Path | str, version: str) -> bool:
    """Return whether a program is a Python of a version; one of pyenv's may be a name only."""
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([program, "-IS", "-c", show], capture_output=True, text=True, timeout=60)
    return done.stdout == f"{version}\n"


def on_path(version: str) -> str:
    """Return the first python3.N on PATH that works, "" when none does."""
    found = (shutil.which(f"python{version}", path=folder) for folder in os.get_exec_path())
    return next((program for program in found if program and works(program, version)), "")


def fetched(version: str) -> str:
    """Return Debian's Python of a version, fetched once; raise CannotFetch."""
    root = CACHE / f"python-{version}"
    program = root / f"usr/bin/python{version}"
    if not root.exists():
        if not os.environ.get("HERMES_TEST_REQUIRE_LIVE") or not shutil.which("apt-get"):
            why = "none on PATH works; with HERMES_TEST_REQUIRE_LIVE and apt-get, Debian's is fetched"
            raise image.CannotFetch(why)
        with tempfile.TemporaryDirectory(dir=image.made(CACHE)) as folder:
            part = unpacked(version, Path(folder), root)
            with suppress(OSError):  # another process of the tests has it already
                part.rename(root)
    if not works(program, version):
        raise image.CannotFetch(f"{program} does not start")
    return str(program)


def unpacked(version: str, folder: Path, root: Path) -> Path:
    """Return where Debian's Python is unpacked, made to run at root."""
    suite = SUITES[version]
    own = {f"python{version}-minimal", f"libpython{version}-minimal", f"libpython{version}-stdlib"}
    part = image.unpack(image.apt_options(folder / suite, suite), suite, own | LIBRARIES, folder / version)
    (loader,) = part.glob("usr/lib/*/ld-linux*.so.*")
    start = part / f"usr/bin/python{version}"
    start.rename(f"{start}.real")
    start.write_text(START.format(libraries=root / loader.parent.relative_to(part), loader=loader.name))
    start.chmod(0o755)
    return part


@cache
def interpreter(version: str) -> str | image.CannotFetch:
    """Return the program of a version, or why there is none."""
    try:
        return on_path(version) or fetched(version)
    except image.CannotFetch as error:
        return error


@pytest.fixture(params=SUITES)
def python(request) -> str:
    """A Python that can be had; a skip names one that cannot."""
    found = interpreter(request.param)
    if not isinstance(found, str):
        pytest.skip(f"no Python {request.param}: {found}")
    return found


OTHERS = [version for version in SUITES if version != f"{sys.version_info[0]}.{sys.version_info[1]}"]


@pytest.mark.long
@pytest.mark.parametrize("python", OTHERS, indirect=True)
def test_the_rules_and_plain_tests_pass(python, tmp_path):
    """None fails, and most were there to run. With this process's own version they all run as it is."""
    for name in PYTEST:
        (image.made(tmp_path / "packages") / name).symlink_to(Path(pytest.__file__).parent.parent / name)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "packages")}
    argv = [python, "-m", "pytest", "-m", "plain", f"--basetemp={tmp_path}/tests", *(f"tests/{name}" for name in FILES)]
    done = subprocess.run(argv, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 150, done.stdout


def test_the_scripts_work_without_a_warning(python, plain):
    """Both compile; the boot script says its usage and version and reconciles a volume."""
    plain.profile("default", '{"gateway_state": "running"}')
    environment = {"HERMES_HOME": str(plain.home), "S6_PROFILE_GATEWAY_SCANDIR": str(plain.scandir)}

    def run(*words: str) -> str:
        argv = [python, "-IS", "-W", "error", *words]
        done = subprocess.run(argv, env=os.environ | environment, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0 and "Warning" not in done.stderr, done
        return done.stdout

    for script in ("hermes_boot.py", "main_wrapper.py"):
        run("-c", f"with open({script!r}, 'rb') as file: compile(file.read(), {script!r}, 'exec')")
    assert run("hermes_boot.py", "--help").startswith("usage: hermes_boot.py ")
    assert re.fullmatch(r"hermes_boot\.py \d+\.\d+\.\d+, .+\n", run("hermes_boot.py", "--version"))
    run("hermes_boot.py", "reconcile")
    assert plain.slots() == {"default": True}
