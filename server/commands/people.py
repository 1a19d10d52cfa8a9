"""Commands for accounts, keys and the record of what was changed."""

from pathlib import Path
from typing import Annotated

import typer

from sae_core.errors import UsageError
from server.commands.arguments import Data
from server.commands.opened import opened, settings_with
from server.commands.printing import say, table
from server.passwords import hashed
from server.store import accounts

app = typer.Typer()
user_app = typer.Typer(help="People who may log in.", no_args_is_help=True)
key_app = typer.Typer(help="Keys for scripts.", no_args_is_help=True)

AccountName = Annotated[str, typer.Argument(help="Name of the account.")]
GivenRole = Annotated[str, typer.Argument(help="reader, editor or admin.")]
RoleName = Annotated[str, typer.Option("--role", help="reader, editor or admin.")]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", help="File with the password.", show_default="asked for on the terminal")
]


def _password(path: Path | None) -> str:
    if path is None:
        return hashed(str(typer.prompt("Password", hide_input=True, confirmation_prompt=True)))
    try:
        return hashed(path.read_text().strip())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).", field="password-file") from error


@user_app.command("add", epilog="Example: [bold]headscope user add Maren --role editor --password-file maren.txt[/bold]")
def user_add(name: AccountName, role: RoleName = "reader", password_file: PasswordFile = None, data: Data = None) -> None:
    """Make an account."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        made = accounts.add(session, name, role, _password(password_file))
    say(f"{made.name} may log in, as {made.role}.")


@user_app.command("list")
def user_list(data: Data = None) -> None:
    """List the accounts."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        rows = [(one.name, one.role, "kept out" if one.disabled_at else "") for one in accounts.people(session)]
    table(("name", "role", ""), rows, "There are no accounts yet.")


@user_app.command("role", epilog="Example: [bold]headscope user role Maren admin[/bold]")
def user_role(name: AccountName, role: GivenRole, data: Data = None) -> None:
    """Let somebody do more, or less."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        accounts.set_role(session, name, role)
    say(f"{name} is {role} now.")


@user_app.command("password")
def user_password(name: AccountName, password_file: PasswordFile = None, data: Data = None) -> None:
    """Give an account another password: all its browsers have to log in again."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        accounts.set_password(session, name, _password(password_file))
    say(f"{name} has a new password.")


@user_app.command("remove")
def user_remove(name: AccountName, data: Data = None) -> None:
    """Take an account away with its browsers and keys; what it wrote stays under its name."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        accounts.remove(session, name)
    say(f"{name} has no account any more.")


@key_app.command("add", epilog="Example: [bold]headscope key add Maren notebook --scope read --days 90[/bold]")
def key_add(
    name: AccountName,
    key_name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[str, typer.Option("--scope", help="read, write or admin; never more than the account's role.")] = "read",
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Days until it runs out.")] = 90,
    data: Data = None,
) -> None:
    """Make a key for scripts. It is shown now and never again."""
    from server.access import new_key

    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        key, _made = new_key(session, accounts.account_id(session, name), key_name, scope, str(days))
    say(key)


@key_app.command("list")
def key_list(data: Data = None) -> None:
    """List everybody's keys."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        kept = accounts.keys(session)
    until = ["revoked" if one.revoked_at else f"{one.expires_at:%Y-%m-%d}" if one.expires_at else "for good" for one in kept]
    rows = [(str(one.id), one.account, one.name, one.hint, one.scope, ends) for one, ends in zip(kept, until, strict=True)]
    table(("id", "account", "name", "begins with", "may", "until"), rows, "There are no keys yet.")


@key_app.command("revoke")
def key_revoke(key: Annotated[int, typer.Argument(help="Id of the key, as `key list` shows it.")], data: Data = None) -> None:
    """Shut a key out."""
    with opened(settings_with(data=data)) as (_, db), db.write() as session:
        accounts.revoke_key(session, key)
    say(f"Key {key} is revoked.")


@app.command("audit", epilog="Example: [bold]headscope audit --who Maren[/bold]")
def audit(
    who: Annotated[str, typer.Option("--who", help="Only this person's changes.", show_default="everybody's")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, newest first.")] = 100,
    data: Data = None,
) -> None:
    """Show what was changed, by whom and from where."""
    with opened(settings_with(data=data)) as (_, db), db.read() as session:
        page = accounts.audit_page(session, who=who, limit=limit)
    rows = [(f"{one.at:%Y-%m-%d %H:%M}", one.who, one.way, one.address, one.action, one.target) for one in page.changes]
    table(("when", "who", "how", "from", "what", "of what"), rows, "Nothing was changed yet.")
