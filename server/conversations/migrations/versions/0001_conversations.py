"""Conversations, their turns and items, and idempotency keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
RUNNING = sa.text("status = 'in_progress'")
ALONE = sa.text("conversation_number IS NULL")


def upgrade() -> None:
    _conversations()
    _turns()
    _items()
    _idempotency_keys()


def _conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("active_at", sa.Double(), nullable=False),
        sa.Column("ttl", sa.Double()),
        sa.Column("expires_at", sa.Double()),
    )
    op.create_index("conversations_by_owner", "conversations", ["owner", "id"], unique=True)
    op.create_index("conversations_by_activity", "conversations", ["active_at"])
    op.create_index("conversations_by_expiry", "conversations", ["expires_at"])


def _turns() -> None:
    op.create_table(
        "turns",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("response_id", sa.String(64)),
        sa.Column("conversation_number", NUMBER, sa.ForeignKey("conversations.number", ondelete="CASCADE")),
        sa.Column("previous_number", NUMBER, sa.ForeignKey("turns.number", ondelete="SET NULL")),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("language", sa.String(16)),
        sa.Column("checkpoint", sa.Text()),
        sa.Column("input_tokens", sa.Integer()),
        sa.Column("output_tokens", sa.Integer()),
        sa.Column("cached_tokens", sa.Integer()),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("lease_until", sa.Double()),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.CheckConstraint("status IN ('in_progress', 'complete', 'incomplete', 'failed')", name="turns_status"),
    )
    op.create_index("turns_by_owner", "turns", ["owner", "response_id"], unique=True)
    op.create_index("turns_by_conversation", "turns", ["conversation_number", "number"])
    op.create_index("turns_by_previous", "turns", ["previous_number"])
    op.create_index(
        "turns_one_running",
        "turns",
        ["conversation_number"],
        unique=True,
        sqlite_where=RUNNING,
        postgresql_where=RUNNING,
    )
    op.create_index("turns_by_lease", "turns", ["lease_until"], sqlite_where=RUNNING, postgresql_where=RUNNING)
    op.create_index("turns_alone", "turns", ["created_at"], sqlite_where=ALONE, postgresql_where=ALONE)


def _items() -> None:
    op.create_table(
        "items",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("turn_number", NUMBER, sa.ForeignKey("turns.number", ondelete="CASCADE"), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("speaker", sa.String(8), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("is_reply", sa.Boolean(), nullable=False),
        sa.CheckConstraint("speaker IN ('system', 'human', 'gpt')", name="items_speaker"),
    )
    op.create_index("items_by_turn", "items", ["turn_number", "id"], unique=True)


def _idempotency_keys() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.Text(), primary_key=True),
        sa.Column("key_digest", sa.String(64), primary_key=True),
        sa.Column("body_digest", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("conversation_number", NUMBER, sa.ForeignKey("conversations.number", ondelete="CASCADE")),
        sa.Column("turn_number", NUMBER, sa.ForeignKey("turns.number", ondelete="CASCADE")),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])
    op.create_index("idempotency_keys_by_conversation", "idempotency_keys", ["conversation_number"])
    op.create_index("idempotency_keys_by_turn", "idempotency_keys", ["turn_number"])
