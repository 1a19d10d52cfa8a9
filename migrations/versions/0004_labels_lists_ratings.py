"""labels, notes, stars, lists and ratings of features; names, descriptions and an archive of SAEs and harvests"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "feature_list",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=120), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_by", sa.String(length=60), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feature_list")),
    )
    op.create_table(
        "former_name",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_former_name_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_former_name")),
    )
    with op.batch_alter_table("former_name") as batch:
        batch.create_index(batch.f("ix_former_name_sae_id"), ["sae_id"], unique=False)

    op.create_table(
        "label",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("text", sa.String(length=200), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("method", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_by", sa.String(length=60), nullable=True),
        sa.Column("follows_id", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(["follows_id"], ["label.id"], name=op.f("fk_label_follows_id_label")),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_label_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_label")),
    )
    with op.batch_alter_table("label") as batch:
        batch.create_index(batch.f("ix_label_follows_id"), ["follows_id"], unique=False)
        batch.create_index(batch.f("ix_label_sae_id_idx"), ["sae_id", "idx"], unique=False)

    op.create_table(
        "list_entry",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("list_id", sa.Integer(), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("removed_by", sa.String(length=60), nullable=True),
        sa.ForeignKeyConstraint(
            ["list_id"], ["feature_list.id"], name=op.f("fk_list_entry_list_id_feature_list"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_list_entry_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_list_entry")),
        sa.UniqueConstraint("list_id", "sae_id", "idx", name=op.f("uq_list_entry_list_id_sae_id_idx")),
    )
    with op.batch_alter_table("list_entry") as batch:
        batch.create_index(batch.f("ix_list_entry_sae_id_idx"), ["sae_id", "idx"], unique=False)

    op.create_table(
        "note",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_by", sa.String(length=60), nullable=True),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_note_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_note")),
    )
    with op.batch_alter_table("note") as batch:
        batch.create_index(batch.f("ix_note_sae_id_idx"), ["sae_id", "idx"], unique=False)

    op.create_table(
        "review",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("harvest_id", sa.Integer(), nullable=False),
        sa.Column("n_live", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_review_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_review")),
    )
    with op.batch_alter_table("review") as batch:
        batch.create_index(batch.f("ix_review_sae_id"), ["sae_id"], unique=False)

    op.create_table(
        "star",
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_star_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("sae_id", "idx", "author", name=op.f("pk_star")),
    )
    with op.batch_alter_table("star") as batch:
        batch.create_index(batch.f("ix_star_author"), ["author"], unique=False)

    op.create_table(
        "rating",
        sa.Column("review_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.Column("author", sa.String(length=60), nullable=False),
        sa.Column("answer", sa.String(length=10), nullable=False),
        sa.Column("label", sa.String(length=200), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["review_id"], ["review.id"], name=op.f("fk_rating_review_id_review"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("review_id", "idx", "author", name=op.f("pk_rating")),
    )
    op.create_table(
        "review_feature",
        sa.Column("review_id", sa.Integer(), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["review_id"], ["review.id"], name=op.f("fk_review_feature_review_id_review"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("review_id", "idx", name=op.f("pk_review_feature")),
    )
    with op.batch_alter_table("harvest") as batch:
        batch.add_column(sa.Column("name", sa.String(length=200), nullable=True))
        batch.add_column(sa.Column("description", sa.Text(), nullable=True))
        batch.add_column(sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True))

    with op.batch_alter_table("sae") as batch:
        batch.add_column(sa.Column("description", sa.Text(), nullable=True))
        batch.add_column(sa.Column("archived_at", sa.DateTime(timezone=True), nullable=True))
        batch.add_column(sa.Column("revision", sa.Integer(), nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    for table in ("review_feature", "rating", "star", "review", "note", "list_entry", "label", "former_name", "feature_list"):
        op.drop_table(table)
    with op.batch_alter_table("sae") as batch:
        for name in ("description", "archived_at", "revision"):
            batch.drop_column(name)
    with op.batch_alter_table("harvest") as batch:
        for name in ("name", "description", "archived_at"):
            batch.drop_column(name)
