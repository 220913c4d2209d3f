"""Makes a virtual environment for `make`, with one version of torch and the extras of pyproject.toml.

    python3 tools/make_venv.py .venv --torch 2.11.0 [--extra models --extra test]

An environment that already exists is kept and completed. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ["setuptools>=77,<82", "wheel", "ninja"]
NO_VENV = """\
This Python cannot make virtual environments ({reason}).
On Debian and Ubuntu, as root:  apt-get install -y python3-venv
Elsewhere: install pip or virtualenv for {python}, or name another Python: make PYTHON=/path/to/python3 ..."""


def extra_requirements(name: str) -> list[str]:
    """The requirements of an extra. Read by hand: Python 3.10 has no tomllib, and pip is not there yet."""
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0]
    match = re.search(rf"^{re.escape(name)} = \[(.*?)\]", table, re.MULTILINE | re.DOTALL)
    if match is None:
        raise SystemExit(f"pyproject.toml has no extra {name!r}")
    return re.findall(r'"([^"]+)"', match.group(1))


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except FileNotFoundError:
        return False


def create(folder: Path) -> None:
    """Make the environment: venv with ensurepip, else venv and the system's pip, else virtualenv."""
    python = str(folder / "bin" / "python")
    if succeeds(python, "-m", "pip", "--version"):
        return
    print(f"creating {folder} with Python {sys.version.split()[0]}", flush=True)
    if succeeds(sys.executable, "-m", "venv", str(folder)) and succeeds(python, "-m", "pip", "--version"):
        return
    bare = succeeds(sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder))
    if bare and succeeds(sys.executable, "-m", "pip", "--python", python, "install", "pip"):
        return
    if succeeds(sys.executable, "-m", "virtualenv", str(folder)):
        return
    reason = "no ensurepip, and no pip or virtualenv instead of it" if bare else "no venv module"
    raise SystemExit(NO_VENV.format(reason=reason, python=sys.executable))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", required=True, metavar="VERSION")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - any Python may run this file
        raise SystemExit(f"Python >= 3.10 is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ...")
    create(args.folder)
    requirements = [f"torch=={args.torch}", *BUILD_TOOLS]
    for name in args.extra:
        requirements += extra_requirements(name)
    print("installing", " ".join(requirements), flush=True)
    # Programs of the environment (ninja) must be found by what pip starts, although it is not activated.
    env = {**os.environ, "PATH": f"{args.folder.resolve() / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    pip = [str(args.folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    sys.exit(subprocess.run([*pip, *requirements], env=env).returncode)


if __name__ == "__main__":
    main()
