"""`make compose-test`: docker-compose.yml really run, by podman, from no image that somebody else made.

A Debian is made with debootstrap (kept in the cache), the web's image is built on it by our Dockerfile, PostgreSQL's is Debian's.
No image holds torch: worker and engine get the packages of this environment mounted, whose Python must be 3.11 too. Then a
small SAE is trained and harvested through the published port, a page is opened, a text is asked about, everything is stopped and
started again, and the page must still say the same. Afterwards nothing of it is left but the Debian.

Needs root and: apt-get install podman buildah runc netavark aardvark-dns iptables catatonit debootstrap
"""

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from server.demo import fetch_model, fetch_text
from server.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
PROJECT = "headscope-test"
BASE, WEB, POSTGRES = (f"localhost/{PROJECT}-{name}" for name in ("base", "web", "postgres"))
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-venv,postgresql"
PROGRAMS = ("podman", "buildah", "runc", "debootstrap", "catatonit")
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{0}/graph"\nrunroot = "{0}/run"\n'
# crun knows no hybrid cgroups, and a container may not raise limits that its host has lower.
CONTAINERS = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[network]
network_backend = "netavark"
"""
BEGAN = time.monotonic()


def say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - BEGAN:6.0f} s  {text}\n")
    sys.stdout.flush()


def call(*words: str, check: bool = True, **more: Any) -> str:
    """Run a program; its output. What it said is shown where it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **more)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words[:6])} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout.strip()


def base(cache: Path) -> Path:
    """A Debian as a tar file, made once."""
    packed = cache / "compose" / f"{SUITE}.tar"
    if not packed.exists():
        packed.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packed.parent) as folder:
            call("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, f"{folder}/debian")
            shutil.rmtree(f"{folder}/debian/var/cache/apt", ignore_errors=True)
            call("tar", "-C", f"{folder}/debian", "-cf", f"{folder}/debian.tar", ".")
            Path(folder, "debian.tar").rename(packed)
    return packed


class Stack:
    """The services of docker-compose.yml, under podman."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.password = secrets.token_hex(12)
        models = folder / "models"
        models.mkdir(exist_ok=True)
        shutil.copy(fetch_model(settings.cache), models / "model.gguf")
        with fetch_text(settings.cache).open() as lines, (models / "text.jsonl").open("w") as few:
            few.writelines(line for _, line in zip(range(400), lines, strict=False))
        (folder / "storage.conf").write_text(STORAGE.format(folder))
        (folder / "containers.conf").write_text(CONTAINERS)
        os.environ |= {
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf", "CONTAINERS_CONF": f"{folder}/containers.conf",
            "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(folder), "MODELS": str(models),
            "PACKAGES": sysconfig.get_paths()["purelib"],
            "WEB_IMAGE": WEB, "WORKER_IMAGE": WEB, "POSTGRES_IMAGE": POSTGRES, "PORT": str(self.port),
            "PUBLIC_URL": f"http://127.0.0.1:{self.port}",
        }  # fmt: skip
        # This podman cannot start what needs a container that needs another. So nothing waits but the processes themselves.
        read = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
        for service in read["services"].values():
            service.pop("depends_on", None)
        (folder / "compose.yml").write_text(yaml.safe_dump(read))
        shutil.copy(HERE / "podman.yml", folder)
        (folder / "secrets").mkdir(mode=0o700, exist_ok=True)
        for name in ("database_password", "engine_secret", "admin_password"):
            path = folder / "secrets" / name
            path.unlink(missing_ok=True)
            path.write_text(self.password if name == "admin_password" else secrets.token_hex(16))
            path.chmod(0o444)  # read by the containers' users, within a folder that only we may enter

    def build(self, packed: Path) -> None:
        """The images."""
        call("podman", "import", str(packed), BASE)
        # `--format docker` keeps HEALTHCHECK; the certificates are those that this machine trusts.
        common = ["buildah", "bud", "--network=host", "--pull-never", "--format", "docker", "--build-arg", f"BASE={BASE}"]
        trust = ["--build-arg", f"PIP_CERT={CERTIFICATES}", "-v", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        index = [
            word for name in ("PIP_INDEX_URL",) if name in os.environ for word in ("--build-arg", f"{name}={os.environ[name]}")
        ]
        call(*common, *trust, *index, "--target", "web", "-t", WEB, str(ROOT))
        call(*common, "-f", str(HERE / "postgres.Dockerfile"), "-t", POSTGRES, str(HERE))

    def compose(self, *words: str, check: bool = True) -> str:
        """podman-compose."""
        files = ("-f", f"{self.folder}/compose.yml", "-f", f"{self.folder}/podman.yml")
        return call(
            str(Path(sys.executable).parent / "podman-compose"), "-p", PROJECT, *files, *words, check=check, cwd=self.folder
        )

    def name(self, service: str) -> str:
        """The container of a service."""
        found = call("podman", "ps", "-a", "--filter", f"label=com.docker.compose.service={service}", "--format", "{{.Names}}")
        return found.splitlines()[0]

    def inside(self, service: str, *words: str, check: bool = True) -> str:
        """Run a program in the container of a service."""
        return call("podman", "exec", self.name(service), *words, check=check)

    @contextmanager
    def visit(self) -> Iterator[httpx.Client]:
        """A browser of the admin's."""
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=180) as client:
            answer = client.post("/login", data={"name": "admin", "password": self.password})
            assert answer.status_code == 303, answer.text
            yield client

    def wait(self, seconds: float = 900) -> None:
        """Until pages can be served."""
        deadline, last = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                answer = httpx.get(f"http://127.0.0.1:{self.port}/readyz", trust_env=False, timeout=5)
                if answer.status_code == 200:
                    return
                last = answer.text
            except httpx.HTTPError as error:
                last = str(error)
            time.sleep(1)
        raise SystemExit(f"not ready within {seconds} s: {last}\n{self.compose('logs', check=False)[-6000:]}")

    def remove(self) -> None:
        """Everything that was made."""
        self.compose("down", "--volumes", "--timeout", "5", check=False)
        call("podman", "system", "reset", "--force", check=False)


