"""Measurements. `python3 benchmark.py --help` is the load generator; the other scripts here stand alone.

`workload` makes prompts, `target` knows a server's ways, `client` times one request, `load` sends many, `metrics` says
what the figures mean, `report` and `plots` show them, `cli` puts it together.
"""
