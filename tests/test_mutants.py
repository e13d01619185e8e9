"""The rules' tests can fail: each of these mistakes in a script is noticed by test_rules.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
# a mistake's name: the script, what stands there, what the mistake makes of it
MUTANTS = {
    "another user's line": ("hermes_boot.py", 'line.startswith(name + b":")', "line.startswith(name)"),
    "a group by name": ("hermes_boot.py", "fields[2] in missing", "fields[0] in missing"),
    "a member twice": ("hermes_boot.py", "if member not in members:", "if True:"),
    "any PATH entry": ("main_wrapper.py", "os.path.isfile(path) and os.access(path, os.X_OK)", "os.path.exists(path)"),
    "a dash": ("main_wrapper.py", 'and not word.startswith("-")', ""),
    "any flag": ("main_wrapper.py", 'or rest[2:] not in ([], ["--all"])', ""),
    "any action": ("main_wrapper.py", 'rest[1] not in ("start", "stop", "restart")', "False"),
    "blanks": ("hermes_boot.py", "value.strip().lower()", "value.lower()"),
    "every newline": ("hermes_boot.py", '.removesuffix(b"\\n"))', ".rstrip())"),
    "a profile's home": ("hermes_boot.py", 'os.path.basename(parent) == "profiles"', "False"),
    "a leading dash": ("hermes_boot.py", 'name[:1] in ("", "-", "_")', 'name[:1] == ""'),
    "one byte more": ("hermes_boot.py", "> SLOT_NAME_LIMIT:", "> SLOT_NAME_LIMIT + 1:"),
    "the gateway's word": ("hermes_boot.py", 'intent = state.get("desired_state")', "intent = None"),
    "draining": ("hermes_boot.py", '("draining", "degraded")', '("degraded",)'),
    "back-off of four": ("hermes_boot.py", '[float("-inf")] * 4', '[float("-inf")] * 3'),
    "no limit": ("hermes_boot.py", "min(delay * 2, BACK_OFF_LIMIT)", "delay * 2"),
    "root in run": ("hermes_boot.py", 'f"exec s6-setuidgid {USER} {command}"', 'f"exec {command}"'),
    "somebody's rc.init": ("hermes_boot.py", 'names.index("rc.init") if "rc.init" in names else len(names)', "0"),
    "UID 0": ("hermes_boot.py", "least <= int(value) <= most", "int(value) <= most"),
    "a secret for all": ("hermes_boot.py", '(".env", 0o600,', '(".env", 0o644,'),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(tmp_path, mutant):
    """In both scripts where the text stands in both."""
    script, text, mistake = MUTANTS[mutant]
    for name in ("hermes_boot.py", "main_wrapper.py"):
        shutil.copy(PROJECT / name, tmp_path)
    source = (PROJECT / script).read_text()
    assert text in source, "the rule has moved; bring this table up to date"
    for name in ("hermes_boot.py", "main_wrapper.py"):
        path = tmp_path / name
        path.write_text(path.read_text().replace(text, mistake))
    rules = shutil.copy(PROJECT / "tests/test_rules.py", tmp_path)
    argv = [sys.executable, "-m", "pytest", "-q", "-x", "--assert=plain", "--rootdir", str(tmp_path), rules]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, f"no test of test_rules.py fails:\n{done.stdout[-2000:]}"
