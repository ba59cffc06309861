"""A pytest plugin for `make test-gpu`: a short table last, and a JSON file with each test, the device and the versions."""

import json
import platform
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

_PACKAGES = ("torch", "transformers", "flashinfer-python", "apache-tvm-ffi")


def pytest_addoption(parser):
    parser.addoption("--gpu-report", type=Path, help="JSON file of what `make test-gpu` found")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    yield  # pytest's own comes first
    if (path := config.getoption("--gpu-report")) is None:
        return
    outcomes, seconds = {}, Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "when"):
                seconds[report.nodeid] += report.duration
                if report.when == "call" or report.outcome != "passed":  # set-up and clean-up count when they go wrong
                    outcomes[report.nodeid] = report.outcome
    tests = [{"test": test, "outcome": outcome, "seconds": seconds[test]} for test, outcome in outcomes.items()]
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": {"python": platform.python_version()}
        | {d.name: d.version for name in _PACKAGES for d in distributions(name=name)},
        "tests": tests,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    terminalreporter.section(f"{found['device']}; all of it in {path}")
    for line in table(tests):
        terminalreporter.write_line(line)


def table(tests):
    """A line for each file, and one for all."""
    outcomes = ("passed", "failed", "skipped")
    files = dict.fromkeys(test["test"].partition("::")[0] for test in tests)
    rows = [["", *outcomes, "seconds"]]
    for name in (*files, "all"):
        own = [test for test in tests if name in ("all", test["test"].partition("::")[0])]
        counts = Counter(test["outcome"] for test in own)
        rows.append([name, *(str(counts[outcome]) for outcome in outcomes), f"{sum(t['seconds'] for t in own):.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
