"""Who multiplexes: the variable where it is set, else config.yaml, read as hermes-agent reads it."""

from __future__ import annotations

import subprocess

import image
import pytest
from conftest import MANAGER, RUN, Gateways
from sandbox import wait_for

import hermes_boot

CONFIGS = {
    "gateway:\n  multiplex_profiles: true\n": True,
    "gateway:\n  port: 1\n  multiplex_profiles: yes # all of them\n": True,
    "model:\n  gateway:\n    multiplex_profiles: true\n": False,
    "gateway:\n  telegram:\n    multiplex_profiles: true\n": False,
    "gateway:\n  multiplex_profiles: 'on'\n": True,
    'gateway:\n    # multiplex_profiles: true\n    "multiplex_profiles": "TRUE"\n': True,
    "gateway: {port: 1, multiplex_profiles: true}\n": True,
    "gateway: {multiplex_profiles: no}\n": False,
    "gateway:\n  port: 1\nother:\n  multiplex_profiles: true\n": False,
    "multiplex_profiles: true\n": True,
    "multiplex_profiles: 1\r\n": True,
    "multiplex_profiles: off\ngateway:\n  multiplex_profiles: true\n": False,
    "gateway:\n  multiplex_profiles: true\nmultiplex_profiles:\n": False,
    "gateway:\n  multiplex_profiles: maybe\n": False,
    "gateway:\n  multiplex_profiles:true\n": False,
    "# multiplex_profiles: true\n": False,
    "\ufeffgateway:\n\n  multiplex_profiles: True\n": True,
    "gateway:\n  note: |\n    multiplex_profiles: true\n": False,
    "": False,
}


@pytest.mark.parametrize("text, multiplexes", CONFIGS.items())
def test_config_yaml_is_read(plain, text, multiplexes):
    """Named slots are then registered down, and why says the reason; with the variable, that decides."""
    for name in ("default", "coder"):
        plain.profile(name, '{"desired_state": "running"}')
    (plain.home / "config.yaml").write_text(text, newline="")
    done = plain.reconcile()
    assert plain.slots() == {"coder": not multiplexes, "default": True}
    assert ("multiplex_profiles leaves it to the default gateway" in done.stderr) is multiplexes
    plain.reconcile(GATEWAY_MULTIPLEX_PROFILES="off" if multiplexes else "Yes")
    assert plain.slots()["coder"] is multiplexes


# One process for each file, since reading sets variables; what it imports, seconds of work, is imported once.
READ = """
import os, sys
from gateway.config import load_gateway_config
load_gateway_config()
for home in sys.argv[1:]:
    if os.fork() == 0:
        os.environ["HERMES_HOME"] = os.environ["HOME"] = home
        print(bool(load_gateway_config().multiplex_profiles), flush=True)
        os._exit(0)
    os.wait()
"""


def test_our_reading_is_the_agents(live, tmp_path):
    """For every file above, hermes-agent itself says the same."""
    homes = {tmp_path / str(number): text for number, text in enumerate(CONFIGS)}
    for home, text in homes.items():
        home.mkdir()
        (home / "config.yaml").write_text(text, newline="")
        boot = hermes_boot.Boot({"HERMES_HOME": str(home)})
        assert hermes_boot.is_multiplexed(boot, "coder") is CONFIGS[text], text
    packages = next((image.agent_venv() / "lib").glob("python3*/site-packages"))
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(packages)}
    argv = [image.agent_venv() / "bin/python", "-c", READ, *homes]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    said = dict(zip(homes.values(), done.stdout.split(), strict=True))
    assert said == {text: str(multiplexes) for text, multiplexes in CONFIGS.items()}, done


@pytest.mark.parametrize("how, text", [({"GATEWAY_MULTIPLEX_PROFILES": "1"}, ""), ({}, "multiplex_profiles: true\n")])
def test_the_default_gateway_is_the_one_that_gateway_run_starts(container, how, text):
    """Whatever active_profile says; status and doctor see it the same way."""
    box = container(environment=how)
    box.volume.mkdir()
    (box.volume / "active_profile").write_text("coder\n")
    (box.volume / "config.yaml").write_text(text)
    host = Gateways(box, {"coder": RUN}, command=("gateway", "run"))
    assert wait_for(lambda: host.up("default")), host.box.log()
    assert not host.up("coder") and host.starts("coder") == 0
    assert wait_for(lambda: "default: started" in host.box.log())
    assert host.state("default")["desired_state"] == "running"
    (host.folder("coder") / "gateway_state.json").write_text('{"desired_state": "running"}')
    status = host.box.exec(MANAGER, "status").stdout
    assert "stays down (multiplex_profiles leaves it to the default gateway)" in status
    found = host.box.exec(MANAGER, "doctor").stdout
    assert "pass  coder: down, since multiplex_profiles leaves it to the default gateway\n" in found
    done = host.box.exec(MANAGER, "gateway", "restart", "--all")
    assert done.stdout == "default: restarted\n" and host.starts("coder") == 0, done
    done = host.do("start", "-p", "coder")  # the agent would end it again and again
    line = "hermes-boot: error: coder: default serves it (multiplex_profiles); `hermes -p default gateway restart`\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert host.box.exec(MANAGER, "gateway", "stop", "--all").stdout == "coder: stopped\ndefault: stopped\n"
    assert host.do("start", "-p", "gateway-default").returncode == 0 and host.up("default")
