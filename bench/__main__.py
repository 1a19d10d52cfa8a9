"""Runs one benchmark and prints its figures; the last line is one JSON object for programs.

A benchmark is a module of this package with `run() -> dict[str, Figure]`; its docstring's first line says what it measures.
A figure is `{"value": ..., "unit": ..., "target": ...}`, where the target is None or a sentence such as `<= 600`.
Names have dashes where the module has underscores. Parameters of `run` can be given as whole numbers: `layer=17`.
"""

import argparse
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import bench


def names() -> list[str]:
    """Every benchmark."""
    modules = (module.name for module in pkgutil.iter_modules(bench.__path__))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


def load(name: str) -> tuple[str, Callable[..., dict[str, Any]]]:
    """What a benchmark says it measures, and its `run`."""
    module = importlib.import_module(f"bench.{name.replace('-', '_')}")
    return (module.__doc__ or "").strip().partition("\n")[0], module.run


def main() -> int:
    """Exit status: 0 when it ran, 2 when there is no such benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run one benchmark.")
    parser.add_argument("name", nargs="?", help="which one; none lists them")
    parser.add_argument("options", nargs="*", metavar="parameter=number", help="what its run takes")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    given = parser.parse_args()
    if given.name is None:
        for name in names():
            print(f"{name:16} {load(name)[0]}")
        return 0
    if given.name not in names():
        print(f"There is no benchmark {given.name!r}; there are: {', '.join(names()) or 'none'}.", file=sys.stderr)
        return 2
    about, run = load(given.name)
    takes = inspect.signature(run).parameters
    options = {name: value for name, _, value in (text.partition("=") for text in given.options)}
    wrong = [name for name, value in options.items() if name not in takes or not value.isdecimal()]
    if wrong:
        says = ", ".join(f"{name}={parameter.default}" for name, parameter in takes.items()) or "nothing"
        print(f"{given.name} cannot take {', '.join(wrong)}; it takes: {says}.", file=sys.stderr)
        return 2
    if not given.json:
        print(f"{given.name}: {about}", flush=True)
    figures = run(**{name: int(value) for name, value in options.items()})
    if not given.json:
        for name, figure in figures.items():
            target = f"   (target {figure['target']})" if figure.get("target") else ""
            print(f"  {name:36} {figure['value']:>12} {figure['unit']}{target}")
    print(json.dumps({"figures": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
