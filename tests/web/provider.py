"""A login service of the tests' own, listening on 127.0.0.1: OpenID Connect's code flow as specified, with PKCE. It lets
everybody in who is named by `who`, and lies on demand."""

import base64
import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import RedirectResponse
from joserfc import jwt
from joserfc.jwk import KeySet, OctKey, RSAKey

from server.pages.writing import Form
from tests.web.conftest import served

CLIENT, SECRET = "headscope", "between us"  # pragma: allowlist secret


@dataclass
class Provider:
    """What it knows and how it behaves."""

    who: dict[str, Any] = field(
        default_factory=lambda: {"sub": "42", "name": "Nina", "email": "nina@lab.example", "email_verified": True}
    )
    lies: dict[str, Any] = field(default_factory=dict)
    """Claims that it signs though they are not so."""
    thin: bool = False
    """Whether it tells name and e-mail only where it is asked for them."""
    refuses: bool = False
    forged: str = ""
    """`key`: signs with another key than it shows; `secret`: with what we share."""
    address: str = ""
    key: RSAKey = field(default_factory=lambda: RSAKey.generate_key(2048, {"kid": "one", "use": "sig"}))
    codes: dict[str, dict[str, str]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What it says of itself."""
        ways = {f"{name}_endpoint": f"{self.address}/{name}" for name in ("authorization", "token", "userinfo")}
        return {"issuer": self.address, "jwks_uri": f"{self.address}/keys", **ways}

    def authorize(self, asked: dict[str, str]) -> str:
        """Where the browser is sent back to."""
        assert asked["response_type"] == "code"
        assert asked["client_id"] == CLIENT
        assert asked["code_challenge_method"] == "S256"
        assert "openid" in asked["scope"].split()
        if self.refuses:
            return f"{asked['redirect_uri']}?{urlencode({'error': 'access_denied', 'state': asked['state']})}"
        code = secrets.token_urlsafe(16)
        self.codes[code] = asked
        return f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"

    def token(self, code: str, verifier: str, redirect_uri: str, authorization: str) -> dict[str, Any]:
        """What a code is exchanged for, once."""
        asked = self.codes.pop(code, None)
        expected = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET.replace(' ', '%20')}".encode()).decode()
        plain = "Basic " + base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if authorization not in (expected, plain):
            raise HTTPException(401, "invalid_client")
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        if asked is None or challenge != asked["code_challenge"] or redirect_uri != asked["redirect_uri"]:
            raise HTTPException(400, "invalid_grant")
        now = int(time.time())
        told = {"sub": self.who["sub"]} if self.thin else self.who
        claims = {"iss": self.address, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": asked["nonce"], **told, **self.lies}
        if self.forged == "secret":
            signed = jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET * 4))
        else:
            key = RSAKey.generate_key(2048, {"kid": "one"}) if self.forged == "key" else self.key
            signed = jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)
        return {"access_token": "for userinfo", "token_type": "Bearer", "expires_in": 300, "id_token": signed}


def _app(provider: Provider) -> FastAPI:
    app = FastAPI()
    app.get("/.well-known/openid-configuration")(provider.describe)
    app.get("/keys")(lambda: KeySet([provider.key]).as_dict(private=False))

    @app.get("/authorization")
    def authorization(
        response_type: str, client_id: str, redirect_uri: str, scope: str, state: str, nonce: str, code_challenge: str,
        code_challenge_method: str,
    ) -> RedirectResponse:  # fmt: skip
        return RedirectResponse(provider.authorize(dict(locals())), 302)

    @app.post("/token")
    def token(form: Form, authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        assert form["grant_type"] == "authorization_code"
        return provider.token(form["code"], form["code_verifier"], form["redirect_uri"], authorization)

    @app.get("/userinfo")
    def userinfo(authorization: Annotated[str, Header()] = "") -> dict[str, Any]:
        if authorization != "Bearer for userinfo":
            raise HTTPException(401)
        return provider.who

    return app


@contextmanager
def listening() -> Iterator[Provider]:
    """A provider, really listening."""
    provider = Provider()
    with served(_app(provider)) as address:
        provider.address = address
        yield provider
