"""Benchmarks: a file each, with a function `run() -> dict` of figures. `python -m bench <name> [--json]`."""
