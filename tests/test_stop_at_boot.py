"""A stop that comes while the container boots: it ends at once, and nothing is left half done."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import busy
from sandbox import ENTRYPOINT, wait_for, write_script

PLACES = pytest.mark.parametrize("entrypoint", [(), ENTRYPOINT], ids=["PID 1", "below another"])


def stop_when(box, script: Path, text: str, ready: str) -> tuple[int, float, str]:
    """Run a container with a boot script, and stop it once that has made a file; return code, seconds and stderr."""
    if script.name.endswith("up"):
        (script.parent / "type").parent.mkdir(parents=True, exist_ok=True)
        (script.parent / "type").write_text("oneshot\n")
        (script.parent / "dependencies.d").mkdir()
        (script.parent / "dependencies.d/base").touch()
        (script.parent.parent / "user/contents.d" / script.parent.name).touch()
        script.write_text(text)
    else:
        write_script(script, text)
    process = subprocess.Popen(box.command(["echo", "command"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    box.process = process
    assert wait_for(lambda: box.init() and box.path(ready).exists(), 20)
    started = time.monotonic()
    box.signal(signal.SIGTERM)
    out, said = process.communicate(timeout=30)
    assert out == b"" and b"later" not in said, (out, said)
    return process.returncode, time.monotonic() - started, said.decode()


KEPT_RUN = ("/bin/sh", "-c", 'echo 80 1 >/run/hermes-command; exec "$@"', "sh", *ENTRYPOINT)


@PLACES
@pytest.mark.sandbox
@pytest.mark.parametrize("name", ["00-before", "50-after"])
def test_a_script_of_the_users_ends(container, entrypoint, name):
    """However long it would go on, on what an earlier start has left in /run too; it gets SIGTERM, what follows never
    starts, cont-finish.d's scripts may run."""
    box = container(entrypoint=KEPT_RUN) if entrypoint else container(first=KEPT_RUN)
    write_script(box.upper / "etc/cont-init.d/60-later", "#!/bin/sh\necho later >&2\n")
    text = "#!/bin/sh\ntrap 'echo told >&2; exit 1' TERM\ntouch /run/slow\nwhile :; do sleep 0.05; done\n"
    code, took, said = stop_when(box, box.upper / "etc/cont-init.d" / name, text, "/run/slow")
    assert took < 3 * busy(), (took, said)
    assert code == 143 and "told\n" in said, (code, said)


