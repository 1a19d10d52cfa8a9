"""Who may import whom, as ARCHITECTURE.md draws it: over every file, imports inside functions included."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("sae_core", "server", "bench", "migrations", "tests")
TORCH = ("torch", "transformers", "transformer_lens", "safetensors", "gguf")

# Of `sae_core`, what a process without torch may import.
SHARED = ("config", "errors", "progress", "corpus", "presets", "records", "agreement", "studies.shares")
LIGHT = {"sae_core", *(f"sae_core.{name}" for name in SHARED)}
# What never names torch at its top: the web, and what `sae_core` shares with it.
WITHOUT_TORCH = tuple(f"sae_core/{name.replace('.', '/')}.py" for name in ("__init__", *SHARED))
BOTH_HALVES = ("server.worker", "server.work", "server.gpus", "server.engine", "server.engine_circuits")
# The command line runs in many processes, so it reaches for the other half inside the commands that need it, never at its top.
COMMANDS = {f"server.commands.{name}" for name in ("exchange", "sources", "training")}
INSIDE_FUNCTIONS = {*COMMANDS, "server.doctor"}


def files(folder: str) -> Iterator[Path]:
    yield from sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imports(path: Path, *, top: bool = False) -> set[str]:
    """Every module that the file names in an import, anywhere; `from server import store` counts as `server.store`.

    Imports under `if TYPE_CHECKING:` name types only and load nothing, so they are left out. `top` leaves those inside
    functions out too.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively on line {node.lineno}"
            base = node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if base.split(".")[0] in OURS and is_module(inner) else base)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        waiting.extend(node.orelse if guarded else ast.iter_child_nodes(node))  # type: ignore[attr-defined]
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(folder: str, allowed: object) -> list[str]:
    return [
        f"{module_of(path)} imports {name}" for path in files(folder) for name in sorted(imports(path)) if not allowed(path, name)
    ]  # type: ignore[operator]


def test_there_is_something_to_check() -> None:
    assert len(list(files("sae_core"))) >= 10
    assert len(list(files("server"))) >= 15


def test_the_reader_of_imports_sees_functions_and_aliases(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import os.path as p\nfrom server import store, db\ndef f():\n    from torch import nn\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\nelse:\n    import json\n"
    )
    assert imports(path) == {"os.path", "server.store", "server.db", "torch", "typing", "json"}
    assert imports(path, top=True) == {"os.path", "server.store", "server.db", "typing", "json"}


def test_sae_core_imports_nothing_else_of_ours() -> None:
    assert offences("sae_core", lambda _, name: not within(name, *(o for o in OURS if o != "sae_core"))) == []


def test_sae_core_knows_neither_sql_nor_http() -> None:
    foreign = ("sqlalchemy", "alembic", "fastapi", "starlette", "uvicorn", "httpx", "jinja2", "dbos", "sqlite3", "psycopg")
    assert offences("sae_core", lambda _, name: not within(name, *foreign)) == []


def test_only_lens_knows_transformer_lens() -> None:
    allowed = ("lens.py", "_saelens.py", "_saedashboard.py")  # the latter run in a peer's environment, on its version of it
    for folder in ("sae_core", "server", "bench", "migrations"):
        assert offences(folder, lambda path, name: path.name in allowed or not within(name, "transformer_lens")) == []


def test_what_the_web_shares_of_sae_core_names_no_torch() -> None:
    for name in WITHOUT_TORCH:
        assert not [found for found in imports(ROOT / name) if within(found, *TORCH)], name


def test_only_worker_and_engine_know_both_halves() -> None:
    def allowed(path: Path, name: str) -> bool:
        heavy = within(name, *TORCH) or (within(name, "sae_core") and name not in LIGHT)
        inside = module_of(path) in INSIDE_FUNCTIONS and name not in imports(path, top=True)
        return not heavy or inside or within(module_of(path), *BOTH_HALVES)

    assert offences("server", allowed) == []


def test_only_command_line_and_starters_reach_for_worker_and_engine() -> None:
    starters = ("server.commands.processes", "server.commands.running", "server.up", "server.demo", *BOTH_HALVES)

    def allowed(path: Path, name: str) -> bool:
        return within(module_of(path), *starters) or not within(name, *BOTH_HALVES)

    assert offences("server", allowed) == []


