"""The model that is served when none is named, so that the daemon answers on any machine, offline: `train` makes it."""

from pathlib import Path

DEMO_FOLDER = Path(__file__).parent / "model"
