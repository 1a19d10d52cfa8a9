"""Dockerfile and docker-compose.yml, read by the tools that know them, and held against the code. Nothing is started here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings
from typer.main import get_command

from server.cli import app
from server.db import Database
from server.settings import Settings
from server.watch import Watch

ROOT = Path(__file__).resolve().parent.parent
COMPOSE, DOCKERFILE = ROOT / "docker-compose.yml", ROOT / "Dockerfile"
GPUS = {"gpu": 1, "gpus-2": 2, "gpus-4": 4}


def tool(name: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A tool of the test extra, with no variables but those given."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    path = shutil.which(name, path=places)
    assert path, f"{name} is missing; make venv installs it"
    return subprocess.run(
        [path, *words],
        env={"PATH": places, "HOME": str(Path.home())} | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def composed(*profiles: str, **variables: str) -> dict[str, Any]:
    """The compose file with its variables filled in, as the services of these profiles get it."""
    chosen = [word for profile in profiles for word in ("--profile", profile)]
    # `echo` stands for podman, which is only asked for its version.
    done = tool("podman-compose", "--podman-path", shutil.which("echo") or "", *chosen, "-f", str(COMPOSE), "config", **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return composed(*GPUS, "demo")


@pytest.mark.parametrize(
    "path", [DOCKERFILE, *sorted((ROOT / "tests" / "compose").glob("*Dockerfile"))], ids=lambda path: path.name
)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = tool("hadolint", "--no-color", str(path))
    assert (done.stdout, done.returncode) == ("", 0)


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install x\n")
    assert tool("hadolint", str(tmp_path / "Dockerfile")).returncode == 1


@pytest.mark.parametrize("path", [COMPOSE, *sorted((ROOT / "tests" / "compose").glob("*.yml"))], ids=lambda path: path.name)
def test_the_compose_file_is_what_the_specification_allows(path: Path) -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(path))
    assert done.returncode == 0, done.stdout


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(COMPOSE.read_text().replace("healthcheck:", "healthchek:", 1))
    assert tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(tmp_path / "c.yml")).returncode == 1


def test_every_profile_gives_what_it_promises() -> None:
    usual = {"db", "migrate", "web", "worker", "engine"}
    assert set(composed()["services"]) == usual
    assert set(composed("demo")["services"]) == usual | {"demo"}
    for profile, n in GPUS.items():
        assert set(composed(profile)["services"]) == usual | {f"worker-gpu{i}" for i in range(n)}


def test_each_gpu_worker_has_a_gpu_of_its_own(compose: dict[str, Any]) -> None:
    workers = {name: one for name, one in compose["services"].items() if name.startswith("worker-gpu")}
    devices = [one["deploy"]["resources"]["reservations"]["devices"] for one in workers.values()]
    assert [one["device_ids"] for (one,) in devices] == [[str(i)] for i in range(len(workers))]
    assert all(one["capabilities"] == ["gpu"] and one["driver"] == "nvidia" for (one,) in devices)
    assert all(one["environment"]["HEADSCOPE_DEVICE"] == "cuda" for one in workers.values())


def test_variables_of_the_file_are_filled_in() -> None:
    of_a_lab = composed(PUBLIC_URL="https://lab.example/headscope", BASE="registry.example/python", PORT="80", CPU_WORKERS="0")
    services = of_a_lab["services"]
    assert {one["environment"].get("HEADSCOPE_PUBLIC_URL") for name, one in services.items() if name != "db"} == {
        "https://lab.example/headscope"
    }
    assert "BASE=registry.example/python" in services["web"]["build"]["args"]
    assert services["web"]["ports"] == ["127.0.0.1:80:8000"]
    assert int(services["worker"]["deploy"]["replicas"]) == 0


def test_only_the_pages_are_published_and_only_here(compose: dict[str, Any]) -> None:
    assert {name: one["ports"] for name, one in compose["services"].items() if "ports" in one} == {"web": ["127.0.0.1:8000:8000"]}


def test_what_lasts_is_started_again_and_what_ends_is_not(compose: dict[str, Any]) -> None:
    restarts = {name: one["restart"] for name, one in compose["services"].items()}
    ends = {name: restarts.pop(name) for name in ("migrate", "demo")}
    assert set(restarts.values()) == {"unless-stopped"}
    assert all(policy.startswith("on-failure:") for policy in ends.values())


def test_our_services_can_change_nothing_but_their_data(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        assert "no-new-privileges:true" in one["security_opt"], name
        if name != "db":
            assert (one["read_only"], one["cap_drop"], one["tmpfs"]) == (True, ["ALL"], ["/tmp"]), name
            assert one["volumes"] == ["data:/data"], name
        assert "privileged" not in one, name


def test_no_secret_stands_in_the_file_and_each_is_a_file_of_its_own(compose: dict[str, Any]) -> None:
    assert {name: one["file"] for name, one in compose["secrets"].items()} == {
        name: f"./secrets/{name}" for name in compose["secrets"]
    }
    given = {secret for one in compose["services"].values() for secret in one["secrets"]}
    assert given == set(compose["secrets"])
    for name, one in compose["services"].items():
        for variable, value in one["environment"].items():
            if variable.endswith("_FILE"):
                assert Path(value).name in one["secrets"], (name, variable)
            else:
                assert not re.search("PASSWORD|SECRET|TOKEN", variable), (name, variable)
        assert not re.search(r"://[^/]*:[^/]*@", str(one["environment"]))


def test_settings_and_commands_that_the_file_names_exist(compose: dict[str, Any]) -> None:
    known = {f"HEADSCOPE_{name.upper()}" for name in Settings.model_fields}
    assert issubclass(Settings, BaseSettings)
    for name, one in compose["services"].items():
        assert {variable for variable in one["environment"] if variable.startswith("HEADSCOPE_")} <= known, name
        command: Any = get_command(app)
        for word in one.get("command", ["headscope"])[1:]:
            if word.startswith("--"):
                assert word in {flag for option in command.params for flag in option.opts}, (name, word)
            else:
                command = command.commands[word]
    named = set(re.findall(r"HEADSCOPE_[A-Z_]+", DOCKERFILE.read_text()))
    assert named
    assert named <= known


def test_every_service_has_a_limit_or_a_device(compose: dict[str, Any]) -> None:
    lasting = {name: one for name, one in compose["services"].items() if name not in ("migrate", "demo")}
    for name, one in lasting.items():
        resources = one["deploy"]["resources"]
        assert "reservations" in resources or {"cpus", "memory"} <= set(resources["limits"]), name


def test_all_wait_for_the_migration_and_it_for_the_database(compose: dict[str, Any]) -> None:
    waits = {name: one.get("depends_on", {}) for name, one in compose["services"].items()}
    assert waits.pop("db") == {}
    assert waits.pop("migrate") == {"db": {"condition": "service_healthy"}}
    assert all(one == {"migrate": {"condition": "service_completed_successfully"}} for one in waits.values())


def test_the_webs_image_has_no_torch_and_both_have_another_user_than_root() -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE.read_text(), re.M | re.S))
    assert "[worker]" in stages["worker-build"]
    assert not re.search(r"torch|\[worker\]", re.sub("#.*", "", stages["web-build"] + stages["source"]), re.I)
    assert "COPY --from=web-build" in stages["web"]
    assert "USER 10001:10001" in stages["runtime"]
    assert {"HEALTHCHECK"} <= set(stages["web"].split()) & set(stages["worker"].split())
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.M)
    assert set(bases) <= {"${BASE}", "source", "runtime"}


def test_an_image_is_built_from_nothing_but_the_source() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    packaged = {"server", "sae_core", "templates", "static", "migrations", "pyproject.toml", "README.md", "constraints.txt"}
    assert packaged | {"LICENSE", "NOTICE"} == kept


def blocks(name: str, language: str) -> list[str]:
    """The blocks of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.M | re.S)


