"""What all tests share: selection by number of ranks, quiet ranks, and results for tools/run_tests.py."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
# The device of tests/distributed: cpu or cuda.
DEVICE = os.environ.get("SGLANG_SYMM_TEST_DEVICE", "cpu")
# Set by tools/run_tests.py: where each rank leaves its counts.
RESULTS = os.environ.get("SGLANG_SYMM_TEST_RESULTS")

# A shell that starts the tests in the background has SIGINT ignored, and children inherit that: those whose Ctrl-C is
# tested must not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Report:
    """Counts the outcomes of this rank; ranks above 0 hold their output back and show it only if a test failed."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.left = time.monotonic()
        self.held: io.StringIO | None = None

    def hold_output(self, config: pytest.Config) -> None:
        reporter = config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None:
            self.held = io.StringIO()
            reporter._tw._file = self.held

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # setup, call and teardown each report; the worst of them is the outcome.
        order = ["passed", "skipped", "failed"]
        known = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(known, report.outcome, key=order.index)
        if time.monotonic() - self.left > 1:  # for a run that is ended, or dies, before its end
            self.leave()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def leave(self) -> None:
        if RESULTS is not None:
            part = Path(RESULTS, f"rank{RANK}.part")
            part.write_text(json.dumps(self.outcomes))
            part.replace(part.with_suffix(".json"))
        self.left = time.monotonic()

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if RESULTS is None:
            return
        self.leave()
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # a number of ranks that no test asks for
            session.exitstatus = pytest.ExitCode.OK

    def pytest_unconfigure(self) -> None:
        if self.held is not None and "failed" in self.outcomes.values():
            text = "".join(f"[rank {RANK}] {line}\n" for line in self.held.getvalue().splitlines())
            sys.__stderr__.write(text)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): why a test of tests/distributed does not run on GPUs")
    report = Report()
    if RANK > 0:
        report.hold_output(config)
    config.pluginmanager.register(report, "sglang_symm_report")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test marked world_size(a, b) runs with a or b ranks only; one marked cpu_only(reason) not on GPUs."""
    elsewhere = []
    for item in items:
        cpu_only = item.get_closest_marker("cpu_only")
        if cpu_only is not None and DEVICE != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"not on {DEVICE}: {cpu_only.args[0]}"))
        mark = item.get_closest_marker("world_size")
        if mark is not None and WORLD_SIZE not in mark.args:
            elsewhere.append(item)
            sizes = " or ".join(map(str, mark.args))
            item.add_marker(pytest.mark.skip(reason=f"needs {sizes} ranks, this run has {WORLD_SIZE}"))
    # tools/run_tests.py runs these with their own number of ranks, so there they are no skipped tests.
    if RESULTS is not None and elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
