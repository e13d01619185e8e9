"""Several at once on one volume, secrets, and volumes that nobody thought of."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading

import pytest
import sandbox

import hermes_boot
from hermes_boot import Boot, Folder

RUNNING = {"desired_state": "running"}


@pytest.mark.sandbox
def test_two_containers_boot_one_volume_at_the_same_time(container, tmp_path):
    """Five times over: both end with 0, every seed is whole, and nothing temporary is left."""
    volume = tmp_path / "volume"
    boxes = [container(), container()]
    for _ in range(5):
        subprocess.run(["rm", "-rf", volume], check=True)
        (volume / "profiles/a").mkdir(parents=True)
        (volume / "profiles/a/SOUL.md").touch()
        running = [
            subprocess.Popen(box.command(["sleep", "0.5"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for box in boxes
        ]
        results = [process.communicate(timeout=60) for process in running]
        assert [process.returncode for process in running] == [0, 0], results
        assert all(b"Traceback" not in err for _, err in results), results
        for name, text in hermes_boot.BUILT_IN.items():
            assert (volume / name).read_text() == text and (volume / name).stat().st_nlink == 1
        assert list(volume.rglob("*.tmp")) == []


def test_no_update_of_another_key_is_lost_between_our_own_writers(tmp_path):
    """Four processes change four keys of one state file, 50 times each: all 200 changes are there."""
    (tmp_path / "state.json").write_text("{}")
    children = []
    for key in "abcd":
        child = os.fork()
        if child == 0:
            try:
                with Folder(str(tmp_path)) as folder:
                    for number in range(1, 51):

                        def edit(data: bytes | None) -> bytes:
                            state = json.loads(data or b"{}")
                            assert state.get(key, 0) == number - 1
                            return json.dumps(state | {key: number}).encode()

                        folder.update("state.json", edit, 1 << 20)
                os._exit(0)
            finally:
                os._exit(1)  # else it would go on as a second pytest
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert json.loads((tmp_path / "state.json").read_text()) == dict.fromkeys("abcd", 50)
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_writer_that_takes_no_lock_is_seen(tmp_path):
    """hermes-agent replaces its state file without our lock; a change of its between our look and our rename is
    kept."""
    (tmp_path / "state.json").write_text("{}")
    calls = []

    def edit(data: bytes | None) -> bytes:
        if len(calls) < 3:  # while we think, the agent writes
            (tmp_path / "new").write_text(json.dumps({"agent": len(calls) + 1}))
            (tmp_path / "new").rename(tmp_path / "state.json")
        calls.append(data)
        return json.dumps(json.loads(data or b"{}") | {"ours": 1}).encode()

    with Folder(str(tmp_path)) as folder:
        folder.update("state.json", edit, 1 << 20)
    assert json.loads((tmp_path / "state.json").read_text()) == {"agent": 3, "ours": 1}


@pytest.mark.long
def test_a_stop_during_a_reconcile_is_not_forgotten(container, tmp_path):
    """The operator's word stands, whatever the reconciler does meanwhile."""
    folder = tmp_path / "volume/profiles/a"
    folder.mkdir(parents=True)
    (folder / "SOUL.md").touch()
    (folder / "gateway_state.json").write_text(json.dumps(RUNNING | {"kept": 1}))
    box = container()
    box.put_agent("#!/bin/sh\nexec sleep infinity\n")
    box.start("sleep", "infinity")
    reconcile = subprocess.Popen(
        box.exec_command(
            [
                "sh",
                "-c",
                "for i in 1 2 3 4 5 6 7 8 9 10; do /opt/hermes/docker/boot reconcile || exit 1; done",
            ]
        ),
        stderr=subprocess.PIPE,
    )
    for action, state in (("stop", "stopped"), ("start", "running")) * 3 + (("stop", "stopped"),):
        done = box.exec("/opt/hermes/docker/boot", "gateway", action, "-p", "a")
        assert done.returncode == 0, done
        assert json.loads((folder / "gateway_state.json").read_text()) == {"desired_state": state, "kept": 1}
    _, err = reconcile.communicate(timeout=60)
    assert reconcile.returncode == 0 and b"Traceback" not in err
    box.restart()
    assert box.path("/run/service/gateway-a/down").exists()


