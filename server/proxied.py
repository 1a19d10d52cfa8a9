"""Addresses behind a reverse proxy. Inside, every address begins at `/`; here, at the edge, the public address's path is put on.

So no template, no link and no redirect knows of a prefix, and none can forget it: what comes in loses it, if the proxy has not
taken it off already, and what goes out gets it, in HTML by `prefixed` and in headers by `Proxied`.
"""

from contextvars import ContextVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.settings import Settings

ATTRIBUTES = (
    *("href", "src", "action", "formaction"),
    *("hx-get", "hx-post", "hx-put", "hx-patch", "hx-delete", "hx-push-url", "hx-replace-url", "hx-sse:connect"),
)
"""Of HTML, those that hold an address. A text cannot look like one: its quotation marks are escaped."""
HEADERS = ("Location", "Content-Location", "HX-Redirect", "HX-Location", "HX-Push-Url", "HX-Replace-Url")

_prefix: ContextVar[str] = ContextVar("prefix", default="")


def prefixed(html: str) -> str:
    """`html` with the public address's path before every address of ours."""
    prefix = _prefix.get()
    if prefix:
        for name in ATTRIBUTES:
            html = html.replace(f' {name}="/', f' {name}="{prefix}/')
    return html


class Proxied:
    """Takes the prefix off what comes in, and puts it on where a response leads to."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.prefix = app, settings.prefix
        self.public = urlsplit(settings.public_url or "").netloc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        _prefix.set(self.prefix)  # and left so: the page of a fault of ours is made outside of this
        if not self.public:
            return await self.app(scope, receive, send)
        host = Headers(scope=scope).get("host", "")

        async def send_prefixed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in HEADERS:
                    if name in headers:
                        headers[name] = self._outside(headers[name], host)
            await send(message)

        return await self.app(self._inside(scope), receive, send_prefixed)

    def _inside(self, scope: Scope) -> Scope:
        path: str = scope["path"]
        if not self.prefix or not (path == self.prefix or path.startswith(f"{self.prefix}/")):
            return scope
        raw: bytes = scope.get("raw_path") or b""
        return {**scope, "path": path[len(self.prefix) :] or "/", "raw_path": raw.removeprefix(self.prefix.encode()) or b"/"}

    def _outside(self, address: str, host: str) -> str:
        parts = urlsplit(address)
        if parts.netloc not in ("", host, self.public) or not (parts.path.startswith("/") or parts.netloc):
            return address  # of another site, or from where one is
        return self.prefix + parts._replace(scheme="", netloc="").geturl()
