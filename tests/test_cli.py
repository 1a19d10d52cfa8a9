"""The command line as a user meets it: real processes, their sentences and exit codes."""

import contextlib
import ctypes
import json
import os
import re
import resource
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from sae_core.config import HarvestConfig, RowsConfig, TrainConfig
from server.db import Database
from server.job_folders import left_by
from server.options import built, given, options
from server.settings import Settings
from server.store import jobs as store
from tests.core.tiny_models import save_gguf, save_tiny
from tests.jobs.conftest import wait_for, write_text
from tests.processes import Command, Said, fresh, ran

SMALL = ["--layer", "1", "--context", "32", "--tokens", "8192", "--heldout-tokens", "1024", "--expansion", "2", "--k", "8"]
SMALL += ["--batch", "256", "--harvest-tokens", "4096", "--harvest-top-k", "3", "--harvest-per-band", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "HEADSCOPE_DATA": str(tmp_path / "data"),
        "HEADSCOPE_CACHE": str(tmp_path / "cache"),
        "HEADSCOPE_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


@pytest.fixture
def headscope(environment: dict[str, str]) -> Callable[..., Said]:
    """Runs a command to its end."""

    def run(*arguments: object) -> Said:
        return ran(*arguments, env=environment)

    return run


def refused(said: Said) -> str:
    """The one sentence of a refusal."""
    assert said.returncode == 2, said
    assert "Traceback" not in said.stdout + said.stderr
    assert said.stdout == ""
    lines = said.stderr.strip().splitlines()
    assert len(lines) == 1, said.stderr
    assert lines[0].startswith("headscope: ")
    assert lines[0].endswith((".", ")"))
    return lines[0]


def counted(environment: dict[str, str], table: str) -> int:
    """Rows of a table; 0 without a database."""
    path = Path(environment["HEADSCOPE_DATA"]) / "headscope.db"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found: int = connection.execute(f"select count(*) from {table}").fetchone()[0]
        return found


def nothing_registered(environment: dict[str, str]) -> bool:
    """Neither a model, nor a corpus, nor a job was written."""
    return [counted(environment, table) for table in ("model", "corpus", "job")] == [0, 0, 0]


# ---- what must stay light ----


@pytest.mark.parametrize(
    "command", ["import server.cli", "from server.app import create_app", "import server.live, server.doctor"]
)
def test_the_light_half_never_imports_torch(command: str) -> None:
    heavy = "[m for m in ('torch', 'transformers', 'transformer_lens') if m in sys.modules]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {command}; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="only glibc has arenas, and tells of them")
def test_threads_share_two_heaps_once_that_is_asked_for() -> None:
    code = """
import ctypes, sys, threading
from server import cli
if sys.argv[1] == "shared":
    cli._share_heaps()
libc, all_there = ctypes.CDLL(None), threading.Barrier(8)
def work():
    libc.malloc(1000)
    all_there.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""
    command = [sys.executable, "-c", code]
    heaps = {
        how: subprocess.run([*command, how], capture_output=True, text=True, check=True).stdout.count("<heap nr=")
        for how in ("shared", "own")
    }
    assert heaps["shared"] == 2
    assert heaps["own"] > 4


def test_help_names_every_command_with_an_example(headscope: Callable[..., Said]) -> None:
    said = headscope("--help").stdout
    for command in ("demo", "up", "serve", "worker", "engine", "train", "harvest", "doctor", "db", "model", "corpus"):
        assert re.search(rf"\b{command}\b", said)
    assert "headscope train --model gpt2 --layer 5" in " ".join(headscope("train", "--help").stdout.split())


# ---- options from configs ----


def test_every_field_of_the_configs_is_an_option_with_its_description() -> None:
    found = options(TrainConfig, skip=("site", "rows", "harvests"))
    assert set(found) == set(TrainConfig.model_fields) - {"site", "rows", "harvests"}
    for name, parameter in found.items():
        assert parameter.annotation.__metadata__[0].help == TrainConfig.model_fields[name].description


def test_only_what_was_given_reaches_the_config() -> None:
    values = {"context": 64, "tokens": None, "harvest_top_k": 5, "harvest_bands": None}
    assert given(values, RowsConfig) == {"context": 64}
    assert given(values, HarvestConfig, prefix="harvest-") == {"top_k": 5}
    assert built(HarvestConfig, {"top_k": 5}) == HarvestConfig(top_k=5)


# ---- a run in the foreground ----


def test_train_without_a_worker_runs_here_and_publishes(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    # In a process that has loaded nothing: it finds all that training and harvesting need by itself.
    done = fresh("train", "--model", model, "--corpus", text, "--name", "first", *SMALL, env=environment)
    assert done.returncode == 0, done
    assert "train-first-1 is done." in done.stdout
    assert re.search(r"harvest-first-\w+ is done\.", done.stdout)
    with sqlite3.connect(Path(environment["HEADSCOPE_DATA"]) / "headscope.db") as connection:
        published = connection.execute("select count(*) from sae join harvest on harvest.id = sae.harvest_id").fetchone()
        examples = connection.execute("select count(*) from example").fetchone()
    connection.close()
    assert published == (1,)
    assert examples[0] > 0
    assert "tiny" in headscope("model", "list").stdout
    assert "words" in headscope("corpus", "list").stdout
    again = headscope("harvest", "--sae", "first", "--tokens", "4096", "--top-k", "3", "--per-band", "1")
    assert "is done already" in again.stdout
    other = headscope("harvest", "--sae", "first", "--tokens", "2048", "--top-k", "2")
    assert other.returncode == 0, other
    assert "--sae names one" in refused(headscope("harvest", "--tokens", "2048"))

    # ---- the harvests that are stored ----
    listed = headscope("harvests", "list").stdout
    assert re.search(r"2 +first +published", listed)
    assert re.search(r"1 +first +replaced", listed)
    assert "pages of first show" in refused(headscope("harvests", "delete", "2"))
    assert "Harvest 1 is deleted." in headscope("harvests", "delete", "1").stdout
    remade = headscope("harvest", "--model", "tiny", "--tokens", "4096", "--top-k", "3", "--per-band", "1")
    assert remade.returncode == 0, remade
    assert re.search(r"harvest-first-\w+ is done\.", remade.stdout)
    assert re.search(r"first +published +[\d,]+ ", headscope("harvests", "list").stdout)

    # ---- and what can be asked of an SAE that exists ----
    few = ["--prose-rows", "4", "--repeated-rows", "2", "--dead-tokens", "512"]
    measured = headscope("evaluate", "first", *few)
    assert measured.returncode == 0, measured
    for word in ("evaluate-first-", "L0", "FVU", "dead"):
        assert word in measured.stdout
    asked = headscope("evaluate", "first", "--json", *few)
    assert asked.returncode == 0, asked
    assert json.loads(asked.stdout)["reconstruction"]["tokens"] > 0
    assert "is done." in asked.stderr
    assert "There is no SAE nobody" in refused(headscope("evaluate", "nobody"))
    assert "There is no file or folder" in refused(headscope("evaluate", "first", "--probe", "gone.jsonl"))
    with contextlib.closing(sqlite3.connect(Path(environment["HEADSCOPE_DATA"]) / "headscope.db")) as connection:
        connection.execute("update sae set config = json_remove(config, '$.train')")  # as if it came from elsewhere
        connection.commit()
    for command in (("harvest", "--sae", "first"), ("evaluate", "first")):
        assert "first was not trained here" in refused(headscope(*command))


def test_control_c_in_a_foreground_run_loses_nothing(
    environment: dict[str, str], model: Path, text: Path, tmp_path: Path
) -> None:
    command = ["train", "--model", model, "--corpus", text, "--name", "long", *SMALL, "--passes", "100", "--batch", "64"]
    command += ["--tokens", "32768", "--checkpoint-steps", "50", "--harvest-tokens", "0"]
    running = Command(*command, env=environment, stdout=tmp_path / "said")
    data = Path(environment["HEADSCOPE_DATA"])
    wait_for(lambda: any((left_by(data, "train-long-1") / "runs/000/checkpoints").glob("step-*")))
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    said = (tmp_path / "said").read_text()
    assert "`headscope worker` goes on with train-long-1" in said
    assert "Traceback" not in said
    with sqlite3.connect(Path(environment["HEADSCOPE_DATA"]) / "headscope.db") as connection:
        status = connection.execute("select status from job").fetchall()
    connection.close()
    assert status == [("running",)]
    assert any((left_by(data, "train-long-1") / "runs/000/checkpoints").glob("step-*"))


def test_with_a_worker_running_train_queues_for_it_and_can_watch(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    assert headscope("db", "upgrade").returncode == 0
    worker = Command("worker", env=environment)
    try:
        wait_for(lambda: counted(environment, "worker") == 1)
        done = headscope(
            "train", "--model", model, "--corpus", text, "--name", "queued", "--watch", *SMALL[:-6], "--harvest-tokens", "0"
        )
        assert done.returncode == 0, done
        assert "Queued train-queued-1." in done.stdout
        assert "train-queued-1 is done." in done.stdout
        failing = headscope("train", "--model", model, "--corpus", text, "--watch", *SMALL[2:], "--layer", "9")
        assert "0 to 3" in refused(failing)
    finally:
        worker.send_signal(signal.SIGINT)
        assert worker.wait(60) == 0


def test_how_a_job_is_done_is_asked_for_by_options(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    assert headscope("db", "upgrade").returncode == 0
    database = Database(Settings(data=Path(environment["HEADSCOPE_DATA"])).url)

    def queued(name: str, *how: object) -> Said:
        with database.write() as session:
            store.beat(session, "worker-9", "cpu", 1)  # so that it is queued and not done here
        return headscope("train", "--model", model, "--corpus", text, "--name", name, *SMALL, *how)

    asked, usual = ("--priority", "1", "--only-on", "cuda", "--time-limit", "90"), ()
    for name, how in (("urgent", asked), ("usual", usual)):
        assert f"Queued train-{name}-1." in (said := queued(name, *how)).stdout, said
    with database.read() as session:
        found = [store.get(session, f"train-{name}-1") for name in ("urgent", "usual")]
    assert [(job.priority, job.only_on, job.time_limit) for job in found] == [(1, "cuda", 90.0), (5, None, None)]
    for wrong in (("--priority", "10"), ("--only-on", "abacus"), ("--time-limit", "-1")):
        said = queued("wrong", *wrong)
        assert said.returncode == 2, said
        assert wrong[0] in said.stderr
    assert counted(environment, "job") == 2
    database.close()


# ---- bad input ----


def test_unknown_models_are_named(headscope: Callable[..., Said], environment: dict[str, str], text: Path) -> None:
    assert "no model at ./nowhere" in refused(headscope("train", "--model", "./nowhere", "--corpus", text, *SMALL))
    assert "nobody/no-such-model" in refused(headscope("train", "--model", "nobody/no-such-model", "--corpus", text, *SMALL))
    assert nothing_registered(environment)


def test_a_layer_out_of_range_is_named_with_what_there_is(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, text: Path
) -> None:
    assert "0 to 3" in refused(headscope("train", "--model", model, "--corpus", text, *SMALL, "--layer", "77"))
    assert nothing_registered(environment)


def test_empty_binary_and_missing_corpora_are_named(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, tmp_path: Path
) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("  \n\n")
    binary.write_bytes(b"\x00\x01\xff" * 1000)
    assert "empty.txt" in refused(headscope("corpus", "add", "e", empty))
    assert "binary.txt" in refused(headscope("train", "--model", model, "--corpus", binary, *SMALL))
    assert "no file or folder" in refused(headscope("corpus", "add", "m", tmp_path / "missing.txt"))
    assert nothing_registered(environment)


def test_an_unreadable_gguf_is_named(
    headscope: Callable[..., Said], environment: dict[str, str], text: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.gguf"
    whole = save_gguf(tmp_path / "whole.gguf").read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(os.urandom(4096))
    assert "torn.gguf" in refused(headscope("train", "--model", torn, "--corpus", text, *SMALL))
    assert "noise.gguf" in refused(headscope("model", "add", "noise", noise))
    assert nothing_registered(environment)
    assert list((tmp_path / "cache" / "models").glob("*")) == []


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--lr", "-1"], "--lr -1"),
        (["--tokens", "10"], "fewer than one batch"),
        (["--warmup", "0.9", "--decay", "0.9"], "warmup"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    headscope: Callable[..., Said], model: Path, text: Path, arguments: list[str], what: str
) -> None:
    assert what in refused(headscope("train", "--model", model, "--corpus", text, *SMALL, *arguments))


def test_a_taken_port_is_named_by_serve_and_up(headscope: Callable[..., Said]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command in ("serve", "up"):
            assert f"Port {port}" in refused(headscope(command, "--port", port))


@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_data_folder_that_cannot_be_written_is_named(headscope: Callable[..., Said], tmp_path: Path, place: str) -> None:
    if place == "file":  # a file where the folder should be stops root too, unlike a mode
        (tmp_path / "taken").write_text("not a folder")
        folder = tmp_path / "taken" / "data"
    else:
        folder = Path("/proc/headscope")
    for command in (["db", "upgrade"], ["serve"], ["up"]):
        assert str(folder) in refused(headscope(*command, "--data", folder))
    assert not folder.exists()


def test_a_full_data_folder_is_named(environment: dict[str, str]) -> None:
    def no_file_may_grow() -> None:  # works for root and user alike; the system answers as for a full disk or quota
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    command = [sys.executable, "-m", "server.cli", "db", "upgrade"]
    done = subprocess.run(command, env=environment, preexec_fn=no_file_may_grow, capture_output=True, text=True, check=False)
    assert "No room is left" in refused(done)


def may_mount() -> bool:
    """Whether this machine lets a process have mounts of its own, as root or as a user."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs user namespaces, for a disk of its own that is really small")
