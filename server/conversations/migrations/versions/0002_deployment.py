"""The checkpoint that replicas serve, the replicas, and the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "deployment",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("desired", sa.Text()),
        sa.Column("previous", sa.Text()),
        sa.Column("candidate", sa.Text()),
        sa.Column("share", sa.Double()),
        sa.Column("revision", NUMBER, nullable=False),
        sa.Column("changed_at", sa.Double()),
        sa.Column("busy_who", sa.Text()),
        sa.Column("busy_what", sa.Text()),
        sa.Column("busy_token", sa.String(64)),
        sa.Column("busy_until", sa.Double()),
        sa.CheckConstraint("number = 1", name="deployment_is_one_row"),
    )
    op.execute("INSERT INTO deployment (number, revision) VALUES (1, 0)")
    op.create_table(
        "replicas",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("checkpoint", sa.Text(), nullable=False),
        sa.Column("canary", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("failed_revision", NUMBER),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("heartbeat_at", sa.Double(), nullable=False),
        sa.Column("turn_until", sa.Double()),
    )
    op.create_table(
        "audit",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("what", sa.String(16), nullable=False),
        sa.Column("checkpoint", sa.Text()),
        sa.Column("replica", sa.String(128), nullable=False),
        sa.Column("begun_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("result", sa.String(16)),
        sa.Column("message", sa.Text()),
    )
    op.create_index("audit_by_time", "audit", ["begun_at"])
