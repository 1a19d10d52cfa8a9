"""What many tests share: settings of a folder of their own, the real model's weights, a headless browser."""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Two test processes share two cores: with a thread each, small products do not wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that a test runs may talk to a model hub.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled")

import pytest
import sqlalchemy as sa

from bench import _postgres
from server.demo import fetch_model, fetch_text
from server.settings import Settings


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that xdist cannot tell apart would be left out without a word, and schemathesis gives one id to those of all
    operations."""
    for item in items:
        operation = getattr(item, "operation_label", None)
        if operation and not item.nodeid.endswith("]"):
            item._id = item._id.with_params(operation)  # no public way, and xdist knows tests by nothing else
    again = [node for node, times in Counter(item.nodeid for item in items).items() if times > 1]
    if again:
        raise pytest.UsageError(f"Several tests have one id, so xdist would run one of them alone: {', '.join(again)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a test fails, what its commands said is shown."""
    report = yield
    if report.failed and "tests.processes" in sys.modules:
        report.sections.extend(sys.modules["tests.processes"].told())
    return report


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings whose data and cache are this test's own."""
    return Settings(data=tmp_path / "data", cache=tmp_path / "cache", engine_port=9).prepare()


@pytest.fixture(scope="session")
def cache() -> Path:
    """The real cache folder, kept between runs: what is fetched or converted there costs time once."""
    return Settings().cache


@pytest.fixture(scope="session")
def smollm2(cache: Path) -> Path:
    """The embedded default model's GGUF file; for tests marked `real`."""
    return fetch_model(cache)


@pytest.fixture(scope="session")
def demo_text(cache: Path) -> Path:
    """The demo's text as jsonl; for tests marked `real`."""
    return fetch_text(cache)


@pytest.fixture(scope="session")
def postgres() -> Iterator[sa.URL]:
    """A PostgreSQL server of the tests' own, which more than one of them may fill."""
    if _postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    with _postgres.server() as url:
        yield url


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """Debian's Chromium, quiet and offline, for tests marked `browser`."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("Chromium is missing: `apt-get install chromium`.")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    updates = ["--disable-background-networking", "--disable-component-update"]
    return {**browser_type_launch_args, "executable_path": chromium, "args": quiet + updates}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own HEADSCOPE_ variables change no test; only the cache is shared."""
    for name in list(os.environ):
        if name.startswith("HEADSCOPE_") and name != "HEADSCOPE_CACHE":
            monkeypatch.delenv(name)
