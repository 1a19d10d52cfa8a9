"""Lenses that several test files share: tiny ones of each kind, and the real model's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sae_core.config import ModelSource
from sae_core.lens import Lens, load_lens
from tests.core.tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny_lens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lens]:
    """A lens on a tiny model of a kind, loaded once per session."""
    loaded: dict[str, Lens] = {}

    def of(kind: str) -> Lens:
        if kind not in loaded:
            folder = save_tiny(kind, tmp_path_factory.mktemp(kind))
            loaded[kind] = load_lens(ModelSource(location=str(folder)), name=kind, cache=folder.parent)
        return loaded[kind]

    return of


@pytest.fixture(scope="session")
def smollm2_lens(smollm2: Path, cache: Path) -> Lens:
    """A lens on the embedded default model; for tests marked `real`."""
    return load_lens(ModelSource(location=str(smollm2)), name="smollm2", cache=cache)
