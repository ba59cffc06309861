"""The stress test runs as its docstring says, without a display, and finds nothing wrong."""

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_headless_run(daemon, tmp_path):
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "stress_test.py"), "-H", daemon.url]
    command += [
        "-r",
        "10",
        "-u",
        "12",
        "-t",
        "12",
        "--headless",
        "--csv",
        str(tmp_path / "run"),
        "--exit-code-on-error",
        "1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    with (tmp_path / "run_stats.csv").open() as file:
        rows = {(row["Type"], row["Name"]): row for row in csv.DictReader(file)}
    assert int(rows["", "Aggregated"]["Failure Count"]) == 0
    for kind in ("POST", "TTFT", "whole", "tok/s"):
        row = rows[kind, "chat, streamed"]
        assert int(row["Request Count"]) > 0
        assert float(row["Average Response Time"]) > 0
    daemon.wait_until_idle()