def test_the_real_agent_writes_its_state_while_boots_run(container, tmp_path):
    """hermes-agent's own writer goes on during ten boots and starts: no boot finds half a file, no key is lost."""
    folder = tmp_path / "volume/profiles/a"
    folder.mkdir(parents=True)
    (folder / "SOUL.md").touch()
    (folder / "gateway_state.json").write_text(json.dumps(RUNNING | {"kept": 1}))
    box = container(agent=True)
    box.start("sleep", "infinity")
    writer = (
        "import itertools, os, time\nfrom gateway.status import write_runtime_status\n"
        "for number in itertools.count(1):\n"
        " write_runtime_status(gateway_state='running', active_agents=number)\n"
        " open('/tmp/written', 'w').write(str(number))\n"
        " if os.path.exists('/tmp/stop'): break\n time.sleep(0.001)\n"
    )
    argv = box.exec_command(
        ["/opt/hermes/.venv/bin/python", "-c", writer], "hermes", {"HERMES_HOME": "/opt/data/profiles/a"}
    )
    agent = subprocess.Popen(argv)
    try:
        assert sandbox.wait_for(lambda: box.path("/tmp/written").exists(), 60)  # the agent's imports, on a cold disk
        for _ in range(10):
            done = box.exec("/opt/hermes/docker/boot")
            assert done.returncode == 0 and "profile=a prior_state=running action=started" in done.stderr, done
            assert box.exec("/opt/hermes/docker/boot", "gateway", "start", "-p", "a").returncode == 0
    finally:
        box.path("/tmp/stop").touch()
        agent.wait(30)
    written = int(box.path("/tmp/written").read_text())
    state = json.loads((folder / "gateway_state.json").read_text())
    assert written > 100
    assert (state["active_agents"], state["kept"], state["desired_state"]) == (written, 1, "running")


