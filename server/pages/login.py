"""`/login`, `/logout` and `/start`: how a browser comes in."""

from fastapi import APIRouter, Request, Response

from sae_core.errors import HeadscopeError, LoginNeeded, NotFound, TooOften
from server import access
from server.access import needs
from server.oidc import BACK, COOKIE, LASTS, Oidc
from server.pages.reply import reply
from server.pages.writing import Form, local, see

router = APIRouter()


@router.get("/start", include_in_schema=False)
@needs("nobody")
def start(request: Request, token: str = "") -> Response:
    """Remember the start token, and go on to an address without it: that one may be shown to others."""
    answer = see("/")
    access.let_in(request, answer, token)
    return answer


@router.get("/login", include_in_schema=False)
@needs("nobody")
def login_page(request: Request, back: str = "/") -> Response:
    """Where one says who one is."""
    _check_accounts(request)
    return _form(request, local(back), "")


@router.post("/login", include_in_schema=False)
@needs("nobody")
def log_in(request: Request, form: Form) -> Response:
    """Log in, and go back to where it was asked for."""
    _check_accounts(request)
    back, name = local(form.get("back", "/")), form.get("name", "")
    answer = see(back)
    try:
        access.log_in(request, answer, name, form.get("password", ""))
    except (LoginNeeded, TooOften) as error:
        return _form(request, back, str(error), error.status, name)
    return answer


@router.get("/login/oidc", include_in_schema=False)
@needs("nobody")
def leave_to_log_in(request: Request, back: str = "/") -> Response:
    """On to the login service."""
    access.limits(request).address.take(access.address(request), "trying")
    begun = _service(request).begin(local(back))
    answer = see(begun.address)
    access.set_cookie(request, answer, COOKIE, begun.cookie, LASTS)
    return answer


@router.get(BACK, include_in_schema=False)
@needs("nobody")
def come_back(request: Request) -> Response:
    """Back from there: log in as whoever it says."""
    try:
        back = access.log_in_elsewhere(request, _service(request), answer := see("/"))
    except HeadscopeError as error:
        answer = _form(request, "/", str(error), error.status)
    else:
        answer.headers["Location"] = back
    answer.delete_cookie(COOKIE)
    return answer


def _service(request: Request) -> Oidc:
    found: Oidc | None = request.app.state.oidc
    if found is None:
        raise NotFound("No login service is set up here (HEADSCOPE_OIDC_ISSUER).")
    return found


@router.post("/logout", include_in_schema=False)
@needs("nobody")
def log_out(request: Request) -> Response:
    """Forget this browser."""
    answer = see("/")
    access.log_out(request, answer)
    return answer


def _check_accounts(request: Request) -> None:
    if access.shown(request) is None:
        raise NotFound("There are no accounts here; HEADSCOPE_ACCOUNTS=true makes Headscope ask people to log in.")


def _form(request: Request, back: str, trouble: str, status: int = 200, name: str = "") -> Response:
    return reply(
        request, None, "login.html", status=status, back=back, trouble=trouble, name=name, elsewhere=request.app.state.oidc
    )
