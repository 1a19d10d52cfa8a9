"""many SAEs in one harvest; what a feature's families, logits, positions and partners are; heads; studies"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
EMPTY = {"families": "[]", "logits": "{}", "positions": "[]", "coactive": "{}", "sample": "{}"}  # of harvests made before


def upgrade() -> None:
    op.create_table(
        "head_summary",
        sa.Column("harvest_id", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("n_led", sa.Integer(), nullable=False),
        sa.Column("n_led_norm", sa.Integer(), nullable=False),
        sa.Column("families", JSON, nullable=False),
        sa.Column("diversity", sa.Double(), nullable=True),
        sa.Column("polysemantic", sa.Double(), nullable=True),
        sa.Column("detail", JSON, nullable=False),
        sa.ForeignKeyConstraint(
            ["harvest_id"], ["harvest.id"], name=op.f("fk_head_summary_harvest_id_harvest"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("harvest_id", "head", name=op.f("pk_head_summary")),
    )
    op.create_table(
        "study",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=30), nullable=False),
        sa.Column("title", sa.String(length=300), nullable=False),
        sa.Column("model_id", sa.Integer(), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=True),
        sa.Column("feature", sa.Integer(), nullable=True),
        sa.Column("config", JSON, nullable=False),
        sa.Column("result", JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["model_id"], ["model.id"], name=op.f("fk_study_model_id_model")),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_study_sae_id_sae")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_study")),
        sa.UniqueConstraint("job_id", name=op.f("uq_study_job_id")),
    )
    with op.batch_alter_table("study") as batch:
        batch.create_index(op.f("ix_study_sae_id_feature"), ["sae_id", "feature"], unique=False)
    with op.batch_alter_table("feature") as batch:
        batch.add_column(sa.Column("family_score", sa.Double(), nullable=True))
    with op.batch_alter_table("feature_detail") as batch:
        batch.add_column(sa.Column("verdict", sa.Text(), nullable=True))
        for name, empty in EMPTY.items():
            batch.add_column(sa.Column(name, JSON, nullable=False, server_default=sa.text(f"'{empty}'")))
    # SQLite makes the table anew for this; env.py has foreign keys off meanwhile, or its rows' rows would be deleted with it.
    with op.batch_alter_table("harvest") as batch:
        batch.drop_constraint(op.f("uq_harvest_job_id"), type_="unique")
        batch.create_unique_constraint(op.f("uq_harvest_job_id_sae_id"), ["job_id", "sae_id"])


def downgrade() -> None:
    with op.batch_alter_table("harvest") as batch:
        batch.drop_constraint(op.f("uq_harvest_job_id_sae_id"), type_="unique")
        batch.create_unique_constraint(op.f("uq_harvest_job_id"), ["job_id"])
    with op.batch_alter_table("feature_detail") as batch:
        for name in (*EMPTY, "verdict"):
            batch.drop_column(name)
    with op.batch_alter_table("feature") as batch:
        batch.drop_column("family_score")
    with op.batch_alter_table("study") as batch:
        batch.drop_index(op.f("ix_study_sae_id_feature"))
    op.drop_table("study")
    op.drop_table("head_summary")
