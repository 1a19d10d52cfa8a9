"""The Makefile as a newcomer meets it, without installing anything."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()


def make(*words: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=cwd, env=plain | variables, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with what the installation depends on, and no .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_bare_make_prints_every_documented_target_and_does_nothing(bare: Path) -> None:
    done = make(cwd=bare)
    assert done.returncode == 0
    targets = re.findall(r"^([a-z-]+):.*## (.*)", MAKEFILE, re.M)
    assert len(targets) > 10
    for name, about in targets:
        assert re.search(rf"^  make {name} +{re.escape(about)}$", done.stdout, re.M), name
    assert not (bare / ".venv").exists()


def test_every_target_but_helpers_is_documented_and_phony() -> None:
    phony = set(re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.M)[0].split())
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert targets == phony
    assert targets - set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.M)) == {"chromium"}


def test_torch_comes_first_and_is_one_variable(bare: Path) -> None:
    said = make("--dry-run", "venv", "TORCH=torch==9.9 --index-url https://example.org/simple", cwd=bare).stdout
    installs = re.findall(r"pip install .*", said)
    assert len(installs) == 2
    assert installs[0].endswith("torch==9.9 --index-url https://example.org/simple")
    assert "--constraint constraints.txt -e '.[worker,test]'" in installs[1]
    assert not re.search(r"^torch[=<>]", (ROOT / "constraints.txt").read_text(), re.M)


def test_what_is_installed_is_not_installed_again(bare: Path) -> None:
    (bare / ".venv" / "bin").mkdir(parents=True)
    (bare / ".venv" / ".installed").touch()
    said = make("--dry-run", "demo", cwd=bare).stdout
    assert "pip install" not in said
    assert ".venv/bin/headscope demo" in said
    (bare / "constraints.txt").touch()
    os.utime(bare / ".venv" / ".installed", (1, 1))
    assert "pip install" in make("--dry-run", "demo", cwd=bare).stdout


def test_an_old_python_is_refused_in_a_sentence(bare: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.6"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.6.15" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make("venv", f"PYTHON={old}", cwd=bare)
    assert done.returncode == 2
    assert "Headscope needs Python 3.11 or newer" in done.stdout
    assert "Python 3.6.15" in done.stdout
    assert not (bare / ".venv").exists()


def test_a_missing_chromium_is_installed_by_root_and_named_for_others(bare: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, says in {"id": "echo 1000", "awk": "true"}.items():
        (tools / name).write_text(f"#!/bin/sh\n{says}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "sh"):
        (tools / name).symlink_to(Path(shutil.which(name) or ""))
    done = subprocess.run(
        [shutil.which("make") or "make", "chromium"],
        cwd=bare,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "The browser tests drive Chromium, which is missing" in done.stdout