@pytest.mark.parametrize(("size", "what"), [("300k", "No room is left"), ("3m", "needs about")])
def test_a_really_full_disk_is_named(environment: dict[str, str], model: Path, text: Path, size: str, what: str) -> None:
    folder = Path(environment["HEADSCOPE_DATA"])
    folder.mkdir()
    train = [
        sys.executable,
        "-m",
        "server.cli",
        "train",
        "--model",
        str(model),
        "--corpus",
        str(text),
        *SMALL,
        "--tokens",
        "65536",
    ]
    script = f"mount -t tmpfs -o size={size} none {folder} && exec {shlex.join(train)}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert what in refused(done)


def test_a_database_of_a_newer_version_is_left_alone(headscope: Callable[..., Said], environment: dict[str, str]) -> None:
    assert headscope("db", "upgrade").returncode == 0
    path = Path(environment["HEADSCOPE_DATA"]) / "headscope.db"
    with sqlite3.connect(path) as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    connection.close()
    for command in (["db", "upgrade"], ["serve"], ["worker"], ["model", "list"]):
        assert "newer Headscope (schema 9999)" in refused(headscope(*command))


def test_a_database_of_an_older_version_asks_for_the_upgrade(headscope: Callable[..., Said], environment: dict[str, str]) -> None:
    folder = Path(environment["HEADSCOPE_DATA"])
    folder.mkdir()
    sqlite3.connect(folder / "headscope.db").execute("create table other (id integer)").connection.close()
    assert "headscope db upgrade" in refused(headscope("model", "list"))


