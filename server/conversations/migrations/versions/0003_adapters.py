"""The adapters that administrators have added and removed."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("directory", sa.Text()),
        sa.Column("revision", sa.String(128)),
        sa.Column("changed_at", sa.Double(), nullable=False),
    )
