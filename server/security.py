"""Keeps strangers' pages out: response headers, and refusal of what another site's page sends."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_core.errors import HeadscopeError

RULES = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "font-src 'self'",
    "connect-src 'self'",
    "form-action 'self'",
    "base-uri 'none'",
    "frame-ancestors 'none'",
)
CSP = "; ".join(RULES)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
EMBED_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; font-src 'self'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
"""Of a card that other sites may frame, local slides too, so it names no ancestors: it has no script, no form and no cookie
to abuse. Its style sheet may be read by a frame of any origin as well."""


class CrossOrigin(HeadscopeError):
    """Another site's page sent this, so nothing was done."""

    status = 403


class SecurityHeaders:
    """Puts `HEADERS` on every response, whatever made it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


async def refuse_cross_origin(request: Request) -> None:
    """Raise CrossOrigin for a request that changes something and was made by another site's page.

    As Go's `CrossOriginProtection`: `Sec-Fetch-Site` decides where a browser sends it (only to secure origins), else
    `Origin` must be this host. Programs send neither, and carry no user's cookies.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    headers: Headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    # A proxy may give us a host of its own, so what people typed counts as well.
    ours = (headers.get("host"), urlsplit(request.app.state.settings.address).netloc)
    same = site in ("same-origin", "none") if site else not origin or urlsplit(origin).netloc in ours
    if not same:
        raise CrossOrigin("This was sent by a page of another site, so nothing was done; use the form on Headscope's own page.")
