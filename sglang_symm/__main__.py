# Copyright The sglang_symm authors. SPDX-License-Identifier: Apache-2.0
"""The command line: python -m sglang_symm COMMAND ..."""

from __future__ import annotations

import argparse
import importlib
import sys

from ._version import __version__

# Command -> (module with add_arguments(parser) and main(args) -> exit status, what it does). args.words is the command
# line that args came from. Only the module of the
# command in use is imported, so `env` works where others cannot.
COMMANDS = {
    "env": ("env_report", "what this machine has, and whether the native library fits it"),
    "generate": ("generate", "answer prompts with a Llama over several ranks"),
    "bench": ("bench", "time collectives beside those of Gloo, DeepSpeed and MPI, on GPUs NCCL and torch"),
    "tune": ("tune", "measure the algorithms, and write the table that groups choose by"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:10} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: python -m sglang_symm COMMAND ...   (COMMAND --help tells more)\n\n{rows}\n\nversion {__version__}"


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: command and its arguments; the process's own when None.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage.
    """
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "--version"):
        print(__version__ if words[:1] == ["--version"] else usage())
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        print(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module_name, what = COMMANDS[name]
    module = importlib.import_module(f".{module_name}", __package__)
    parser = argparse.ArgumentParser(prog=f"python -m sglang_symm {name}", description=what)
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    args.words = rest  # for the ranks that a command starts
    status: int = module.main(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
