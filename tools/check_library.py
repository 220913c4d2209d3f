"""Loads a native library as a user's process would, on a machine without GPU too, and checks its size.

python tools/check_library.py build/cuda/sglang_symm/_C.abi3.so --max-mib 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--max-mib", type=float, required=True)
    args = parser.parse_args()
    mib = args.library.stat().st_size / 2**20
    if mib > args.max_mib:
        raise SystemExit(f"{args.library}: expected at most {args.max_mib} MiB, got {mib:.1f}")
    torch.ops.load_library(str(args.library.resolve()))
    print(f"{args.library}: {mib:.1f} MiB, {torch.ops.sglang_symm._build_info()}")


if __name__ == "__main__":
    main()
