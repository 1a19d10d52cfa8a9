"""The wheel as a user gets it: built, installed in an empty environment without torch, and run from a foreign folder."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from contextlib import closing
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment into which pip has installed the wheel and what the web needs."""
    place = tmp_path_factory.mktemp("venv") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=ROOT)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=ROOT)
    return python


def test_it_carries_every_module_and_templates_assets_and_migrations_inside_server(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("templates", "static", "migrations"):
        ours = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in str(path)
        }
        assert ours
        assert {f"server/{name}" for name in ours} <= inside
    for package in ("server", "sae_core"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")} <= inside
    assert "server/py.typed" in inside
    assert not [name for name in inside if name.startswith(("tests/", "bench/"))]


@pytest.fixture
def foreign(installed: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who works in a folder with a `server.py` of their own."""
    (tmp_path / "server.py").write_text("raise SystemExit('the decoy was imported')\n")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("HEADSCOPE_", "PYTHON"))}
    folders = {"HEADSCOPE_DATA": str(tmp_path / "data"), "HEADSCOPE_CACHE": str(tmp_path / "cache")}
    return {**plain, **folders, "HEADSCOPE_PORT": str(free_port()), "PATH": f"{installed.parent}:{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_it_holds_no_torch(installed: Path) -> None:
    run(installed, "-c", "import importlib.util as u, server; assert not u.find_spec('torch')", cwd=installed.parent)


def test_from_a_folder_with_a_decoy_it_upgrades_a_database_and_serves_a_page_and_an_asset(
    foreign: dict[str, str], tmp_path: Path
) -> None:
    run("headscope", "db", "upgrade", cwd=tmp_path, env=foreign)
    with closing(sqlite3.connect(tmp_path / "data" / "headscope.db")) as database:
        assert database.execute("SELECT count(*) FROM feature").fetchone() == (0,)
    address = f"http://127.0.0.1:{foreign['HEADSCOPE_PORT']}"
    with subprocess.Popen(
        ["headscope", "serve"], cwd=tmp_path, env=foreign, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as web:
        try:
            page = answered(f"{address}/", web)
            asset = httpx.get(f"{address}/static/app.css", trust_env=False)
        finally:
            web.terminate()
            web.communicate(timeout=30)
    assert page.status_code == 200
    assert "<title>" in page.text
    assert asset.status_code == 200
    assert asset.headers["content-type"].startswith("text/css")


def answered(url: str, process: subprocess.Popen[bytes]) -> httpx.Response:
    """The first answer of a server that is starting."""
    for _ in range(300):
        assert process.poll() is None, process.communicate()[0].decode()
        try:
            return httpx.get(url, trust_env=False)
        except httpx.ConnectError:
            time.sleep(0.1)
    pytest.fail(f"{url} does not answer")


@pytest.mark.parametrize("command", ["worker", "engine", "up", "demo"])
def test_without_the_worker_extra_what_needs_torch_is_refused_in_a_sentence(
    foreign: dict[str, str], tmp_path: Path, command: str
) -> None:
    done = subprocess.run(["headscope", command], cwd=tmp_path, env=foreign, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("headscope: This needs torch and TransformerLens")
    assert "headscope[worker]" in done.stderr
    assert len(done.stderr.splitlines()) == 1
