"""The registry's tables. Those of tenants' things have a tenant_id, and every query outside start-up takes one.

`seq` columns give listings a total order: several rows may share a second in `created_at`. The migrations in
`migrations/versions` build the same tables; a test compares the two.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Index, Integer, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite only auto-increments a column of the exact type INTEGER.
Sequence = BigInteger().with_variant(Integer, "sqlite")
Id = String(64)
Binary = bytes  # by a name that no column has

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})


class Base(DeclarativeBase):
    """Declarative base of all tables."""

    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it so)
        int: BigInteger,
        dict[str, Any]: JSON,
        list[str]: JSON,
        list[dict[str, Any]]: JSON,
    }


class ProcessRow(Base):
    """A process that shares the registry: alive until `alive_until` on the database's clock, unless it says so again.

    `started_at` is on its own clock, which is that of the files that it writes.
    """

    __tablename__ = "processes"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    seat: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[int]
    alive_until: Mapped[int]


class TenantRow(Base):
    """A tenant.

    Workers serve tenants by the jobs that they have in hand for each, divided by `weight`; among equals goes first who
    was served longest ago: `prepare_turn` and `train_turn` are the numbers of the latest claims.
    """

    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[int]
    weight: Mapped[float] = mapped_column(Float, default=1.0, server_default="1")
    prepare_turn: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    train_turn: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")


class KeyRow(Base):
    """An API key: never the secret, only its SHA-256 and a prefix that finds the row."""

    __tablename__ = "keys"
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"), index=True)
    name: Mapped[str | None] = mapped_column(String(128))
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    hash: Mapped[bytes] = mapped_column(LargeBinary(32))
    scopes: Mapped[list[str]]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    revoked_at: Mapped[int | None]


class FileRow(Base):
    """An uploaded file or a job's result; the bytes lie at `tenants/<tenant_id>/files/<id>`."""

    __tablename__ = "files"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    bytes: Mapped[int]
    created_at: Mapped[int]
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(Text)
    expires_at: Mapped[int | None]
    sha256: Mapped[str] = mapped_column(String(64))
    __table_args__ = (Index("ix_files_tenant_seq", "tenant_id", "seq"),)


class JobRow(Base):
    """A fine-tuning job with its lease.

    `lease_token` is a fencing token: it grows whenever the job changes hands (claimed, cancelled, paused). It stands in
    the WHERE of every UPDATE of the row, so that a worker which lost the job can write nothing more.
    `lease_owner` is a process, `lease_expires_at` on the database's clock.
    `requested` is what was asked for (`tenora.control.jobs.requests.Asked`) and never changes; `hyperparameters`,
    `lora` and `settings` are what is shown, with numbers once the files were read; `plan` holds the resolved TrainSpec
    then.
    While the job is not over, the blob `parent_digest` is kept for it.
    """

    __tablename__ = "jobs"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    model: Mapped[str] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(16))
    training_file: Mapped[str] = mapped_column(Id)
    training_files: Mapped[list[dict[str, Any]] | None]  # {file, weight, name}; the first one is `training_file`
    validation_file: Mapped[str | None] = mapped_column(Id)
    requested: Mapped[dict[str, Any]]
    hyperparameters: Mapped[dict[str, Any]]
    lora: Mapped[dict[str, Any]]
    settings: Mapped[dict[str, Any]]
    method: Mapped[dict[str, Any] | None]
    sweep: Mapped[dict[str, Any] | None]
    sweep_results: Mapped[list[dict[str, Any]] | None]
    parent: Mapped[str | None] = mapped_column(String(600))
    parent_digest: Mapped[str | None] = mapped_column(String(64), index=True)
    suffix: Mapped[str | None] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(63))
    seed: Mapped[int]
    # "metadata" is taken by SQLAlchemy on a declarative class.
    labels: Mapped[dict[str, Any] | None] = mapped_column("metadata", JSON)
    created_at: Mapped[int]
    finished_at: Mapped[int | None]
    estimated_finish: Mapped[int | None]
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    trained_tokens: Mapped[int | None]
    error: Mapped[dict[str, Any] | None]
    result_files: Mapped[list[str]]
    evaluation: Mapped[dict[str, Any] | None]
    published: Mapped[dict[str, Any] | None]  # `tenora.control.gate.takeover.Published`
    plan: Mapped[dict[str, Any] | None]
    baselines: Mapped[dict[str, Any] | None]  # `tenora.control.gate.baselines.Baselines`, as far as it was measured
    attempts: Mapped[int]  # runs that ended because the engine died
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_token: Mapped[int] = mapped_column(BigInteger)
    lease_expires_at: Mapped[int | None]
    __table_args__ = (
        Index("ix_jobs_tenant_seq", "tenant_id", "seq"),
        Index("ix_jobs_status", "status"),
    )
    __mapper_args__ = {"version_id_col": lease_token, "version_id_generator": False}  # noqa: RUF012 (SQLAlchemy's)


