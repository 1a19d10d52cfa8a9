"""Debian's nginx in front, as docs/deploy.md has it: the path prefix, who a visitor is, and what a stranger may not pretend."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench import _served
from server.settings import Settings
from server.store import accounts
from server.up import environment
from tests.web.accounts import PASSWORD, settle
from tests.web.conftest import at, database_of
from tests.web.reading import Reader

ROOT = Path(__file__).resolve().parent.parent.parent
HOST = "lab.example"


def documented(prefix: str) -> str:
    """The server block of docs/deploy.md."""
    blocks = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
    return next(block for block in blocks if f"location {prefix}/" in block)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Settings, str]]:
    """The web process by its own command, nginx before it; settings, and nginx's address."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if nginx is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    lab = settle(at(folder / "data"))
    port, public = _served.free_port(), _served.free_port()
    settings = lab.settings.model_copy(
        update={"accounts": True, "port": port, "public_url": f"http://{HOST}:{public}/headscope", "log_format": "json"}
    )
    # The documented block but for its names, ports and TLS, which needs a certificate.
    block = documented("/headscope").replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    block = re.sub(r"\n *(ssl_\w+|http2) [^;]*;", "", block)
    block = re.sub(r"listen [^;]*;", f"listen 127.0.0.1:{public};", block)
    assert f"proxy_pass http://127.0.0.1:{port};" in block
    places = "".join(f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}{block}\n}}\n"
    )
    process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)], stderr=subprocess.DEVNULL)
    try:
        command = [sys.executable, "-m", "server.cli", "serve"]
        with _served.served(command, port, "/healthz", environment(settings)):
            address = f"http://127.0.0.1:{public}"
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", public)) == 0:
                        break
                time.sleep(0.1)
            yield settings, address
    finally:
        process.terminate()
        process.wait(10)


def visit(address: str, **headers: str) -> httpx.Client:
    public = address.rsplit(":", 1)[1]
    return httpx.Client(base_url=address, headers={"Host": f"{HOST}:{public}", **headers}, trust_env=False, timeout=30)


def test_pages_work_below_the_prefix(front: tuple[Settings, str]) -> None:
    _, address = front
    with visit(address) as client:
        assert client.get("/").status_code == 404  # of nginx: it hands on what is below the prefix alone
        page = client.get("/headscope/")
        assert page.status_code == 200
        ways = [a["href"] for a in Reader(page.text).all("a") if a["href"].startswith("/")]
        assert ways
        assert all(way.startswith("/headscope/") for way in ways)
        sheet = next(one["href"] for one in Reader(page.text).all("link") if one.get("rel") == "stylesheet")
        assert client.get(sheet).status_code == 200
        assert page.headers["x-request-id"]
        told = client.get("/headscope/healthz", headers={"X-Request-ID": "through-nginx"})
        assert told.headers["x-request-id"] == "through-nginx"


def test_a_visitor_is_who_the_proxy_says_and_not_who_they_say(front: tuple[Settings, str]) -> None:
    settings, address = front
    origin = f"http://{HOST}:{address.rsplit(':', 1)[1]}"
    sent = {"name": "Ola", "password": PASSWORD, "back": "/jobs"}
    with visit(address, **{"X-Forwarded-For": "203.0.113.9"}) as client:
        answer = client.post("/headscope/login", data=sent, headers={"Origin": origin, "Sec-Fetch-Site": "same-origin"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/headscope/jobs")
        assert client.post("/headscope/login", data=sent, headers={"Origin": "http://evil.example"}).status_code == 403
    with database_of(settings) as db, db.read() as session:
        newest = accounts.audit_page(session).changes[0]
    assert (newest.action, newest.who) == ("log in", "Ola")
    assert newest.address == "127.0.0.1"  # what nginx saw, whatever was claimed


def test_another_host_and_a_large_body_are_refused(front: tuple[Settings, str]) -> None:
    _, address = front
    with visit(address) as client:
        assert client.get("/headscope/", headers={"Host": "evil.example"}).status_code == 400
        assert client.post("/headscope/login", content=b"x" * 3_000_000).status_code == 413
