"""The image's files without an engine: what the Dockerfile makes of the checkout, and stand-ins for what it fetches.

The Dockerfile is read and not repeated: its ENV, what it copies, what it changes of s6-overlay's files, and the
commands that it runs after a stage's first COPY of ours. Those run in a copy-on-write root of this machine's. What an
engine would fetch comes from elsewhere:

- packages and accounts: this machine's root, and the account files of sandbox.py.
- s6-overlay: the scripts in docker/stand-in, with the s6 and execline of Debian forky, the release that s6-overlay
  3.2.3.0 has. HERMES_TEST_S6=system takes this machine's s6; HERMES_TEST_DEBIAN_MIRROR names another mirror.
- hermes-agent: from PyPI, into a virtual environment.

All of it is kept below the checkout's .cache; the machine stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sandbox import CACHE, PROJECT, CannotShow, Sandbox, base_python, maker, on_overlay  # noqa: F401

STAND_IN = Path(__file__).resolve().parent / "docker/stand-in"
MIRROR = os.environ.get("HERMES_TEST_DEBIAN_MIRROR", "http://deb.debian.org/debian")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITE = "forky"
PACKAGES = ("s6", "execline", "libs6-", "libexecline", "libskarnet", "libnsss", "libutmps")
PROGRAMS = re.compile(r"s6-[a-z0-9-]+|ucspilogd")
LIBRARIES = re.compile(r"lib(s6(auto)?|execline|skarnet)\.so\..*|s6")
KEPT_LAYERS = 8
BUILD = """
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t tmpfs tmpfs opt
mkdir opt/hermes names
mount --bind "$2/opt/hermes" opt/hermes
mount --bind "$2/names" names
mount --bind /dev dev
[ -e usr/bin/python3 ] || ln -s "$3" usr/bin/python3
exec chroot . env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SOURCE_DATE_EPOCH=0 sh -ec "$4"
"""
VENV = """
mount -t tmpfs tmpfs /opt
mkdir -p /opt/hermes/.venv
mount --bind "$1" /opt/hermes/.venv
"""
AGENT = """
cd /opt/hermes/.venv
"$2" -m venv . || "$2" -m venv --clear --without-pip .
if [ -e bin/pip ]; then pip=bin/pip; else pip="$3 -m pip --python bin/python"; fi
$pip --disable-pip-version-check -q install pip "hermes-agent==$4"
"""
LOADER_CACHE = """
mount -t overlay overlay -o "lowerdir=$1:$2" "$2"
mount -t tmpfs tmpfs /var/cache
PATH=$PATH:/usr/sbin:/sbin
! command -v ldconfig >/dev/null || ldconfig -X -C "$3"
"""


class CannotFetch(Exception):
    """What this machine lacks cannot be had."""


# The Dockerfile


class Instruction(NamedTuple):
    """One instruction, its continued lines put together; a stage without a name has its number."""

    stage: str
    keyword: str
    text: str


@cache
def dockerfile() -> list[Instruction]:
    """Return the Dockerfile's instructions; a FROM belongs to the stage that it begins."""
    lines = (PROJECT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", "")
    found: list[Instruction] = []
    stage, stages = "", 0
    for line in filter(str.strip, text.splitlines()):
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            words = rest.split()
            stage, stages = (words[2] if len(words) == 3 else str(stages)), stages + 1
        found.append(Instruction(stage, keyword, rest.strip()))
    return found


def instructions(keyword: str, stage: str | None = None) -> list[str]:
    """Return the texts of a stage's instructions of one kind; without a stage, of the last one's."""
    stage = dockerfile()[-1].stage if stage is None else stage
    return [found.text for found in dockerfile() if (found.stage, found.keyword) == (stage, keyword)]


@cache
def environment() -> dict[str, str]:
    """Return the image's ENV."""
    return dict(word.split("=", 1) for text in instructions("ENV") for word in shlex.split(text))


@cache
def agent_version() -> str:
    """Return the version of hermes-agent that the image has."""
    (version,) = re.findall(r"^HERMES_AGENT_VERSION=(\S+)$", "\n".join(instructions("ARG", "")), re.M)
    return version


def own_steps(stage: str) -> tuple[list[list[str]], str]:
    """Return a stage's copies from the checkout, as words, and the shell commands that follow the first of them."""
    copies: list[list[str]] = []
    commands: list[str] = []
    for found in dockerfile():
        if found.stage == stage and found.keyword == "COPY" and not found.text.startswith("--from="):
            copies.append(shlex.split(found.text))
        elif found.stage == stage and found.keyword == "RUN" and copies:
            commands.append(found.text)
    return copies, "\n".join(commands)


# What this machine may lack


def call(*argv: str | Path, **options) -> str:
    """Run a program and return its stdout; raise CannotFetch with its last words when it fails."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)
    if done.returncode:
        raise CannotFetch(f"{argv[0]} ended with {done.returncode}: {' '.join(done.stderr.split()[-40:])}")
    return done.stdout


def fetch_s6(name: str, suite: str) -> Path:
    """Return a folder with Debian's s6 and execline unpacked, of a suite, or of this machine's lists ("")."""
    root = CACHE / name
    if root.exists():
        return root
    if not shutil.which("apt-get"):
        raise CannotFetch("there is no apt-get here")
    print(f"sandbox: fetching s6{f' of Debian {suite}' if suite else ''}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=made(CACHE)) as folder:
        options = apt_options(Path(folder), suite)
        depends = ["depends", "--recurse", "--no-suggests", "--no-recommends", "s6", "execline"]
        lines = call("apt-cache", *options, *depends).splitlines()
        part = unpack(options, suite, {line for line in lines if line.startswith(PACKAGES)}, Path(folder, "root"))
        (libraries,) = {path.parent for path in part.glob("usr/lib/*/libskarnet.so.*")}
        call(part / "usr/lib/execline/bin/exit", "0", env={"LD_LIBRARY_PATH": str(libraries)})  # a libc that it can use
        if not root.exists():
            part.rename(root)
    return root


def apt_options(apt: Path, suite: str) -> list[str]:
    """Return the options of apt with lists of a folder's own, which are fetched: a suite's, or this machine's ("")."""
    for part in ("lists/partial", "archives/partial"):
        (apt / part).mkdir(parents=True)
    options = ["-qq", "-o", f"Dir::State::lists={apt}/lists", "-o", f"Dir::Cache={apt}"]
    options += ["-o", "APT::Sandbox::User=root", "-o", "Acquire::Check-Valid-Until=false"]  # signed, if not fresh
    if suite:
        (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {suite} main\n")
        options += ["-o", f"Dir::Etc::sourcelist={apt}/sources.list", "-o", "Dir::Etc::sourceparts=-"]
    call("apt-get", *options, "update")
    return options


def unpack(options: list[str], suite: str, packages: set[str], root: Path) -> Path:
    """Download packages and unpack them into a folder, which is returned; /bin and /lib are in its /usr."""
    names = (f"{package}/{suite}" if suite else package for package in sorted(packages))
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        call("apt-get", *options, "download", *names, cwd=folder)
        for package in Path(folder).glob("*.deb"):
            call("dpkg", "-x", package, root)
    for merged in ("bin", "lib"):  # links on a merged-/usr system, which folders here would hide
        if (root / merged).is_dir():
            shutil.copytree(root / merged, root / "usr" / merged, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(root / merged)
    return root


def made(folder: Path) -> Path:
    """Return a folder that exists from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def s6_root() -> Path:
    """Return where s6 and execline are, as their packages lay them out: a folder, or /."""
    if os.environ.get("HERMES_TEST_S6") != "system":
        try:
            return fetch_s6(f"s6-{SUITE}", SUITE)
        except CannotFetch as error:
            print(f"sandbox: warning: no s6 of Debian {SUITE} ({error}); taking this machine's", file=sys.stderr)
    installed = os.path.exists("/usr/bin/s6-svscan") and os.path.exists("/usr/lib/execline/bin/execlineb")
    return Path("/") if installed else fetch_s6("s6-system", "")


def agent_venv() -> Path:
    """Return a virtual environment with hermes-agent, made for the path /opt/hermes/.venv."""
    venv = CACHE / f"venv-{agent_version()}"
    if not venv.exists():
        print(f"sandbox: fetching hermes-agent {agent_version()} from PyPI, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=made(CACHE)) as folder:
            part = made(Path(folder, "hermes/.venv"))
            words = [part, base_python(), sys.executable, agent_version()]
            if maker()[0] is Sandbox:
                call("unshare", "-m", "sh", "-ec", VENV + AGENT, "sh", *words)
            else:
                import in_place

                in_place.at_home({"/opt/hermes": part.parent}, lambda: call("sh", "-ec", AGENT, "sh", *words))
            if not venv.exists():
                part.rename(venv)
    return venv


# The layer


def put_s6_overlay(layer: Path) -> None:
    """Put what stands in for s6-overlay into a folder, as its tarballs would: /init, /command, /package, /usr/bin."""
    shutil.copytree(STAND_IN, layer, symlinks=True, dirs_exist_ok=True)
    for name in os.listdir(STAND_IN / "command"):
        (made(layer / "usr/bin") / name).symlink_to(f"../../command/{name}")
    put_s6(layer, s6_root())


def put_s6(layer: Path, root: Path) -> None:
    """Put s6 and execline into /command, with their libraries; into /usr/bin only what they call there by path."""
    programs = [path for path in (root / "usr/bin").iterdir() if PROGRAMS.fullmatch(path.name)]
    libraries = [path for path in root.glob("usr/lib/*/*") if LIBRARIES.fullmatch(path.name)]
    execline = root / "usr/lib/execline/bin"
    called = {name for path in [*programs, *libraries] if path.is_file() for name in calls(path)}
    for path in programs:
        shutil.copy(path, layer / "command")
        if path.name in called:
            shutil.copy(path, layer / "usr/bin")
    shutil.copytree(execline, layer / "command", dirs_exist_ok=True)
    shutil.copytree(execline, layer / "usr/lib/execline/bin")
    for path in libraries if root != Path("/") else []:
        target = layer / path.relative_to(root)
        made(target.parent)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy(path, target, follow_symlinks=False)


def put_loader_cache(layer: Path) -> None:
    """Put an ld.so.cache of this machine's libraries and s6's into a folder: looking for these in every folder where
    they might be is a quarter of what the start of an s6 program costs. What it has not is looked for as ever."""
    for libraries in layer.glob("usr/lib/*-linux-*"):
        words = [libraries, f"/{libraries.relative_to(layer)}", made(layer / "etc") / "ld.so.cache"]
        call("unshare", "-m", "sh", "-ec", LOADER_CACHE, "sh", *words)


def calls(program: Path) -> set[str]:
    """Return the names of the programs in /usr/bin whose paths are in a program."""
    return {name.decode() for name in re.findall(rb"/usr/bin/(s6-[a-z0-9-]+)", program.read_bytes())}


def put_scripts(layer: Path) -> None:
    """Change s6-overlay's files as its stage does; then do the last stage's copies, with what the stages that they copy
    from make of the checkout."""
    steps = "\n".join(instructions("RUN", "s6-overlay"))
    (target,) = re.findall(r"\bln -s (\S+) /s6/init\b", steps)
    (layer / "init").rename(layer / "init.s6-overlay")
    (layer / "init").symlink_to(target)
    for edit, path in re.findall(r"\bsed -i '([^']+)' /s6/(\S+);", steps):
        before = (layer / path).read_text()
        call("sed", "-i", edit, layer / path)
        assert (layer / path).read_text() != before, f"{edit} finds nothing in {path}"
    copy_from_checkout(own_steps(dockerfile()[-1].stage)[0], layer)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        built = Path(folder)
        build("scripts", built)
        for source, target in (text.split()[1:] for text in instructions("COPY") if text.startswith("--from=scripts ")):
            shutil.copytree(built / source.strip("/"), layer / target.strip("/"), symlinks=True, dirs_exist_ok=True)


def build(stage: str, folder: Path) -> None:
    """Do a stage's own steps over this machine's root; what they put into /opt/hermes and /names comes to a folder."""
    copies, commands = own_steps(stage)
    made(folder / "opt/hermes")
    made(folder / "names")
    copy_from_checkout(copies, folder)
    if maker()[0] is not Sandbox:
        import in_place

        homes = {"/opt/hermes": folder / "opt/hermes", "/names": folder / "names"}
        argv, variables = ["sh", "-ec", commands], os.environ | {"SOURCE_DATE_EPOCH": "0"}
        in_place.at_home(homes, lambda: subprocess.run(argv, env=variables, check=True, stdout=sys.stderr))
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        prepare = f"mount -t tmpfs tmpfs {shlex.quote(work)}\n" if on_overlay(work) else ""
        prepare += f"cd {shlex.quote(work)}\nmkdir upper work root\n"
        argv = ["unshare", "-m", "sh", "-ec", prepare + BUILD, "sh", work, folder, base_python(), commands]
        subprocess.run(argv, check=True, stdout=sys.stderr)


def copy_from_checkout(copies: list[list[str]], root: Path) -> None:
    """Copy files and folders of the checkout to where a COPY puts them, `SOURCE... FOLDER/`."""
    for *sources, target in copies:
        folder = made(root / target.strip("/"))
        for source in sources:
            path = PROJECT / source
            if path.is_dir():
                shutil.copytree(path, folder, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy(path, folder)


def fingerprint() -> str:
    """Return a short name for all that a layer is made of."""
    found = hashlib.sha256(f"{s6_root()} {s6_root().stat().st_mtime_ns} {base_python()} {sys.version}".encode())
    sources = [
        word for stage in ("scripts", dockerfile()[-1].stage) for copy in own_steps(stage)[0] for word in copy[:-1]
    ]
    tops = [Path(__file__), PROJECT / "Dockerfile", STAND_IN, *(PROJECT / source for source in sources)]
    for top in tops:
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            found.update(f"{path.relative_to(PROJECT)} {path.lstat().st_mode:o}\0".encode())
            found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()[:16]


@cache
def layer() -> Path:
    """Return a folder with the image's files, to lie over a root; made once for what it is made of."""
    layers = made(CACHE / "layers")
    folder = layers / fingerprint()
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            os.chmod(part, 0o755)
            root = made(Path(part, "root"))
            put_s6_overlay(root)
            if maker()[0] is Sandbox:
                put_loader_cache(root)
            put_scripts(root)
            if not folder.exists():
                root.rename(folder)
        os.utime(folder)  # it has the time of the files in it, and so would be the oldest
        for old in sorted(layers.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT_LAYERS]:
            shutil.rmtree(old, ignore_errors=True)  # another worker may remove it too
    return folder
