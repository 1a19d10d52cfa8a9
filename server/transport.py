"""What stands between the app and the wire: HEAD for every GET, and answers compressed as their readers need them."""

from contextlib import suppress
from functools import partial

from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGES_LEVEL, SCRIPTS_LEVEL = 5, 1
"""Of gzip. 5 is within a hundredth of the smallest page, at three fifths of its time. A script waits for each answer and asks for
many: 1 takes a quarter of the time of 5, for a sixth more bytes."""
SMALLEST = 1000
"""Bytes below which nothing is compressed."""
COMPRESSED_ALREADY = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/vnd.apache.parquet")


class Compressed:
    """Compresses answers for those who take gzip, streams too; answers to scripts quickly, pages well."""

    def __init__(self, app: ASGIApp) -> None:
        zipped = partial(GZipMiddleware, app, SMALLEST, exclude_content_types=COMPRESSED_ALREADY)
        self._pages, self._scripts = zipped(compresslevel=PAGES_LEVEL), zipped(compresslevel=SCRIPTS_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_scripts = scope["type"] == "http" and scope["path"].startswith("/api/")
        await (self._scripts if of_scripts else self._pages)(scope, receive, send)


class _Told(BaseException):
    """The headers are sent, and nobody waits for the rest. No `except Exception` takes it for a fault."""


class Heads:
    """Answers HEAD as GET, without the body: the framework knows HEAD only of routes that name it. Of what a GET would stream no
    more is made than its first part."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def sent(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _Told

        with suppress(_Told):
            await self.app({**scope, "method": "GET"}, receive, sent)