def test_a_wrong_variable_and_a_missing_token_file_are_named(
    headscope: Callable[..., Said], environment: dict[str, str], model: Path, tmp_path: Path
) -> None:
    environment["HEADSCOPE_PORT"] = "eight"
    assert "HEADSCOPE_PORT=eight" in refused(headscope("model", "list"))
    environment["HEADSCOPE_PORT"] = "8000"
    environment["HEADSCOPE_HOST"] = "0.0.0.0"
    assert "Without accounts" in refused(headscope("serve"))
    environment["HEADSCOPE_HOST"] = "127.0.0.1"
    environment["HEADSCOPE_HF_TOKEN_FILE"] = str(tmp_path / "no-token")
    assert "no-token" in refused(headscope("model", "add", "m", model))


def test_a_device_that_is_not_there_is_named(headscope: Callable[..., Said], environment: dict[str, str]) -> None:
    for command in (["worker", "--device", "cuda:63"], ["doctor", "--json"]):
        environment["HEADSCOPE_DEVICE"] = "cuda:63"
        assert "no device cuda:63" in refused(headscope(*command))


def test_doctor_says_what_is_here_as_text_and_as_json(headscope: Callable[..., Said]) -> None:
    said = headscope("doctor", "--json", "--tokens", "100000")
    found = json.loads(said.stdout)
    assert found["worker_extra"] is True
    assert found["devices"][-1]["name"] == "cpu"
    assert min(found["speeds"].values()) > 0
    assert set(found["run"]["seconds"]) == {"prepare", "collect", "train", "evaluate", "harvests"}
    assert set(found["harvest"]["seconds"]) == {"scan", "choose", "visit", "features", "write"}
    assert found["harvest"]["tokens"] == 100_000
    assert "GFLOP/s" in headscope("doctor").stdout


