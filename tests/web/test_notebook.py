"""The notebook in docs/ runs as it stands, and its outputs are not kept with it."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.web.conftest import at, listened, put
from tests.web.factory import Shape

NOTEBOOK = Path(__file__).parents[2] / "docs" / "api.ipynb"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The web process, really listening."""
    yield from listened(put(at(tmp_path), Shape(n_features=24, n_dead=2)))


def test_the_notebook_goes_from_the_api_to_a_frame_and_a_plot(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_ADDRESS", site)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    kinds = {kind for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs for kind in out.get("data", ())}
    assert {"text/html", "image/png"} <= kinds


def test_the_notebook_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
