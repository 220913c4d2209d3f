"""Builds the one native library, sglang_symm/_C.abi3.so, from csrc/.

Environment variables:
    MAX_JOBS               compiler processes at a time (default: the cores of this process)
    SGLANG_SYMM_CUDA       1: with CUDA, an error when it cannot be; 0: never; unset: when nvcc fits torch
    TORCH_CUDA_ARCH_LIST   GPU architectures (default: 9.0a)
    SGLANG_SYMM_WERROR     1: warnings are errors (CI)
    SGLANG_SYMM_TRACE      1: the prefill kernel writes down when it is where (benchmarks/prefill_trace.py)
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

# The newer form of project.license is an error to the setuptools of a fresh virtual environment.
warnings.filterwarnings("ignore", message=".*project.license")
ROOT = Path(__file__).resolve().parent
# Files with these endings need CUDA's headers or compiler.
CUDA_ENDINGS = ("_cuda.cpp", "_nccl.cpp", ".cu")


def put_ninja_on_path() -> None:
    """Let torch find the ninja of this environment, even when the environment is not activated."""
    try:
        import ninja
    except ImportError:
        return
    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")


put_ninja_on_path()
try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an sdist, or metadata asked for by a tool: the build itself says what is missing
    torch = None


def say(message: str) -> None:
    print(f"sglang_symm: {message}", file=sys.stderr, flush=True)


def torch_minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def sources(cuda: bool) -> list[str]:
    """Every source of csrc/, relative to the root; those that need CUDA only in a CUDA build."""
    found = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".cu")]
    return [p for p in found if cuda or not p.endswith(CUDA_ENDINGS)]


def nvcc_release() -> str | None:
    """nvcc's release ("13.0"), or None when there is no nvcc."""
    home = cpp_extension.CUDA_HOME
    nvcc = os.path.join(home, "bin", "nvcc") if home else None
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def why_no_cuda() -> str | None:
    """None when this build can have CUDA, else the reason why it cannot."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    release = nvcc_release()
    if release is None:
        return "nvcc was not found (set CUDA_HOME if it is installed)"
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release}, torch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def with_cuda() -> bool:
    asked = os.environ.get("SGLANG_SYMM_CUDA", "").strip()
    if asked not in ("", "0", "1"):
        raise SystemExit(f"SGLANG_SYMM_CUDA: expected 0, 1 or nothing, got {asked!r}")
    if asked == "0":
        return False
    reason = why_no_cuda()
    if reason is None and not any(p.endswith(CUDA_ENDINGS) for p in sources(True)):
        say("this version has no CUDA sources: building for CPU")
        return False
    if reason is None:
        return True
    if asked == "1":
        raise SystemExit(f"SGLANG_SYMM_CUDA=1 asks for CUDA, but {reason}")
    say(f"{reason}: building for CPU")
    return False


def traced() -> bool:
    return os.environ.get("SGLANG_SYMM_TRACE") == "1"


def compiler_name() -> str:
    """First line of the C++ compiler's --version."""
    command = [*cpp_extension.get_cxx_compiler().split(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def make_extension(cuda: bool):
    """The extension: no Python API in it, so it is not linked with libtorch_python and serves every Python 3."""
    werror = os.environ.get("SGLANG_SYMM_WERROR") == "1"
    warnings = ["-Wall", "-Wextra"] + (["-Werror"] if werror else [])
    # No contraction to fused multiply-add: the portable and the vector paths must give the same bits.
    common = ["-ffp-contract=off", "-fvisibility=hidden"]
    cxx = ["-std=c++20", "-O3", "-g0", *warnings, *common]
    nvcc = ["-std=c++20", "-O3", f"-Xcompiler={','.join(['-Wall', *common])}"]
    if werror:
        nvcc.append("--Werror=all-warnings")
    if cuda and int(nvcc_release().split(".")[0]) >= 13:
        nvcc.append("-compress-mode=size")  # 7.8 MB become 1.7; every driver of CUDA 13 reads it
    macros = [("SGLANG_SYMM_TORCH_VERSION", f'"{torch.__version__}"')]
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        macros += [("SGLANG_SYMM_WITH_CUDA", "1"), ("SGLANG_SYMM_CUDA_VERSION", f'"{nvcc_release()}"')]
        if traced():
            macros.append(("SGLANG_SYMM_TRACE", "1"))
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make(
        "sglang_symm._C",
        sources(cuda),
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=["-Wl,-z,defs", "-Wl,--as-needed", "-Wl,-s"],
        py_limited_api=True,
    )
    # Headers of torch and CUDA are somebody else's: no warning in them may fail our build.
    foreign = [flag for path in extension.include_dirs for flag in ("-isystem", path)]
    extension.include_dirs = [str(ROOT / "csrc")]
    extension.extra_compile_args["cxx"] += foreign
    extension.extra_compile_args["nvcc"] += foreign
    extension.depends = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.[hc]*")]
    return extension


class NeedsTorch(build_ext):
    """What build_ext is in an environment without torch: an error that says how to go on."""

    def run(self) -> None:
        raise SystemExit(
            "sglang_symm is built for the torch that is installed, and torch is not installed here.\n"
            "Install it (pip install torch==2.11.0 setuptools wheel ninja), then: pip install . --no-build-isolation"
        )


def make_command(cuda: bool):
    class Build(cpp_extension.BuildExtension):
        """Keeps the objects of each torch version, so a second build, editable or not, compiles only what changed."""

        def finalize_options(self) -> None:
            super().finalize_options()
            kind = f"cuda{nvcc_release()}{'-trace' if traced() else ''}" if cuda else "cpu"
            self.build_temp = str(ROOT / "build" / f"torch-{torch.__version__}-{kind}")

        def run(self) -> None:
            os.makedirs(self.build_temp, exist_ok=True)
            with open(os.path.join(self.build_temp, ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at a time would write the same objects
                super().run()
                self.write_build_info()

        def write_build_info(self) -> None:
            """Leave beside the library what it was built for: readable even when the library cannot be loaded."""
            info = {
                "torch": torch.__version__,
                "cuda": nvcc_release() if cuda else None,
                "arch": os.environ.get("TORCH_CUDA_ARCH_LIST") if cuda else None,
                "compiler": compiler_name(),
            }
            text = json.dumps(info, indent=1) + "\n"
            built = Path(self.build_lib) / "sglang_symm"
            for folder in [built] + ([ROOT / "sglang_symm"] if self.inplace else []):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "_C.json").write_text(text)

    return Build


def main() -> None:
    if torch is None:
        setup(install_requires=["torch>=2.11"], cmdclass={"build_ext": NeedsTorch})
        return
    if shutil.which("ninja") is None:
        say("ninja was not found: every source is compiled again, one at a time (pip install ninja)")
    os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    cuda = with_cuda()
    # The oldest Python that this torch supports is the oldest that the library supports.
    oldest = re.search(r">=3\.(\d+)", metadata.metadata("torch")["Requires-Python"] or "")
    tag = f"cp3{oldest.group(1)}" if oldest else "cp310"
    setup(
        install_requires=[f"torch=={torch_minor()}.*"],
        ext_modules=[make_extension(cuda)],
        cmdclass={"build_ext": make_command(cuda)},
        options={"bdist_wheel": {"py_limited_api": tag}},
    )


main()
