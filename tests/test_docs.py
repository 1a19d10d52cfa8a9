"""The documents say what the code does: commands, settings, files, targets and links."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from server.cli import app
from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
README = (ROOT / "README.md").read_text()


def commands() -> set[str]:
    def names(command: object, before: str) -> Iterator[str]:
        for name, inner in getattr(command, "commands", {}).items():
            below = list(names(inner, f"{before} {name}"))
            yield from below or [f"{before} {name}"]

    return set(names(get_command(app), "headscope"))


def text_of_all() -> str:
    return "\n".join(path.read_text() for path in DOCUMENTS)


def tree() -> list[str]:
    """Every path that the README's tree names."""
    block = README.split("## What is where")[1].split("```")[1]
    paths, folder = [], ""
    for line in filter(str.strip, block.splitlines()):
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            paths.append(name)
        else:
            paths.append(folder + name)
    return paths


def tracked(pattern: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_the_readers_of_this_file_find_something() -> None:
    assert isinstance(app, typer.Typer)
    assert {"headscope demo", "headscope db upgrade"} <= commands()
    assert {"sae_core/config.py", "server/store/jobs.py", "Makefile"} <= set(tree())


def test_the_readme_lists_every_command_and_no_other() -> None:
    table = README.split("## Commands")[1].split("##")[0]
    listed = {
        found
        for row in re.findall(r"^\| (`headscope.*?) \|", table, re.M)
        for found in re.findall(r"`(headscope [a-z -]+)`", row)
    }
    assert listed == commands()


def test_every_option_shown_in_the_documents_exists() -> None:
    root = get_command(app)
    for line in re.findall(r"headscope (?:train|harvest|up|worker|doctor|serve)\b[^\n`]*", text_of_all()):
        name = line.split()[1]
        known = {flag for option in root.commands[name].params for flag in option.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= known | {"--help"}, line


def test_every_setting_is_documented_with_its_default_and_no_other_is() -> None:
    rows = dict(re.findall(r"^\| `HEADSCOPE_([A-Z_]+)` \| (.*?) \|", (ROOT / "docs" / "settings.md").read_text(), re.M))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, str | int) and field.default:
            assert f"`{field.default}`" in rows[name.upper()], name


def test_no_document_names_a_setting_that_is_not_there() -> None:
    named = set(re.findall(r"HEADSCOPE_([A-Z_]+)\b", text_of_all() + (ROOT / "Makefile").read_text()))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_every_path_in_the_readme_tree_exists() -> None:
    assert [name for name in tree() if not (ROOT / name).exists()] == []
    assert len(tree()) == len(set(tree()))


@pytest.mark.parametrize("folder", ["sae_core", "server", "bench"])
def test_every_module_is_in_the_readme_tree(folder: str) -> None:
    assert tracked(f"{folder}/*.py") - set(tree()) == set()


def test_every_file_at_the_top_and_in_docs_is_named() -> None:
    alone = {"LICENSE", "NOTICE", "README.md", "alembic.ini", ".gitignore", ".pre-commit-config.yaml"}
    top = {name for name in tracked("*") if "/" not in name} | tracked("docs/*.md")
    assert top - set(tree()) - alone == set()


def test_every_make_target_named_exists_and_every_target_is_in_the_readme() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    quoted = set(re.findall(r"(?:`|^)make ([a-z-]+)", text_of_all(), re.M))
    assert quoted <= targets
    assert targets - quoted - {"help"} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_the_picture_is_a_png_of_a_page() -> None:
    picture = (ROOT / "docs" / "screenshots" / "feature-wide-light.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_the_changelog_names_the_version_or_what_is_unreleased() -> None:
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version
    headings = re.findall(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" or headings[0].startswith(version[1])


def test_every_direct_dependency_says_why_or_stands_under_a_reason() -> None:
    block = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]\n")[0]
    lines = [line for line in block.splitlines() if line.strip().startswith('"')]
    assert lines
    assert [line for line in lines if "#" not in line] == []
