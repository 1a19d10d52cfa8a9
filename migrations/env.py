"""Alembic's entry: runs migrations on the URL that `server.db` gives, or on HEADSCOPE_* for the alembic command."""

from alembic import context

from server.db import make_engine
from server.settings import Settings
from server.tables import Base

url = context.config.attributes.get("url") or Settings().prepare().url
with make_engine(url).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