class JobEventRow(Base):
    """One line of a job's log."""

    __tablename__ = "job_events"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    created_at: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(8))
    data: Mapped[dict[str, Any]]
    __table_args__ = (Index("ix_job_events_job_seq", "job_id", "seq"),)


class CheckpointRow(Base):
    """A checkpoint of a job; its PEFT directory is the blob `digest`."""

    __tablename__ = "checkpoints"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("jobs.id"))
    created_at: Mapped[int]
    step_number: Mapped[int]
    model_name: Mapped[str] = mapped_column(String(512))
    digest: Mapped[str] = mapped_column(String(64), index=True)
    metrics: Mapped[dict[str, Any]]
    __table_args__ = (
        UniqueConstraint("job_id", "step_number", name="uq_checkpoints_job_step"),
        UniqueConstraint("tenant_id", "model_name", name="uq_checkpoints_tenant_model"),
    )


class AdapterRow(Base):
    """An alias: a tenant's name for one of its versions. Moving `version` is publishing and rolling back.

    A `version` of 0 is none of them: the name means nothing yet.
    """

    __tablename__ = "adapters"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(63))
    version: Mapped[int]
    pinned: Mapped[bool]
    created_at: Mapped[int]
    __table_args__ = (UniqueConstraint("tenant_id", "name", name="uq_adapters_tenant_name"),)


class AdapterVersionRow(Base):
    """An immutable version of an adapter. Several rows, of any tenant, may name one digest: blobs are shared."""

    __tablename__ = "adapter_versions"
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(Id, unique=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"))
    adapter_id: Mapped[str] = mapped_column(Id, ForeignKey("adapters.id"))
    version: Mapped[int]
    digest: Mapped[str] = mapped_column(String(64), index=True)
    base_model: Mapped[str] = mapped_column(String(255))
    method: Mapped[str] = mapped_column(String(16))
    rank: Mapped[int]
    target_modules: Mapped[list[str]]
    bytes: Mapped[int]
    created_at: Mapped[int]
    source: Mapped[str] = mapped_column(String(8))
    job_id: Mapped[str | None] = mapped_column(Id)
    model_name: Mapped[str | None] = mapped_column(String(512))  # ft:<base>:<tenant>:<suffix>:<id>
    evaluation: Mapped[dict[str, Any] | None]
    parent: Mapped[str | None] = mapped_column(String(600))  # the adapter that its training started from
    parent_digest: Mapped[str | None] = mapped_column(String(64))
    # `tenora.control.adapters.row_record.RowRecord`: eight bytes a row, so no listing reads it.
    rows: Mapped[Binary | None] = mapped_column(LargeBinary, deferred=True, deferred_raiseload=True)
    __table_args__ = (
        UniqueConstraint("adapter_id", "version", name="uq_adapter_versions_adapter_version"),
        UniqueConstraint("tenant_id", "model_name", name="uq_adapter_versions_tenant_model"),
        UniqueConstraint("tenant_id", "job_id", name="uq_adapter_versions_tenant_job"),
    )


class IdempotencyRow(Base):
    """The answer to a POST that carried an Idempotency-Key; `status` None while it is being worked on."""

    __tablename__ = "idempotency"
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenants.id"), primary_key=True)
    route: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    payload_hash: Mapped[str] = mapped_column(String(64))
    process_id: Mapped[str | None] = mapped_column(Id)  # that works on it
    status: Mapped[int | None]
    body: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[int] = mapped_column(BigInteger, index=True)
