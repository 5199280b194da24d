"""Which checkpoint the replicas of one database serve, who they are, who changed what, and which adapters
are applied beside it. Migrations 0002 and 0003 made these.

Times are seconds since the Unix epoch, by the database's clock.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Double, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from server.conversations.tables import NUMBER, Base


class DeploymentRow(Base):
    """The one row that says what is wanted. `revision` grows with every change of it.

    `desired` is null until something was activated: replicas serve what they were started with. A canary has a
    `candidate` and its `share` of conversations. Whoever changes the row holds it until `busy_until`.
    """

    __tablename__ = "deployment"
    __table_args__ = (CheckConstraint("number = 1", name="deployment_is_one_row"),)

    number: Mapped[int] = mapped_column(NUMBER, primary_key=True)
    desired: Mapped[str | None] = mapped_column(Text)
    previous: Mapped[str | None] = mapped_column(Text)
    candidate: Mapped[str | None] = mapped_column(Text)
    share: Mapped[float | None] = mapped_column(Double)
    revision: Mapped[int] = mapped_column(NUMBER)
    changed_at: Mapped[float | None] = mapped_column(Double)
    busy_who: Mapped[str | None] = mapped_column(Text)
    busy_what: Mapped[str | None] = mapped_column(Text)
    busy_token: Mapped[str | None] = mapped_column(String(64))
    busy_until: Mapped[float | None] = mapped_column(Double)


class ReplicaRow(Base):
    """A running process. `failed_revision` is the newest that it could not follow, `message` says why.

    It changes its checkpoint only while `turn_until` is ahead, which so many replicas at once may have.
    """

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    checkpoint: Mapped[str] = mapped_column(Text)
    canary: Mapped[bool]
    state: Mapped[str] = mapped_column(String(16))
    failed_revision: Mapped[int | None] = mapped_column(NUMBER)
    message: Mapped[str] = mapped_column(Text)
    heartbeat_at: Mapped[float] = mapped_column(Double)
    turn_until: Mapped[float | None] = mapped_column(Double)


class AuditRow(Base):
    """An action of an administrator: begun when it has no `ended_at`, and for good when its replica was killed."""

    __tablename__ = "audit"
    __table_args__ = (Index("audit_by_time", "begun_at"),)

    number: Mapped[int] = mapped_column(NUMBER, primary_key=True)
    who: Mapped[str] = mapped_column(Text)
    what: Mapped[str] = mapped_column(String(16))
    checkpoint: Mapped[str | None] = mapped_column(Text)
    replica: Mapped[str] = mapped_column(String(128))
    begun_at: Mapped[float] = mapped_column(Double)
    ended_at: Mapped[float | None] = mapped_column(Double)
    result: Mapped[str | None] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)


class AdapterRow(Base):
    """What an administrator last did to an adapter's name: `directory` is null where it was removed.

    It overrides the `--adapter` of that name. `revision` is its content, which every replica has to find there.
    """

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    directory: Mapped[str | None] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(String(128))
    changed_at: Mapped[float] = mapped_column(Double)