def test_kubernetes_would_take_the_documented_manifests(tmp_path: Path) -> None:
    (manifests,) = blocks("kubernetes.md", "yaml")
    path = tmp_path / "m.yaml"
    path.write_text(manifests)
    done = tool("kubernetes-validate", "--strict", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [one["kind"] for one in yaml.safe_load_all(manifests)]
    assert kinds == ["StatefulSet", "PersistentVolumeClaim", "Service"]
    path.write_text(manifests.replace("replicas: 2", "replica: 2"))
    assert tool("kubernetes-validate", "--strict", str(path)).returncode != 0


def test_the_documented_slurm_script_is_sound(tmp_path: Path) -> None:
    (script,) = blocks("slurm.md", "bash")
    path = tmp_path / "worker.sh"
    path.write_text(script)
    assert tool("bash", "-n", str(path)).returncode == 0
    done = tool("shellcheck", str(path))
    assert (done.stdout, done.returncode) == ("", 0)
    options = re.findall(r"^#SBATCH (--[a-z-]+)", script, re.M)
    assert {"--signal", "--gres", "--time"} <= set(options)
    path.write_text(script.replace('"$HOME/headscope/bin/headscope"', "$HOME/$1/headscope"))
    assert tool("shellcheck", str(path)).returncode == 1


@pytest.mark.parametrize("path", [*(ROOT / "tests" / "compose").glob("*.sh"), ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    done = tool("shellcheck", "--shell", "bash" if path.name == "run" else "sh", str(path))
    assert (done.stdout, done.returncode) == ("", 0)


def test_what_documents_tell_prometheus_exists(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, cache=tmp_path)
    db = Database(settings.url)
    db.upgrade()
    told = Watch(settings, db, "web").page().decode() + Watch(settings, db, "worker", worker="worker-0").page().decode()
    db.close()
    known = set(re.findall(r"^# TYPE (\w+) ", told, re.M))
    (_, rules) = blocks("deploy.md", "yaml")
    alerts = yaml.safe_load(rules)["groups"][0]["rules"]
    named = {re.sub("_bucket$", "", name) for one in alerts for name in re.findall(r"headscope_\w+", one["expr"])}
    assert len(alerts) >= 5
    assert named <= known
    assert all(one["annotations"]["summary"] for one in alerts)


def test_ci_looks_for_secrets_and_reports_faults_of_packages() -> None:
    steps = re.findall(r"^step (\w+) make (\w+)", (ROOT / ".ci" / "run").read_text(), re.M)
    assert {("secrets", "secrets"), ("audit", "audit")} <= set(steps)


def test_a_secret_is_found_and_an_audit_without_a_network_fails_nothing(tmp_path: Path) -> None:
    made = (ROOT / "Makefile").read_text()
    words = re.search(r"^NO_SECRETS := (.*)$", made, re.M)
    assert words
    key = "AKIA" + "IOSFODNN7EXAMPLE"
    for text in (f'name = "{key}"\n', "pass" + 'word = "hunter2hunter2"\n', "-----BEGIN RSA PRIVATE" + " KEY-----\n"):
        (tmp_path / "x.py").write_text(text)
        assert tool("detect-secrets-hook", "--no-verify", *words[1].split(), str(tmp_path / "x.py")).returncode == 1, text
    (tmp_path / "x.py").write_text("digest = '7c4a8d09ca3762af61e59520943dc26494f8941b'\n")
    assert tool("detect-secrets-hook", "--no-verify", *words[1].split(), str(tmp_path / "x.py")).returncode == 0
    audit = re.search(r"^audit:.*\n((?:\t.*\n)+)", made, re.M)
    assert audit
    assert "timeout " in audit[1]
    (tmp_path / "constraints.txt").write_text("jinja2==3.1.0\n")
    nowhere = dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), "http://127.0.0.1:9")
    command = audit[1].replace("\t@", "").replace("\\\n", " ").replace("$(BIN)", str(Path(sys.executable).parent))
    command = command.replace("constraints.txt", str(tmp_path / "constraints.txt"))
    done = tool("bash", "-c", command, **nowhere)
    assert done.returncode == 0
    assert "nothing fails for it" in done.stdout
