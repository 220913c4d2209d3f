"""The build backend: setuptools' own, with one question answered better.

An isolated build (`pip install .`) would fetch the newest torch, build for it and then replace the torch that is
installed. This backend asks for the torch that the environment already has, so the library fits it.
`SGLANG_SYMM_TORCH=2.15.0` names another one.
"""

from __future__ import annotations

import importlib.metadata
import os
import site
import sysconfig
from typing import Any

from setuptools.build_meta import *  # noqa: F403 - the hooks that are not replaced here

DEFAULT_TORCH = "torch==2.11.*"


def torch_requirement() -> str:
    """The requirement on torch: the version asked for, else the one installed, else the default."""
    asked = os.environ.get("SGLANG_SYMM_TORCH")
    if asked:
        return f"torch=={asked}"
    # pip hides the environment's packages from an isolated build, but sysconfig still tells where they are.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    for found in importlib.metadata.distributions(name="torch", path=sorted(paths)):
        return f"torch=={found.version.split('+')[0]}"
    return DEFAULT_TORCH


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [torch_requirement()]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []
