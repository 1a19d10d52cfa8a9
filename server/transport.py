"""What stands between the app and the wire: HEAD for every GET, and compression by ISA-L."""

from contextlib import suppress
from typing import Any

from isal import isal_zlib
from starlette.datastructures import Headers
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware, GZipResponder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST = 1000
"""Bytes of an answer that is worth compressing."""
LEVEL = 3
"""ISA-L's highest: of a page a third of zlib's time for a twelfth more bytes."""
COMPRESSED_ALREADY = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "application/vnd.apache.parquet")


class Compressed(GZipMiddleware):
    """Starlette's middleware with another library's compressor; streams are compressed as they are sent."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, SMALLEST, exclude_content_types=COMPRESSED_ALREADY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "gzip" in Headers(scope=scope).get("accept-encoding", ""):
            await _Responder(self.app, SMALLEST, exclude_content_types=self.exclude_content_types)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class _Responder(GZipResponder):
    _packer: Any = None

    @property
    def compressor(self) -> Any:
        if self._packer is None:
            self._packer = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, 16 + isal_zlib.MAX_WBITS)
        return self._packer


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
