"""Where a setting or a limit takes something away from a container, its boot goes on, and its command runs."""

from __future__ import annotations

import pytest
from sandbox import ENTRYPOINT, wait_for

PLACES = pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])


@PLACES
@pytest.mark.parametrize("scandir", ["/run/nobodys", "/opt/data/slots/", ""])
@pytest.mark.parametrize("keep", ["0", "1"])
def test_a_scandir_that_nobody_watches_ends_no_boot(container, entrypoint, scandir, keep):
    """The variable reaches what takes the slots up where the environment is kept; empty, it is not set."""
    environment = {"S6_PROFILE_GATEWAY_SCANDIR": scandir, "S6_KEEP_ENV": keep}
    box = container(environment=environment | {"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}, entrypoint=entrypoint)
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    slot = f"{scandir or '/run/service'}/gateway-default"
    done = box.run("sh", "-c", f"ls {slot}/run" if scandir else f"s6-svwait -t 5000 -u {slot}")
    assert done.returncode == 0 and b"warning" not in done.stderr, done


@PLACES
@pytest.mark.parametrize("sealed", ["", "1"])
def test_more_gateways_than_a_small_run_holds_end_no_container_late(container, tmp_path, entrypoint, sealed):
    """Those that run go first; for the others one line says why. Without space in /run the end would not come."""
    for name in ["z-runs", *(f"a{number}" for number in range(60))]:
        (tmp_path / "volume/profiles" / name).mkdir(parents=True)
        (tmp_path / "volume/profiles" / name / "SOUL.md").touch()
    (tmp_path / "volume/profiles/z-runs/gateway_state.json").write_text('{"desired_state": "running"}')
    box = container(environment={"HERMES_SEALED": sealed}, entrypoint=entrypoint, run_options="exec,mode=0755,size=1m")
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    assert box.exec("/command/s6-svwait", "-t", "10000", "-u", "/run/service/gateway-z-runs").returncode == 0
    count = len(list(box.path("/run/service").glob("gateway-*")))
    assert 8 < count < 40
    full = "the scandir has no room for more gateways"
    assert box.log().count(f'action=skipped reason="{full}') == 62 - count, box.log()
    assert wait_for(lambda: box.exec("hermes-boot", "health").returncode == 0)
    assert f"a59: has no slot, since {full}" in box.exec("hermes-boot", "doctor").stdout
    done = box.exec("hermes-boot", "gateway", "register", "-p", "a59")
    assert done.returncode == 1 and full in done.stderr
    assert "z-runs: has a gateway already" in box.exec("hermes-boot", "gateway", "register", "-p", "z-runs").stderr
    assert box.stop() == 143


AGENT = """#!/bin/sh
case "$1" in gateway) exec sleep infinity ;; chat) ;; *) echo "$1" && exit 0 ;; esac
id -un && touch "$HERMES_HOME/mine" && s6-svwait -t 5000 -u /run/service/gateway-default && hermes other && exit 3
"""


@pytest.mark.overlay
def test_hermes_as_the_entrypoint_below_an_engines_init(container, tmp_path):
    """`--init --entrypoint hermes`, on a volume of root's: as where hermes is PID 1. It boots once."""
    (tmp_path / "volume").mkdir()
    environment = {"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"}
    box = container(entrypoint=("/opt/hermes/bin/hermes",), environment=environment)
    box.put_agent(AGENT)
    done = box.run("chat")
    assert (done.returncode, done.stdout) == (3, b"hermes\nother\n"), done
    assert done.stderr.count(b"s6-svscan runs as") == 1 and (tmp_path / "volume/mine").stat().st_uid == 10000
