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
    "any flag": ("main_wrapper.py", 'rest[2:] not in ([], ["--all"])', "False"),
    "any action": ("main_wrapper.py", "rest[:2] not in ours", "len(rest) < 2"),
    "blanks": ("hermes_boot.py", "value.strip().lower()", "value.lower()"),
    "every newline": ("hermes_boot.py", '.removesuffix(b"\\n"))', ".rstrip())"),
    "a profile's home": ("hermes_boot.py", 'os.path.basename(parent) == "profiles"', "False"),
    "a leading dash": ("hermes_boot.py", 'name[:1] in ("", "-", "_")', 'name[:1] == ""'),
    "one byte more": ("hermes_boot.py", "> SLOT_NAME_LIMIT:", "> SLOT_NAME_LIMIT + 1:"),
    "the gateway's word": ("hermes_boot.py", 'intent = state.get("desired_state")', "intent = None"),
    "draining": ("hermes_boot.py", '("draining", "degraded")', '("degraded",)'),
    "back-off of four": ("hermes_boot.py", "if row > 4 else 0", "if row > 3 else 0"),
    "no limit": ("hermes_boot.py", "min(2 ** (row - 4), BACK_OFF_LIMIT)", "2 ** (row - 4)"),
    "root in run": ("hermes_boot.py", 'f"exec s6-setuidgid {USER} {command}"', 'f"exec {command}"'),
    "somebody's rc.init": ("hermes_boot.py", 'names.index("rc.init") if "rc.init" in names else len(names)', "0"),
    "UID 0": ("hermes_boot.py", "least <= int(value) <= most", "int(value) <= most"),
    "a secret for all": ("hermes_boot.py", '(".env", 0o600,', '(".env", 0o644,'),
}


# What reads the scripts as a text, which a mistake leaves as well-formed as it was
OF_THE_TEXT = ("same_text", "imports_the_other", "bound_twice")
# Each mistake has a process, forked where pytest has been imported
RUN = f"""
import os, sys
import pytest, _pytest.config
_pytest.config.get_config()
for folder in sys.argv[1:]:
    if os.fork() == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        with open("output", "w") as output:
            os.dup2(output.fileno(), 1)
        plain = ["-s", "--assert=plain", "-p", "no:logging", "-p", "no:unraisableexception"]  # a quarter faster
        options = ["-q", "-x", *plain, "-k", {" and ".join(f"not {name}" for name in OF_THE_TEXT)!r}]
        code = pytest.main([*options, "--rootdir", folder, "test_rules.py"])
        with open("code", "w") as file:
            file.write(str(int(code)))
        os._exit(0)
    os.wait()
"""


def make(folder: Path, mutant: str) -> Path:
    """Put the scripts with a mistake, in both where the text stands in both, and the tests of the rules into a
    folder."""
    script, text, mistake = MUTANTS.get(mutant, ("hermes_boot.py", "", ""))
    assert text in (PROJECT / script).read_text(), f"the rule of {mutant!r} has moved; bring the table up to date"
    folder.mkdir()
    for name in ("hermes_boot.py", "main_wrapper.py"):
        (folder / name).write_text((PROJECT / name).read_text().replace(text, mistake))
    shutil.copy(PROJECT / "tests/test_rules.py", folder)
    return folder


@pytest.mark.long
def test_each_mistake_is_noticed(tmp_path):
    """Of the table: test_rules.py fails with it, and passes without any."""
    folders = {mutant: make(tmp_path / str(number), mutant) for number, mutant in enumerate(["", *MUTANTS])}
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", RUN, *folders.values()], env=environment, check=True)
    codes = {mutant: int((folder / "code").read_text()) for mutant, folder in folders.items()}
    said = {mutant: (folders[mutant] / "output").read_text()[-2000:] for mutant in codes}
    assert codes == {"": 0} | dict.fromkeys(MUTANTS, 1), [said[mutant] for mutant in codes if codes[mutant] != 1]
