"""Runs checks of `triton_interpreter_checks*.py` one by one, as `test_triton_interpreter.py` asks.

It tells the names of the checks, and whether they take minutes; then, for each name that it reads,
the outcomes of setting up, of the check and of tearing down. A line of JSON each.
"""

import json
import os
import sys
from pathlib import Path

import pytest

CHECKS = sorted(Path(__file__).parent.glob("triton_interpreter_checks*.py"))


class Server:
    """A plugin of pytest that runs the items that it is asked for, when it is asked."""

    def __init__(self) -> None:
        self.requests, self.answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        # what checks print goes elsewhere
        os.dup2(2, 1)
        self.reports: list[pytest.TestReport] = []

    def answer(self, content: object) -> None:
        print(json.dumps(content), file=self.answers, flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(report.longreprtext, file=sys.stderr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.name: item for item in session.items}
        self.answer({name: "long" in item.keywords for name, item in items.items()})
        for line in self.requests:
            self.reports = []
            item = items[line.rstrip("\n")]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self.answer([(report.outcome, report.longreprtext) for report in self.reports])
        return True


if __name__ == "__main__":
    options = ["-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:terminal"]
    sys.exit(pytest.main([*map(str, CHECKS), *options], plugins=[Server()]))
