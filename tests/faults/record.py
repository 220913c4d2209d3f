"""Keep what a long run said: command, commit, date, machine, time, exit code, last lines.

python tests/faults/record.py FILE.json [NAME=VALUE ...] COMMAND ...      NAME=VALUE: environment of the command
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, commit, machine


def main() -> int:
    target, *words = sys.argv[1:]
    first = next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    environment = dict(word.split("=", 1) for word in words[:first])
    revision, begin = commit(), time.monotonic()
    run = subprocess.run(
        words[first:],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    report = {
        "command": " ".join(words),
        "commit": revision,
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "machine": machine(),
        "wall_seconds": round(time.monotonic() - begin, 1),
        "exit_code": run.returncode,
        "output": run.stdout.splitlines()[-12:],
    }
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(json.dumps(report, indent=1) + "\n")
    print(run.stdout[-1000:])
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
