"""Login by another service (OpenID Connect), if asked to: authorization code with PKCE, state and nonce. No torch.

What must outlive the way there and back stands in a signed cookie of ten minutes, so web processes share nothing for it. Whoever
comes back is known by issuer and subject; the first time also by a verified e-mail address that is an account's name.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, LoginNeeded, UsageError
from server.passwords import same
from server.settings import Settings
from server.store import accounts

COOKIE = "headscope_oidc"
BACK = "/login/oidc/back"
LASTS = 600
"""Seconds for the way to the service and back."""
KEPT = 3600.0
"""Seconds for which what the service says of itself is believed."""
PATIENCE = 10.0
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures by a key that only the service has; a shared secret, or none, is no signature here."""


class ServiceAway(HeadscopeError):
    """The login service does not answer as it should."""

    status = 503


@dataclass(frozen=True)
class Begun:
    """A login that was begun: where to go, and what to remember meanwhile."""

    address: str
    cookie: str


class Oidc:
    """The service that the settings name."""

    def __init__(self, settings: Settings) -> None:
        try:
            from authlib.integrations.httpx_client import OAuth2Client
        except ImportError as error:
            raise UsageError(
                "HEADSCOPE_OIDC_ISSUER needs Authlib: pip install 'headscope[oidc]'.", field="oidc_issuer"
            ) from error
        assert settings.oidc_issuer is not None
        self._settings, self.issuer = settings, settings.oidc_issuer.rstrip("/")
        self._key = hashlib.sha256(b"headscope oidc " + settings.secret.encode()).digest()
        self._known: tuple[float, dict[str, Any], Any] | None = None
        self._client: Callable[[], Any] = lambda: OAuth2Client(
            settings.oidc_client_id, settings.oidc_secret, scope="openid profile email", timeout=PATIENCE,
            redirect_uri=settings.address + BACK, code_challenge_method="S256",
        )  # fmt: skip

    def begin(self, back: str) -> Begun:
        """A login that leads to our address `back` in the end."""
        kept = {"state": secrets.token_urlsafe(24), "nonce": secrets.token_urlsafe(24), "verifier": secrets.token_urlsafe(48)}
        described, _ = self._service()
        with self._client() as client:
            address, _ = client.create_authorization_url(
                described["authorization_endpoint"], kept["state"], kept["verifier"], nonce=kept["nonce"]
            )
        return Begun(address, self._signed({**kept, "back": back, "until": time.time() + LASTS}))

    def end(self, asked: Mapping[str, str], cookie: str) -> tuple[dict[str, Any], str]:
        """Who came back, as the service's claims say, and where they wanted to go. LoginNeeded where anything does not fit."""
        kept = self._opened(cookie)
        if not kept or not same(asked.get("state", ""), kept["state"]):
            raise LoginNeeded("That login was not begun in this browser, or too long ago; begin it again.")
        if "code" not in asked:
            said = asked.get("error", "")
            word = said if said.isascii() and said.replace("_", "").isalnum() and len(said) < 40 else "no reason given"
            raise LoginNeeded(f"The login service did not let you in ({word}).")
        described, _ = self._service()
        from authlib.common.errors import AuthlibBaseError

        try:
            with self._client() as client:
                token = client.fetch_token(described["token_endpoint"], code=asked["code"], code_verifier=kept["verifier"])
                claims = self._claims(token.get("id_token", ""), kept["nonce"])
                if "email" not in claims and "userinfo_endpoint" in described:
                    more = client.get(described["userinfo_endpoint"]).raise_for_status().json()
                    claims = {**more, **claims} if more.get("sub") == claims["sub"] else claims
        except AuthlibBaseError as error:
            raise LoginNeeded("The login service did not accept that login; begin it again.") from error
        except (httpx.HTTPError, ValueError) as error:
            raise ServiceAway(f"The login service at {self.issuer} does not answer as it should.") from error
        return claims, kept["back"]

    def account(self, session: Session, claims: Mapping[str, Any]) -> accounts.AccountRecord:
        """The account of whoever came back, made where new people are let in; LoginNeeded without one."""
        subject = f"{self.issuer} {claims['sub']}"
        if len(subject) > 300:
            raise LoginNeeded("The login service's name for you is too long.")
        role = self._role(claims)
        found = accounts.of_subject(session, subject)
        if found is None and claims.get("email_verified") is True and (mail := str(claims.get("email", ""))):
            found = accounts.link(session, mail, subject)
        if found is None:
            if role is None:
                raise LoginNeeded(
                    "There is no account for you here; ask an admin to make one that has your e-mail address as its name."
                )
            return accounts.add_elsewhere(session, _name(claims), role, subject)
        if found.disabled_at is not None:
            raise LoginNeeded("That account is kept out.")
        if self._settings.oidc_role_claim and role != found.role:  # who has lost their role there has lost it here
            if role is None:
                raise LoginNeeded("The login service gives you no role here; ask whoever looks after it.")
            with suppress(UsageError):  # the last admin stays one
                accounts.set_role(session, found.name, role)
        return found

    def _role(self, claims: Mapping[str, Any]) -> str | None:
        """The role that the claim gives, the strongest of many; without a claim, that of somebody new."""
        named = self._settings.oidc_role_claim
        told = claims.get(named, ()) if named else ()
        values = {told} if isinstance(told, str) else set(map(str, told)) if isinstance(told, list | tuple) else set()
        given = [role for role in accounts.GIVEN if role in values]
        fallback = None if self._settings.oidc_new == "none" else self._settings.oidc_new
        return given[-1] if given else fallback

    def _claims(self, token: str, nonce: str) -> dict[str, Any]:
        """What the service signed of who it is; LoginNeeded unless it is for us, for this login, and of now."""
        from joserfc import errors, jwt

        rules = jwt.JWTClaimsRegistry(
            leeway=60,
            iss={"essential": True, "value": self._service()[0]["issuer"]},
            aud={"essential": True, "value": self._settings.oidc_client_id},
            nonce={"essential": True, "value": nonce},
            exp={"essential": True}, iat={"essential": True}, sub={"essential": True},
        )  # fmt: skip
        for anew in (False, True):  # the service may have changed its keys
            try:
                claims = jwt.decode(token, self._service(anew=anew)[1], algorithms=ALGORITHMS).claims
                rules.validate(claims)
            except errors.JoseError as error:
                if anew or isinstance(error, errors.ClaimError):
                    raise LoginNeeded("What the login service said of you could not be believed; begin again.") from error
            else:
                several = isinstance(claims["aud"], list) and len(claims["aud"]) > 1
                if (several or "azp" in claims) and claims.get("azp") != self._settings.oidc_client_id:
                    raise LoginNeeded("What the login service said of you is meant for another program.")
                return dict(claims)
        raise AssertionError

    def _service(self, *, anew: bool = False) -> tuple[dict[str, Any], Any]:
        """What the service says of itself, and its keys."""
        from joserfc.jwk import KeySet

        if anew or self._known is None or time.monotonic() - self._known[0] > KEPT:
            try:
                with httpx.Client(timeout=PATIENCE, follow_redirects=False) as client:
                    described = client.get(f"{self.issuer}/.well-known/openid-configuration").raise_for_status().json()
                    if described["issuer"].rstrip("/") != self.issuer:
                        raise ServiceAway(
                            f"The login service at {self.issuer} says to be another one; set HEADSCOPE_OIDC_ISSUER right."
                        )
                    keys = KeySet.import_key_set(client.get(described["jwks_uri"]).raise_for_status().json())
            except (httpx.HTTPError, ValueError, KeyError, AttributeError) as error:
                raise ServiceAway(f"The login service at {self.issuer} does not answer as it should.") from error
            self._known = time.monotonic(), described, keys
        return self._known[1], self._known[2]

    def _signed(self, kept: Mapping[str, Any]) -> str:
        body = base64.urlsafe_b64encode(json.dumps(kept).encode()).decode()
        return f"{body}.{hmac.new(self._key, body.encode(), 'sha256').hexdigest()}"

    def _opened(self, cookie: str) -> dict[str, Any] | None:
        body, _, signature = cookie.rpartition(".")
        if not same(signature, hmac.new(self._key, body.encode(), "sha256").hexdigest()):
            return None
        kept: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body))
        return kept if kept["until"] > time.time() else None


def _name(claims: Mapping[str, Any]) -> str:
    """What somebody new is called."""
    said = (claims.get(name) for name in ("name", "preferred_username", "email"))
    return next((" ".join(str(one).split())[:50] for one in said if one and str(one).strip()), "somebody")
