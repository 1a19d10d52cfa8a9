"""More than can be answered in time is refused at once, with a sentence and `Retry-After`, so that what is taken is answered."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sae_core.errors import HeadscopeError, Overloaded

ALWAYS = ("/healthz", "/readyz", "/metrics", "/static/")
"""What a monitor asks is answered also then."""
STREAMS = "/events"
"""Ends of addresses that stay open for as long as somebody watches, and cost next to nothing."""


class Overload:
    """At most `most` requests at a time, those that wait for a thread included."""

    def __init__(self, app: ASGIApp, most: int, refuse: Callable[[Request, HeadscopeError], Response]) -> None:
        self.app, self.most, self._refuse, self._now = app, most, refuse, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] != "http" or path.startswith(ALWAYS) or path.endswith(STREAMS):
            return await self.app(scope, receive, send)
        if self._now >= self.most:
            error = Overloaded("More is asked here at the moment than can be answered; try again in a few seconds.")
            return await self._refuse(Request(scope, receive), error)(scope, receive, send)
        self._now += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self._now -= 1
