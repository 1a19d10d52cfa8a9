"""Finds templates, static files and migrations, in a checkout and in an installed wheel alike."""

from pathlib import Path


def resource_path(name: str) -> Path:
    """The folder `templates`, `static` or `migrations`. A wheel carries them inside `server/`; a checkout beside it."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
