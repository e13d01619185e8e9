"""Every Python that the scripts are for: the rules and plain tests pass with it. One that cannot be had is a skip.

An interpreter is one on PATH or, with HERMES_TEST_REQUIRE_LIVE, one of Debian's that is kept below .cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
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


def fetched(version: str, lists: dict[str, list[str]], folder: Path) -> str:
    """Return Debian's Python of a version, fetched once, by a suite's lists, once too; raise CannotFetch."""
    root, suite = CACHE / f"python-{version}", SUITES[version]
    program = root / f"usr/bin/python{version}"
    if not root.exists():
        if not os.environ.get("HERMES_TEST_REQUIRE_LIVE") or not shutil.which("apt-get"):
            raise image.CannotFetch(
                "none on PATH works; with HERMES_TEST_REQUIRE_LIVE and apt-get, Debian's is fetched"
            )
        if suite not in lists:
            lists[suite] = image.apt_options(folder / suite, suite)
        own = {f"python{version}-minimal", f"libpython{version}-minimal", f"libpython{version}-stdlib"}
        part = image.unpack(lists[suite], suite, own | LIBRARIES, folder / version)
        (loader,) = part.glob("usr/lib/*/ld-linux*.so.*")
        start = part / program.relative_to(root)
        start.rename(f"{start}.real")
        start.write_text(START.format(libraries=root / loader.parent.relative_to(part), loader=loader.name))
        start.chmod(0o755)
        part.rename(root)
    if not works(program, version):
        raise image.CannotFetch(f"{program} does not start")
    return str(program)


@pytest.fixture(scope="module")
def interpreters() -> dict[str, str | image.CannotFetch]:
    """Return the program of every version, or why there is none."""
    found: dict[str, str | image.CannotFetch] = {}
    lists: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(dir=image.made(CACHE)) as folder:
        for version in SUITES:
            try:
                found[version] = on_path(version) or fetched(version, lists, Path(folder))
            except image.CannotFetch as error:
                found[version] = error
    return found


@pytest.fixture(scope="module")
def runs(interpreters, tmp_path_factory):
    """Start the tests with all interpreters at the same time; every run writes to a file."""
    folder = tmp_path_factory.mktemp("interpreters")
    for name in PYTEST:
        (image.made(folder / "packages") / name).symlink_to(Path(pytest.__file__).parent.parent / name)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder / "packages")}
    argv = ["-m", "pytest", "-m", "plain", *(f"tests/{name}" for name in FILES)]
    started: dict[str, tuple[subprocess.Popen, Path]] = {}
    for version, program in interpreters.items():
        if isinstance(program, str):
            with open(folder / f"{version}.txt", "wb") as out:
                words = [program, *argv, f"--basetemp={folder / version}"]
                run = subprocess.Popen(words, cwd=PROJECT, env=environment, stdout=out, stderr=out)
            started[version] = run, folder / f"{version}.txt"
    yield started
    for run, _ in started.values():
        run.kill()
        run.wait()


@pytest.fixture(params=SUITES)
def version(request, interpreters) -> str:
    """A version that can be had; a skip names one that cannot."""
    if not isinstance(interpreters[request.param], str):
        pytest.skip(f"no Python {request.param}: {interpreters[request.param]}")
    return request.param


def test_the_rules_and_plain_tests_pass(version, runs):
    """None fails, and most were there to run."""
    run, out = runs[version]
    code = run.wait(timeout=600)
    text = out.read_text(errors="replace")
    assert code == 0, text
    (passed,) = re.findall(r"(\d+) passed", text)
    assert int(passed) > 150, text


def test_the_scripts_work_without_a_warning(version, interpreters, plain):
    """Both compile; the boot script says its usage and version and reconciles a volume."""
    plain.profile("default", '{"gateway_state": "running"}')
    environment = {"HERMES_HOME": str(plain.home), "S6_PROFILE_GATEWAY_SCANDIR": str(plain.scandir)}

    def python(*words: str) -> str:
        argv = [interpreters[version], "-IS", "-W", "error", *words]
        done = subprocess.run(argv, env=os.environ | environment, cwd=PROJECT, capture_output=True, text=True)
        assert done.returncode == 0 and "Warning" not in done.stderr, done
        return done.stdout

    for script in ("hermes_boot.py", "main_wrapper.py"):
        python("-c", f"with open({script!r}, 'rb') as file: compile(file.read(), {script!r}, 'exec')")
    assert python("hermes_boot.py", "--help").startswith("usage: hermes_boot.py ")
    assert re.fullmatch(r"hermes_boot\.py \d+\.\d+\.\d+, .+\n", python("hermes_boot.py", "--version"))
    python("hermes_boot.py", "reconcile")
    assert plain.slots() == {"default": True}