def finished(client: httpx.Client, job: str, seconds: float = 1500) -> dict[str, Any]:
    """The job once it has ended well."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        page: dict[str, Any] = client.get(f"/jobs/{job}.json").json()
        if page["job"]["status"] in ("done", "failed", "cancelled"):
            assert page["job"]["status"] == "done", page["job"]["error"]
            return page
        time.sleep(2)
    raise SystemExit(f"{job} has not ended within {seconds} s: {page['job']}")


def trained(client: httpx.Client) -> str:
    """Train and harvest a small SAE through the API; the address of a feature of it that fires."""
    config = {
        "model": "smollm2", "corpus": "text", "site": {"layer": 1}, "arch": "batchtopk", "expansion": 1, "k": 8, "batch": 1024,
        "rows": {"context": 64, "tokens": 16_384, "heldout_tokens": 512}, "harvests": [{"tokens": 8192, "top_k": 5}],
    }  # fmt: skip
    made = client.post("/api/v1/jobs", json={"kind": "train", "name": f"composed-{secrets.token_hex(2)}", "config": config})
    assert made.status_code == 201, made.text
    job = made.json()["id"]
    page = finished(client, job)
    say(f"trained by the API: {job}")
    for child in page["children"]:
        finished(client, child["id"])
        say(f"harvested: {child['id']}")
    (sae,) = finished(client, job)["saes"]
    rows = client.get(f"/saes/{sae}.json").json()["table"]["rows"]
    return f"/saes/{sae}/features/{next(one['index'] for one in rows if one['n_fired'])}"


def looked_at(stack: Stack, client: httpx.Client, address: str) -> dict[str, Any]:
    """A feature's page, opened and asked about; what it says."""
    page: dict[str, Any] = client.get(f"{address}.json").json()
    html = client.get(address)
    assert html.status_code == 200
    assert page["sae"]["name"] in html.text
    question = {"sae": page["sae"]["name"], "index": page["index"], "text": "The cat sat on the mat."}
    answer = client.post("/api/v1/live/attribution", json=question)
    assert answer.status_code == 200, answer.text
    assert answer.json()["gap"] < 1e-3
    says = f"{page['n_fired']} firings, {len(page['examples'])} examples"
    say(f"opened {address}: {says}; the engine answers, gap {answer.json()['gap']:.1e}")
    status = client.get("/status.json").json()
    assert [one["id"] for one in status["workers"]] == ["worker-0"]
    assert status["engine"]["answers"]
    say(f"/status: {status['workers'][0]['device']} worker, {status['database']}, {status['database_bytes'] / 1e6:.0f} MB")
    metrics = httpx.get(f"http://127.0.0.1:{stack.port}/metrics", trust_env=False)
    worker = stack.inside("worker", "python", "-c", f"{OPEN}print(urlopen('http://127.0.0.1:9100/metrics').read().decode())")
    assert metrics.status_code in (303, 401)
    assert "headscope_worker_busy 0.0" in worker
    return page


