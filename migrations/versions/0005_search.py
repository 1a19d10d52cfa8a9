"""tokens that features fire on, promote and suppress; texts to search"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TEXTS = {
    "sqlite": (
        "create virtual table context_text using fts5(words, tokenize = \"unicode61 remove_diacritics 0 categories 'L* M* N* Co'\")",
    ),
    "postgresql": (
        "create table context_text (context_id bigint primary key, words tsvector not null)",
        "create index ix_context_text_words on context_text using gin (words)",
    ),
}


def upgrade() -> None:
    op.create_table(
        "token",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("word", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token")),
        sa.UniqueConstraint("text", name=op.f("uq_token_text")),
    )
    op.create_index(op.f("ix_token_word"), "token", ["word"])
    op.create_table(
        "feature_token",
        sa.Column("harvest_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["harvest_id"], ["harvest.id"], name=op.f("fk_feature_token_harvest_id_harvest"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["token_id"], ["token.id"], name=op.f("fk_feature_token_token_id_token")),
        sa.PrimaryKeyConstraint("harvest_id", "kind", "token_id", "weight", "idx", name=op.f("pk_feature_token")),
        sqlite_with_rowid=False,
    )
    for statement in TEXTS[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    op.drop_table("feature_token")
    op.drop_table("token")
    op.drop_table("context_text")
