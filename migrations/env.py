"""Alembic's entry: runs migrations on the URL that `server.db` gives, or on HEADSCOPE_* for the alembic command."""

from alembic import context

from server.db import make_engine
from server.settings import Settings
from server.tables import Base

url = context.config.attributes.get("url") or Settings().prepare().url
engine = make_engine(url)
with engine.connect() as connection:
    if connection.dialect.name == "sqlite":
        # SQLite changes most things of a table by making it anew; with foreign keys on, dropping the old one would delete
        # the rows that point at it. Said to the driver itself, since within a transaction it would do nothing.
        connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        # What is searched by words is a virtual table on SQLite, with tables of its own, which tables.py cannot describe.
        include_name=lambda name, kind, _parents: kind != "table" or not (name or "").startswith("context_text"),
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
engine.dispose()