OPEN = "from urllib.request import urlopen; "


def left(stack: Stack) -> None:
    """Each process leaves when it is asked to."""
    for service in ("web", "worker", "engine"):
        began = time.monotonic()
        call("podman", "stop", "--time", "60", stack.name(service))
        seconds = time.monotonic() - began
        code = call("podman", "inspect", stack.name(service), "--format", "{{.State.ExitCode}}")
        say(f"{service} left {seconds:.1f} s after SIGTERM with {code}")
        assert code == "0", call("podman", "logs", "--tail", "20", stack.name(service))


def checked(stack: Stack) -> None:
    """The whole story."""
    stack.compose("up", "--detach")
    stack.wait()
    say("the stack is up: " + ", ".join(sorted(call("podman", "ps", "--format", "{{.Names}}").split())))
    absent = stack.inside("web", "python", "-c", "import importlib.util as u; print(u.find_spec('torch'))")
    assert absent == "None"
    stack.inside("worker", "headscope", "model", "add", "smollm2", "/models/model.gguf")
    stack.inside("worker", "headscope", "corpus", "add", "text", "/models/text.jsonl")
    with stack.visit() as client:
        address = trained(client)
        before = looked_at(stack, client, address)
    left(stack)
    stack.compose("down")
    assert call("podman", "ps", "-aq") == ""
    say("stopped and removed; the volumes stay")
    stack.compose("up", "--detach")
    stack.wait()
    with stack.visit() as client:
        assert client.get(f"{address}.json").json() == before
    say("started again: the page says the same")


def main() -> None:
    """Run it; 0 where all of it held."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--keep", action="store_true", help="leave the stack running, to look at it")
    asked.add_argument("--again", type=Path, help="take the images of a run that was kept")
    given = asked.parse_args()
    lacking = [
        name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/libexec/podman") is None
    ]
    if lacking or os.geteuid():
        raise SystemExit(f"This needs root, and: {' '.join(lacking) or 'nothing else'} (see the top of {Path(__file__).name}).")
    settings = Settings().prepare()
    packed = base(settings.cache)
    say("a Debian")
    folder = given.again or Path(tempfile.mkdtemp(prefix="headscope-compose-"))
    stack = Stack(folder, settings)
    try:
        if given.again is None:
            stack.build(packed)
        say("images: " + ", ".join(call("podman", "images", "--format", "{{.Repository}} {{.Size}}").splitlines()))
        checked(stack)
    finally:
        if not given.keep:
            stack.remove()
            shutil.rmtree(folder, ignore_errors=True)
    say("everything held")


if __name__ == "__main__":
    main()