def test_what_a_worker_does_knows_neither_the_process_nor_the_engine() -> None:
    may = ("server.worker", "server.work")
    above = ("server.worker", "server.engine", "server.engine_circuits", "server.cli", "server.commands")
    assert offences("server/work", lambda _, name: not within(name, *above)) == []

    def allowed(path: Path, name: str) -> bool:
        opening = module_of(path) == "server.engine" and name == "server.work.opening"
        return within(module_of(path), *may) or opening or not within(name, "server.work")

    assert offences("server", allowed) == []


@pytest.mark.parametrize("folder", ["sae_core", "server"])
def test_no_module_imports_itself_by_way_of_others(folder: str) -> None:
    graph = {module_of(path): imports(path, top=True) - {module_of(path)} for path in files(folder)}
    order = list(TopologicalSorter(graph).static_order())  # CycleError, which says the circle, where there is one
    assert set(graph) <= set(order)


@pytest.mark.parametrize("folder", ["server/pages", "server/api"])
def test_pages_and_api_import_only_what_they_may(folder: str) -> None:
    may = (
        *(
            "store",
            "jobs",
            "live",
            "circuits",
            "security",
            "access",
            "rendering",
            "markup",
            "charts",
            "lines",
            "panels",
            "figures",
            "preview",
        ),
        *("forms", "pages", "api", "settings", "resources", "proxied", "watch", "oidc"),
    )

    def allowed(_: Path, name: str) -> bool:
        if within(name, "sae_core"):
            return name in ("sae_core.config", "sae_core.errors", "sae_core.progress")
        if within(name, "server"):
            return within(name, *(f"server.{part}" for part in may))
        return not within(name, *TORCH)

    assert offences(folder, allowed) == []


def test_a_subject_of_the_command_line_knows_no_other_and_only_the_entry_knows_them() -> None:
    names = ("arguments", "environment", "opened", "printing", "running", "sources")
    shared = {f"server.commands.{name}" for name in names}

    def allowed(path: Path, name: str) -> bool:
        own = within(module_of(path), "server.commands") and name in shared
        return not within(name, "server.cli", "server.commands") or own or module_of(path) == "server.cli"

    assert offences("server", allowed) == []
    assert all(map(is_module, shared))
    subjects = {module_of(path) for path in files("server/commands")} - shared - {"server.commands"}
    assert subjects == {name for name in imports(ROOT / "server" / "cli.py") if within(name, "server.commands")} - shared


def test_store_imports_tables_and_neither_torch_nor_fastapi() -> None:
    may = ("server.tables", "server.packing", "server.store", "server.db")

    def allowed(_: Path, name: str) -> bool:
        return not within(name, *TORCH, "fastapi", "starlette") and (not within(name, "server") or within(name, *may))

    assert offences("server/store", allowed) == []


def test_tables_are_read_by_store_and_migrations_only() -> None:
    def allowed(path: Path, name: str) -> bool:
        return not within(name, "server.tables") or path.is_relative_to(ROOT / "server" / "store")

    assert offences("server", allowed) == []
    assert [module_of(path) for path in files("migrations") if "server.tables" in imports(path)] == ["migrations.env"]


def test_only_db_makes_an_engine() -> None:
    makers = {f"{name}.{maker}" for name in ("sa", "sqlalchemy") for maker in ("create_engine", "engine_from_config")}
    calls = [
        (module_of(path), ast.unparse(node.func))
        for folder in ("server", "migrations", "bench")
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    assert [module for module, function in calls if function in makers] == ["server.db"]
    assert not [path for path in files("server") if "from sqlalchemy import create_engine" in path.read_text()]


WEB = """
import json, sys
from pathlib import Path
from fastapi.testclient import TestClient
from server import jobs
from server.app import create_app
from server.db import Database
from server.settings import Settings

settings = Settings(data=Path(sys.argv[1]), cache=Path(sys.argv[1]) / "cache").prepare()
db = Database(settings.url)
jobs.upgrade(settings, db)
with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
    statuses = [client.get(path).status_code for path in ("/", "/jobs", "/healthz", "/saes/none/features/0")]
print(json.dumps({"statuses": statuses, "heavy": sorted(set(sys.argv[2:]) & set(sys.modules))}))
"""


def test_a_web_process_that_has_served_pages_holds_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WEB, str(tmp_path), *TORCH, "sae_core.lens", "datasets", "pyarrow", "pandas"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["heavy"] == []
    assert said["statuses"][:3] == [200, 200, 200]
    assert said["statuses"][3] == 404


def test_the_command_line_shows_its_help_without_torch() -> None:
    code = "import sys, server.cli; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *TORCH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
