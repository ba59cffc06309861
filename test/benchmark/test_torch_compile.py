"""The chart of torch.compile is drawn from what locust really writes."""

import subprocess
import sys
from pathlib import Path

from pics.torch_compile import draw, history

ROOT = Path(__file__).parents[2]


def test_locusts_history_is_read_and_drawn(daemon, tmp_path):
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "stress_test.py"), "-H", daemon.url, "--headless"]
    command += ["-u", "4", "-r", "4", "-t", "6s", "--csv", str(tmp_path / "off"), "--csv-full-history"]
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    lines = history(tmp_path / "off_stats_history.csv")
    assert set(lines) == {"users", "requests", "ttft", "rate"}
    for points in lines.values():
        assert [second for second, _ in points] == sorted(second for second, _ in points)
        assert max(value for _, value in points) > 0
    assert max(value for _, value in lines["users"]) == 4

    draw({"off": lines, "default": lines}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
