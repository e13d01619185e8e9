"""`make run` with an engine that answers: what it builds, what it does not, and what it does when it cannot."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import ON_ENGINE
from engine import engine, image
from sandbox import AGENT_VERSION, PROJECT


@pytest.fixture
def make(in_time):
    """Run `make run` with the engine that answers."""
    if not engine():
        pytest.skip("no container engine answers")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        argv = ["make", "--no-print-directory", "-C", PROJECT, "run", f"ENGINE={engine()}", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


@pytest.mark.long
@pytest.mark.skipif(ON_ENGINE, reason="shows the sandbox")
def test_an_engine_that_cannot_build_is_one_line_and_the_sandbox_runs(make):
    """A base image that is nowhere, as where there is no network: the version all the same, alone on stdout."""
    options = "ENGINE_BUILD_OPTIONS=--build-arg BASE_IMAGE=localhost/no-such-image"
    done = make("ARGS=--version", "IMAGE=localhost/hermes-no-such-image", options)
    assert done.returncode == 0 and done.stdout.startswith(f"Hermes Agent v{AGENT_VERSION}"), done
    building, failed, *rest = [line for line in done.stderr.splitlines() if "make run: " in line]
    assert building.startswith("make run: building localhost/hermes-no-such-image with ") and rest == []
    assert failed.startswith(f"make run: {engine()} cannot build the image: ")
    assert failed.endswith("; this runs without it, as `make run ENGINE=` does")


@pytest.mark.skipif(not ON_ENGINE, reason="needs a real image: make test-engine")
def test_an_image_that_is_there_is_run_without_a_build(make):
    """Its output and its code are the command's."""
    options = os.environ.get("ENGINE_RUN_OPTIONS", "")
    done = make("ARGS=--version", f"IMAGE={image()}", f"ENGINE_RUN_OPTIONS={options}", "ENGINE_BUILD_OPTIONS=--no-such")
    assert done.returncode == 0 and done.stdout.startswith(f"Hermes Agent v{AGENT_VERSION}"), done
    assert "make run" not in done.stderr
    assert "Error 42" in make("ARGS=sh -c 'exit 42'", f"IMAGE={image()}").stderr