# ---- up ----


class Up:
    """`headscope up` on two free ports."""

    def __init__(self, environment: dict[str, str]) -> None:
        with socket.socket() as one, socket.socket() as two:
            for free in (one, two):
                free.bind(("127.0.0.1", 0))
            self.port, engine = one.getsockname()[1], two.getsockname()[1]
        self.data = Path(environment["HEADSCOPE_DATA"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "up", "--port", str(self.port)],
            env=environment | {"HEADSCOPE_ENGINE_PORT": str(engine)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        self.first_line = self.process.stdout.readline()

    def children(self) -> list[int]:
        """Process ids of the three."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found]


@pytest.fixture
def up(environment: dict[str, str]) -> Iterator[Up]:
    started = Up(environment)
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.communicate(timeout=60)


def gone(pids: list[int], seconds: float = 30) -> bool:
    """Whether all of these processes end in time."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_up_serves_pages_starts_a_dead_child_again_and_control_c_stops_all_three(up: Up) -> None:
    assert f"http://127.0.0.1:{up.port}" in up.first_line
    assert httpx.get(f"http://127.0.0.1:{up.port}/healthz").status_code == 200
    before = up.children()
    assert len(before) == 3
    os.kill(before[1], signal.SIGKILL)
    wait_for(lambda: len(set(up.children()) - set(before)) == 1, 30)
    children = up.children()
    assert len(children) == 3
    up.process.send_signal(signal.SIGINT)
    said, _ = up.process.communicate(timeout=60)
    assert up.process.returncode == 0
    assert "Traceback" not in said
    assert gone(children, 1)


def test_children_leave_when_up_is_killed(up: Up) -> None:
    children = up.children()
    assert len(children) == 3
    up.process.kill()
    assert gone(children)
