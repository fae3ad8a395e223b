"""Report failures at once, because time on GPU machines is limited."""

from __future__ import annotations

import sys

import pytest


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """Print the time of each test and the traceback of each failure as they come."""
    if report.when == "call" or report.failed:
        sys.stderr.write(f"\n{report.outcome} {report.nodeid} {report.duration:.1f} s\n")
    if report.failed:
        sys.stderr.write(f"{report.longreprtext}\n")
