"""accounts, logins, API keys, an audit log; whose an SAE, a list or a job is, and who sees it"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0008"
down_revision = "0006"
branch_labels = None
depends_on = None

OWNED = ("sae", "job", "feature_list")
Json = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("folded", sa.String(length=120), nullable=False),
        sa.Column("role", sa.String(length=10), nullable=False),
        sa.Column("password", sa.Text(), nullable=True),
        sa.Column("subject", sa.String(length=300), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_account")),
        sa.UniqueConstraint("folded", name=op.f("uq_account_folded")),
        sa.UniqueConstraint("name", name=op.f("uq_account_name")),
        sa.UniqueConstraint("subject", name=op.f("uq_account_subject")),
    )
    op.create_table(
        "login",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("address", sa.String(length=60), nullable=False),
        sa.Column("browser", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_login_account_id_account"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_login")),
        sa.UniqueConstraint("digest", name=op.f("uq_login_digest")),
    )
    op.create_index(op.f("ix_login_account_id"), "login", ["account_id"])
    op.create_table(
        "api_key",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=60), nullable=False),
        sa.Column("scope", sa.String(length=10), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("hint", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_api_key_account_id_account"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_key_digest")),
    )
    op.create_index(op.f("ix_api_key_account_id"), "api_key", ["account_id"])
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=True),
        sa.Column("who", sa.String(length=60), nullable=False),
        sa.Column("way", sa.String(length=60), nullable=False),
        sa.Column("address", sa.String(length=60), nullable=False),
        sa.Column("action", sa.String(length=200), nullable=False),
        sa.Column("target", sa.String(length=300), nullable=False),
        sa.Column("detail", Json, nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_audit_account_id_account"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"])
    op.create_table(
        "job_sae",
        sa.Column("job_id", sa.String(length=100), nullable=False),
        sa.Column("sae_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_sae_job_id_job"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["sae_id"], ["sae.id"], name=op.f("fk_job_sae_sae_id_sae"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "sae_id", name=op.f("pk_job_sae")),
    )
    op.create_index(op.f("ix_job_sae_sae_id"), "job_sae", ["sae_id"])
    for table in OWNED:
        with op.batch_alter_table(table) as batch:
            batch.add_column(sa.Column("owner_id", sa.Integer(), nullable=True))
            batch.add_column(sa.Column("visibility", sa.String(length=10), server_default="shared", nullable=False))
            batch.create_foreign_key(
                batch.f(f"fk_{table}_owner_id_account"), "account", ["owner_id"], ["id"], ondelete="SET NULL"
            )
    _note_what_jobs_read()


def _note_what_jobs_read() -> None:
    """Which SAEs the jobs so far read, by the names in their configs."""
    bind = op.get_bind()
    former, present = (
        bind.execute(sa.text("select name, sae_id from former_name")),
        bind.execute(sa.text("select name, id from sae")),
    )
    ids = {row[0]: row[1] for row in (*former, *present)}
    jobs = sa.table("job", sa.column("id", sa.String), sa.column("config", Json))
    found = set()
    for job, config in bind.execute(sa.select(jobs.c.id, jobs.c.config)):
        against = config.get("against") or ()
        named = (*(config.get("saes") or ()), config.get("sae"), *((against,) if isinstance(against, str) else against))
        found |= {(job, ids[name]) for name in named if name in ids}
    if found:
        links = sa.table("job_sae", sa.column("job_id", sa.String), sa.column("sae_id", sa.Integer))
        bind.execute(sa.insert(links), [{"job_id": job, "sae_id": sae} for job, sae in sorted(found)])


def downgrade() -> None:
    for table in OWNED:
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(batch.f(f"fk_{table}_owner_id_account"), type_="foreignkey")
            batch.drop_column("owner_id")
            batch.drop_column("visibility")
    for table in ("job_sae", "audit", "api_key", "login", "account"):
        op.drop_table(table)
