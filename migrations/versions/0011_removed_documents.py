"""documents that rows of a corpus are cut without"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "removed_document",
        sa.Column("corpus_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["corpus_id"], ["corpus.id"], name=op.f("fk_removed_document_corpus_id_corpus"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("corpus_id", "digest", name=op.f("pk_removed_document")),
    )


def downgrade() -> None:
    op.drop_table("removed_document")
