"""Commands that start a process which stays: the demo, all three processes together, or one of them."""

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from server import doctor as doctors
from server import up
from server.commands.arguments import Data, Device, Processes
from server.commands.environment import allow_wandb, give_token
from server.commands.opened import opened, settings_with
from server.commands.printing import say
from server.settings import Settings

app = typer.Typer()

Port = Annotated[int | None, typer.Option("--port", help="Port of the web pages.", show_default="8000")]
Host = Annotated[str | None, typer.Option("--host", help="Address of the web pages.", show_default="127.0.0.1")]

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""

_at_the_end: list[Callable[[], None]] = []
"""What sends the rest of the traces."""


@app.command(epilog="Example: [bold]headscope demo[/bold]")
def demo(
    data: Data = None,
    port: Port = None,
    queue: Annotated[bool, typer.Option("--queue", help="Fetch and queue, and leave the rest to workers that run.")] = False,
) -> None:
    """Fetch a real model and real text, train on them and show the result while it is made."""
    from server import demo as demos

    settings = settings_with(data=data, port=port)
    demos.queue(settings) if queue else demos.run(settings)


@app.command("up", epilog="Example: [bold]headscope up --port 8080[/bold]")
def up_(data: Data = None, host: Host = None, port: Port = None) -> None:
    """Start web, worker and engine together; Ctrl-C stops them and loses nothing."""
    doctors.need_worker_extra()
    up.run(settings_with(data=data, host=host, port=port).prepare(), say)


@app.command(epilog="Example: [bold]headscope serve --port 8080[/bold]")
def serve(
    data: Data = None,
    host: Host = None,
    port: Port = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Processes that answer; one fills a core.", show_default="1", min=1, max=64),
    ] = None,
) -> None:
    """Start the web pages alone. Needs no torch."""
    settings = settings_with(data=data, host=host, port=port, web_workers=workers)
    gc.disable()  # what is loaded has next to no garbage in it, and looking for some takes a tenth of the start
    with opened(settings) as (_, db):
        from server import watch
        from server.access import ensure_admin
        from server.app import create_app

        ensure_admin(settings, db)
        _watched(settings, "web")
        db.close()  # a connection must not be shared by processes that are forked
        with watch.shared(settings.web_workers) as folder:
            web = create_app(settings, folder)
            _share_heaps()
            _uvicorn(web, settings, settings.host, settings.port, "Headscope's pages are", settings.web_workers)


@app.command(epilog="Example, one worker per GPU: [bold]headscope worker --id gpu1 --device cuda:1[/bold]")
def worker(
    data: Data = None,
    worker_id: Annotated[
        str | None,
        typer.Option("--id", help="Name of this worker's slot; each live worker has its own.", show_default="the first free one"),
    ] = None,
    device: Device = None,
    processes: Processes = None,
) -> None:
    """Start a worker: it trains and harvests what is queued, one job at a time."""
    doctors.need_worker_extra()
    with opened(settings_with(data=data, worker_id=worker_id, device=device, processes=processes)) as (settings, db):
        give_token(settings)
        allow_wandb(settings)
        from server.worker import run_worker

        _watched(settings, "worker")
        run_worker(settings, db)
        _leave()


@app.command(epilog="Example: [bold]headscope engine[/bold]")
def engine(data: Data = None, device: Device = None) -> None:
    """Start the engine, which answers the pages' live questions on typed text."""
    doctors.need_worker_extra()
    with opened(settings_with(data=data, device=device)) as (settings, db):
        give_token(settings)
        from server.engine import create_engine

        port = settings.engine_port or settings.port + 1
        _watched(settings, "engine")
        _uvicorn(create_engine(settings, db), settings, settings.engine_host, port, "The engine is")


# ---- how a process begins, serves and ends ----


def _watched(settings: Settings, process: str) -> None:
    """Let this process say what happens, as the settings ask for it."""
    import atexit

    from server import logs, telemetry

    logs.begin(settings, process)
    _at_the_end.append(telemetry.begin(settings, process))
    atexit.register(_at_the_end[-1])


def _leave(*_: object) -> NoReturn:
    """Leave at once and well: all is kept by now, and taking torch down takes seconds."""
    _last_words()
    os._exit(0)


def _last_words() -> None:
    for act in _at_the_end:
        act()
    logging.shutdown()
    sys.stdout.flush()


def _share_heaps() -> None:
    """Let all threads share two heaps: else each keeps one of its own, as large as the largest page that it ever made."""
    with suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _uvicorn(web: Any, settings: Settings, host: str, port: int, what: str, processes: int = 1) -> None:
    import uvicorn

    from server import forked

    # uvicorn lets go of everything at SIGTERM and then sends it to itself once more: that is no failure.
    signal.signal(signal.SIGTERM, _leave)
    listening = up.listen(host, port)
    say(f"{what} at http://{host}:{port}.")
    gc.freeze()  # what is loaded by now stays; walking all of it again and again stalled a page in a hundred by 0.2 s
    gc.enable()
    gc.set_threshold(20_000, 20, 20)  # a page makes thousands of objects and leaves no cycles: looking for them took a twentieth
    config = uvicorn.Config(
        web,
        log_config=None,  # `logs.begin` has said how
        access_log=False,  # its lines show queries; ours do not
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,  # longer than proxies keep theirs: who closes first may meet a request on its way, and resets it
        server_header=False,
        forwarded_allow_ips=settings.proxies,
    )
    if processes == 1:
        uvicorn.Server(config).run(sockets=[listening])
    else:

        def work() -> None:
            try:
                uvicorn.Server(config).run(sockets=[listening])
            finally:
                _last_words()  # SIGTERM has had them at `_leave`; SIGINT comes by here

        forked.keep(processes, work)
