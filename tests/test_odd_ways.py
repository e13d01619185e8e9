"""Commands in ways that few people use: a fault among many gateways, names with a prefix, unpadded dates."""

from __future__ import annotations

import argparse
import json

import pytest
from conftest import MANAGER, RUN
from sandbox import ENTRYPOINT, wait_for

import hermes_boot


def test_all_are_stopped_and_recorded_past_a_state_file_that_is_none(gateways):
    """The warning about it comes while many are recorded at once."""
    host = gateways({"a": RUN, "b": RUN}, "running")
    assert wait_for(lambda: host.up("a") and host.up("b"))
    (host.folder("b") / "gateway_state.json").write_text("no JSON\n")
    done = host.do("stop", "--all")
    assert done.returncode == 0 and done.stdout == "a: stopped\nb: stopped\ndefault: stopped\n", done
    assert len(done.stderr.splitlines()) == 1 and "gateway_state.json.bad" in done.stderr, done
    assert host.state("a")["desired_state"] == host.state("b")["desired_state"] == "stopped"


def test_a_gateway_is_known_by_its_services_name_everywhere(gateways):
    """`gateway-a` is a's service: what starts by that name is also seen by it."""
    host = gateways({"a": "echo hello\n" + RUN}, "running")
    assert wait_for(lambda: host.up("a"))
    assert host.do("stop", "-p", "gateway-a").returncode == 0
    assert host.do("start", "-p", "gateway-a").returncode == 0
    done = host.box.exec(MANAGER, "status", "-p", "gateway-a", "--json")
    assert done.returncode == 0 and [row["name"] for row in json.loads(done.stdout)] == ["a"], done
    assert "hello" in host.box.exec(MANAGER, "logs", "-p", "gateway-a").stdout


@pytest.mark.sandbox
def test_doctor_says_what_it_can_where_hermes_does_not_see_pid_1(container):
    """A /proc with hidepid=2."""
    box = container(entrypoint=ENTRYPOINT)
    box.start("sleep", "infinity")
    assert box.exec("mount", "-o", "remount,hidepid=2", "/proc").returncode == 0
    done = box.exec(MANAGER, "doctor")
    assert done.returncode == 0 and done.stderr == "", done
    assert "warn  supervisor: s6-svscan answers on /run/service, below another PID 1 (hidden)" in done.stdout


SINCE = {
    "2026-5-1": "2026-05-01",
    "2026-5-1 6:08": "2026-05-01 06:08",
    "2026-05-21T06:18:05": "2026-05-21 06:18:05",
}


@pytest.mark.parametrize("text", SINCE)
def test_a_date_without_its_zeros_is_that_date(text):
    """It is compared with s6-log's timestamps as text."""
    assert hermes_boot.since_when(text) == SINCE[text]


@pytest.mark.parametrize("text", ["9" * 400 + "s", "9" * 5000 + "d"])
def test_a_time_span_beyond_all_bounds_is_refused(text):
    """With the same words as anything else that is none."""
    with pytest.raises(argparse.ArgumentTypeError, match="neither a time span"):
        hermes_boot.since_when(text)