@PLACES
@pytest.mark.sandbox
def test_a_command_that_is_just_starting_ends(container, entrypoint):
    """The wrapper leaves its pid while the gateways drain: the shutdown would wait for a command that nobody told."""
    box = container(entrypoint=entrypoint, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    drain = "trap 'sleep 2; exit 0' TERM\ntouch $HERMES_HOME/up\nwhile :; do sleep 0.05; done\n"
    box.put_agent(f"#!/bin/sh\n{drain}")
    wrapper = box.upper / "opt/hermes/docker/main-wrapper.sh"
    wrapper.unlink()
    wait = "until [ -e /opt/data/up ]; do sleep 0.05; done\ntouch /run/slow\nsleep 1\n"
    text = f"#!/bin/sh\n{wait}exec /opt/hermes/docker/wrapper sleep infinity\n"
    code, took, said = stop_when(box, wrapper, text, "/run/slow")
    assert (code, took < 3 * busy()) == (143, True), (code, took, said)


@PLACES
@pytest.mark.sandbox
def test_one_that_minds_no_signal_is_killed(container, entrypoint):
    """After a second, with what it has started."""
    text = "#!/bin/sh\ntrap '' TERM\ntouch /run/slow\nwhile :; do sleep 0.05; done\n"
    box = container(entrypoint=entrypoint)
    code, took, said = stop_when(box, box.upper / "etc/cont-init.d/50-deaf", text, "/run/slow")
    assert (code, took < 3 * busy()) == (143, True), (code, took, said)


@PLACES
@pytest.mark.sandbox
def test_a_oneshot_of_a_derived_image_ends_too(container, entrypoint):
    """It is part of the boot."""
    box = container(entrypoint=entrypoint)
    up = box.upper / "etc/s6-overlay/s6-rc.d/slow/up"
    up.parent.mkdir()
    code, took, said = stop_when(box, up, "foreground { touch /run/slow }\nsleep 100\n", "/run/slow")
    assert (code, took < 3 * busy()) == (143, True), (code, took, said)


HELPER = """#!/bin/sh
trap '' TERM
touch $HERMES_HOME/migrating
sleep 100 & wait; wait
"""


@PLACES
@pytest.mark.sandbox
def test_the_setup_ends_with_its_helpers(container, tmp_path, entrypoint):
    """While the agent migrates the configuration and minds no signal; the next boot does it again, and all is whole."""
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "config.yaml").write_text("a: 1\n")
    box = container(entrypoint=entrypoint)
    (box.upper / "opt/hermes/.venv/lib/python3.9/site-packages/hermes_agent-9.9.dist-info").mkdir(parents=True)
    box.put_agent(HELPER)
    write_script(box.upper / "etc/cont-init.d/60-later", "#!/bin/sh\necho later >&2\n")
    process = subprocess.Popen(box.command(["echo", "command"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    box.process = process
    assert wait_for(lambda: (volume / "migrating").exists(), 20)
    started = time.monotonic()
    box.signal(signal.SIGTERM)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, b"") and b"later" not in said, (out, said)
    assert time.monotonic() - started < 3 * busy() and not (volume / ".hermes-agent-version").exists()
    box.put_agent("#!/bin/sh\nexit 0\n")
    (box.upper / "etc/cont-init.d/60-later").unlink()
    done = box.run("sh", "-c", "cat .hermes-agent-version; find . -name '*.tmp'")
    assert (done.returncode, done.stdout) == (0, b"9.9\n"), done


@pytest.mark.parametrize("phase", ["setup", "reconcile"])
def test_a_phase_ends_on_sigterm(container, phase):
    """Run by hand too: within a second, while another process holds what it waits for; code 143, no child left."""
    box = container()
    box.put_agent("#!/bin/sh\nexit 0\n")
    box.start("sleep", "infinity")
    script = f"""
        mkfifo /tmp/stderr
        hermes-boot {phase} 2>/tmp/stderr & boot=$!
        exec 3</tmp/stderr
        kill -STOP $boot; kill -TERM $boot; kill -CONT $boot
        wait $boot; echo $?
    """
    done = box.exec("sh", "-c", script)
    assert done.stdout == "143\n", done


@pytest.mark.parametrize("user", [None, "hermes"], ids=["root", "hermes"])
def test_a_command_ends_on_sigterm(gateways, user):
    """For root too, in whose name it works as hermes: code 143, and nobody goes on with it."""
    host = gateways({"a": "trap '' TERM\necho ready\nwhile :; do sleep 0.1; done\n"}, "running")
    assert wait_for(lambda: "ready" in host.box.log())
    script = """
        hermes-boot gateway stop -p a & command=$!
        while ! grep -q stopped /opt/data/profiles/a/gateway_state.json; do sleep 0.05; done
        kill $command; wait $command; echo $?
    """
    done = host.box.exec("sh", "-c", script, user=user)
    assert done.stdout == "143\n", done
    assert wait_for(lambda: not any("gateway stop" in line for line in host.box.processes().values()), 2)
    assert host.up("a")


@PLACES
@pytest.mark.parametrize("delay", [0, 0.1, 0.2, 0.5])
def test_at_any_moment(container, entrypoint, delay):
    """From when somebody takes the signal on: until s6-svscan is there, the kernel drops it for PID 1."""
    box = container(entrypoint=entrypoint, environment={"HERMES_GATEWAY_BOOTSTRAP_STATE": "running"})
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    process = subprocess.Popen(box.command(["sleep", "infinity"]), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    box.process = process
    ready = "/run/hermes-supervisor" if entrypoint else "/run/service/.s6-svscan/lock"
    assert wait_for(lambda: box.init() and box.path(ready).exists(), 20)
    time.sleep(delay)
    started = time.monotonic()
    box.signal(signal.SIGTERM)
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 3 * busy(), said