@pytest.mark.sandbox
def test_secrets_are_in_no_log_no_argument_and_never_readable(container, tmp_path):
    """While boots run, another user looks at every file and every process; at the end the logs are searched."""
    secret = f"s3cr3t-{os.urandom(8).hex()}"  # no other run of this test on this machine has the same
    volume = tmp_path / "volume"
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    box = container(environment={"HERMES_AUTH_JSON_BOOTSTRAP": json.dumps({"token": secret})})
    (box.upper / "opt/hermes/.env.example").write_text(f"KEY={secret}\n")
    seen: list[str] = []
    ended = threading.Event()
    spy = (
        "import os, sys\nos.setgid(12345)\nos.setuid(12345)\nprint('ready', flush=True)\nwhile True:\n"
        " for name in os.listdir(sys.argv[1]) if os.path.isdir(sys.argv[1]) else []:\n"
        "  try:\n   if sys.argv[2] in open(f'{sys.argv[1]}/{name}').read(): print(name, flush=True)\n"
        "  except (OSError, ValueError): pass\n"
    )
    watcher = subprocess.Popen(
        [base_python(), "-IS", "-c", spy, str(volume), secret], stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout.readline() == "ready\n"

    def look_at_arguments() -> None:
        while not ended.is_set():
            for process in filter(str.isdigit, os.listdir("/proc")):
                try:
                    with open(f"/proc/{process}/cmdline", "rb") as file:
                        if secret.encode() in file.read() and int(process) != watcher.pid:
                            seen.append(process)
                except OSError:
                    continue

    thread = threading.Thread(target=look_at_arguments)
    thread.start()
    try:
        for _ in range(5):
            for name in ("auth.json", ".env"):
                (volume / name).unlink(missing_ok=True)
            done = box.run("/opt/hermes/docker/boot", "--dry-run")
            assert secret.encode() not in done.stdout + done.stderr
            assert secret in (volume / "auth.json").read_text() and secret in (volume / ".env").read_text()
    finally:
        ended.set()
        thread.join()
        watcher.kill()
    assert watcher.stdout.read() == "" and seen == []
    assert secret not in (volume / "logs/container-boot.log").read_text()


def base_python() -> str:
    """Return a Python that an unprivileged user can start."""
    return "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable


SEED = int(os.environ.get("HERMES_TEST_SEED", "20260521"))
VOLUMES = int(os.environ.get("HERMES_TEST_VOLUMES", "300"))
STATES = ["running", "stopped", "draining", "degraded", "starting", "", "RUNNING", 7, None, [], {}]


def random_volume(dice: random.Random, home: str) -> dict[str, bool]:
    """Make a volume of random profiles and rubbish; return the good ones and whether each starts."""
    good: dict[str, bool] = {}
    os.makedirs(f"{home}/profiles")
    for _ in range(dice.randrange(8)):
        name = "".join(dice.choice("ab-_Z9 \n'$\udcff.") for _ in range(dice.randrange(1, 4)))
        folder = f"{home}/profiles/{name}"
        if name in (".", "..") or os.path.lexists(folder):
            continue
        kind = dice.randrange(8)
        if kind == 0:
            os.symlink(dice.choice(["/etc", "x", name]), folder)
            continue
        if kind == 1:
            os.mkfifo(folder)
            continue
        os.mkdir(folder)
        soul = dice.randrange(6)
        (os.mkfifo if soul == 0 else os.mkdir if soul == 1 else touch if soul > 2 else len)(f"{folder}/SOUL.md")
        state = {key: dice.choice(STATES) for key in ("desired_state", "gateway_state") if dice.random() < 0.7}
        text = json.dumps(state)
        whole = dice.random() < 0.8
        if dice.random() < 0.9:
            with open(f"{folder}/gateway_state.json", "w") as file:
                file.write(text if whole else text[: dice.randrange(len(text))])
        else:
            whole, state = True, {}
        for stale in ("gateway.pid", "processes.json"):
            if dice.random() < 0.3:
                dice.choice([touch, os.mkdir, os.mkfifo])(f"{folder}/{stale}")
        if soul > 2 and set(name) <= set("ab-_9") and name[0] in "ab9":
            intent = state.get("desired_state")
            running = (
                intent == "running"
                if intent is not None
                else state.get("gateway_state") in ("running", "draining", "degraded")
            )
            good[name] = whole and running
    return good


def touch(path: str) -> None:
    """Make an empty file."""
    open(path, "w").close()


@pytest.mark.long
def test_random_volumes(stays_itself, tmp_path, capfd):
    """Each boot ends with 0 and brings up exactly the good profiles; a second one changes nothing."""
    print(f"HERMES_TEST_SEED={SEED}")
    dice = random.Random(SEED)
    for number in range(VOLUMES):
        home, scandir = f"{tmp_path}/{number}/home", f"{tmp_path}/{number}/scandir"
        good = random_volume(dice, home)
        os.mkdir(scandir)
        boot = Boot({"HERMES_HOME": home, "S6_PROFILE_GATEWAY_SCANDIR": scandir, "HERMES_BOOT_QUIET": "1"})
        before = None
        for _ in range(2):
            assert hermes_boot.guarded(hermes_boot.reconcile, boot, []) == 0, (SEED, number)
            slots = {
                name.removeprefix("gateway-"): not os.path.exists(f"{scandir}/{name}/down")
                for name in os.listdir(scandir)
                if name != "gateway-default"
            }
            assert slots == good, (SEED, number)
            now = [
                (path, os.lstat(f"{path}/{name}").st_mtime_ns) for path, _, files in os.walk(scandir) for name in files
            ]
            assert before in (None, now), (SEED, number)
            before = now
        subprocess.run(["rm", "-rf", f"{tmp_path}/{number}"], check=True)
    assert "Traceback" not in capfd.readouterr().err
