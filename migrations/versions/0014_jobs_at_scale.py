"""how urgent a job is, where and how long it may work, when it is tried again; heartbeats that are counted"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0011"
branch_labels = None
depends_on = None


def added() -> tuple[sa.Column[object], ...]:
    return (
        sa.Column("priority", sa.Integer(), server_default="5", nullable=False),
        sa.Column("only_on", sa.String(length=10), nullable=True),
        sa.Column("time_limit", sa.Double(), nullable=True),
        sa.Column("worked", sa.Double(), server_default="0", nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=True),
    )


def upgrade() -> None:
    for column in added():
        op.add_column("job", column)
    op.add_column("worker", sa.Column("beats", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("worker") as batch:
        batch.drop_column("beats")
    with op.batch_alter_table("job") as batch:
        for column in added():
            batch.drop_column(column.name)
