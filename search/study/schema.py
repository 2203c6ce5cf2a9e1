"""The tables of a study."""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 1

metadata = sa.MetaData()
meta_table = sa.Table(
    "meta", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
candidate_table = sa.Table(
    "candidate",
    metadata,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("candidate", sa.Text, nullable=False),
    sa.Column("params", sa.Text, nullable=False),
    sa.Column("created", sa.Text, nullable=False),
)
evaluation_table = sa.Table(
    "evaluation",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.Text, sa.ForeignKey("candidate.key"), nullable=False),
    sa.Column("fidelity", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("measurements", sa.Text, nullable=False, default="{}"),
    sa.Column("scores", sa.Text, nullable=False, default="null"),
    sa.Column("facts", sa.Text, nullable=False, default="{}"),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("seconds", sa.Float, nullable=False, default=0.0),
    sa.Column("at", sa.Text, nullable=False),
    sa.Index("evaluation_key", "key", "fidelity"),
)
artifact_table = sa.Table(
    "artifact",
    metadata,
    sa.Column("key", sa.Text, sa.ForeignKey("candidate.key"), primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
)
event_table = sa.Table(
    "event",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("data", sa.Text, nullable=False, default="{}"),
)
outbox_table = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("done", sa.Integer, nullable=False, default=0),
    sa.UniqueConstraint("kind", "key"),
)
