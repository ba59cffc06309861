#!/usr/bin/env python3
"""Measures any OpenAI-compatible server; see --help. The parts are in the folder benchmark/."""

import sys

from benchmark.cli import main  # the package: it goes before a module of the same name

if __name__ == "__main__":
    sys.exit(main())
