"""tokens that features fire on, promote and suppress; texts to search; on SQLite a head's rows lie together"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None

HEAD_INDEXES = ("norm_share", "dfa_share")
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
    dialect = op.get_bind().dialect.name
    for statement in TEXTS[dialect]:
        op.execute(statement)
    if dialect == "sqlite":
        _rebuild_heads(with_rowid=False)


def downgrade() -> None:
    op.drop_table("feature_token")
    op.drop_table("token")
    op.drop_table("context_text")
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_heads(with_rowid=True)


def _rebuild_heads(*, with_rowid: bool) -> None:
    # Alembic's batch mode knows nothing of rowids, so the table is made anew by hand.
    for name in HEAD_INDEXES:
        op.drop_index(op.f(f"ix_feature_head_harvest_id_head_{name}_idx"), "feature_head")
    op.rename_table("feature_head", "former_feature_head")
    op.create_table(
        "feature_head",
        sa.Column("harvest_id", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("norm_share", sa.Double(), nullable=False),
        sa.Column("dfa", sa.Double(), nullable=True),
        sa.Column("dfa_share", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["harvest_id"], ["harvest.id"], name=op.f("fk_feature_head_harvest_id_harvest"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("harvest_id", "head", "idx", name=op.f("pk_feature_head")),
        sqlite_with_rowid=with_rowid,
    )
    columns = "harvest_id, head, idx, norm_share, dfa, dfa_share"
    order = "harvest_id, idx, head" if with_rowid else "harvest_id, head, idx"
    op.execute(f"insert into feature_head ({columns}) select {columns} from former_feature_head order by {order}")
    op.drop_table("former_feature_head")
    for name in HEAD_INDEXES:
        op.create_index(op.f(f"ix_feature_head_harvest_id_head_{name}_idx"), "feature_head", ["harvest_id", "head", name, "idx"])
