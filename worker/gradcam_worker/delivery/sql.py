"""Status in the operator's SQL database: one row for each job, for the operator's own queries.

A row contains a copy of the job's document in the ledger, as the same JSON text, and columns to search by.
"""

import threading
from datetime import UTC, timedelta

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import ValidationError
from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    select,
)

from gradcam_worker.delivery.database import Database
from gradcam_worker.delivery.migrations import FOLDER, VERSION_TABLE
from gradcam_worker.errors import StatusUnavailable, UnknownJob
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusDocument

MIGRATION_TIMEOUT_S = 600.0  # including the wait for another worker's migration
PRUNE_BATCH_ROWS = 1000  # rows that one statement deletes
MAX_PRUNE_BATCHES = 10  # statements in one call

METADATA = MetaData()
JOBS = Table(
    "gradcam_jobs",
    METADATA,
    Column("id", String(36), primary_key=True),
    Column("status", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("network", String(256)),
    Column("error_code", String(64)),
    Column("created_at", DateTime(timezone=True), nullable=False),  # in SQLite: UTC, without a time zone
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("completed_at", DateTime(timezone=True)),
    Column("document", Text, nullable=False),
    Index("gradcam_jobs_status", "status", "updated_at"),
    Index("gradcam_jobs_completed", "completed_at"),
)


class SqlStatus:
    """The table `gradcam_jobs`. All methods but `close` raise StatusUnavailable if the database fails."""

    def __init__(self, url: str, retention_s: float, connections: int = 4) -> None:
        """Connect to nothing yet.

        Args:
            url: The database's URL.
            retention_s: How long final jobs are kept.
            connections: The number of connections.

        Raises:
            InvalidSettings: The URL is not that of a supported database.
        """
        self._database = Database(url, connections)
        self._retention = timedelta(seconds=retention_s)
        self._upgraded = False
        self._upgrading = threading.Lock()

    def write(self, document: StatusDocument) -> None:
        """Write a document, unless the row has the same revision or a later one."""
        row = {
            "id": document.id,
            "status": document.status,
            "revision": document.revision,
            "attempt": document.attempt,
            "network": document.network.name if document.network else None,
            "error_code": document.error.code if document.error else None,
            "created_at": document.created_at.astimezone(UTC),
            "updated_at": document.updated_at.astimezone(UTC),
            "completed_at": document.completed_at.astimezone(UTC) if document.completed_at else None,
            "document": document.to_json(),
        }
        upsert = self._database.upsert(JOBS, row, "revision")
        self._upgrade_once()
        self._database.run(lambda connection: connection.execute(upsert))

    def read(self, job_id: str) -> StatusDocument:
        """Read the document of a job.

        Args:
            job_id: The id of the job.

        Returns:
            The document.

        Raises:
            UnknownJob: There is no such row.
        """
        query = select(JOBS.c.document).where(JOBS.c.id == job_id)
        text = self._database.run(lambda connection: connection.scalar(query))
        if text is None:
            message = f"{self._database} has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        try:
            return StatusDocument.model_validate_json(text)
        except ValidationError as error:
            message = f"{self._database} has a document of job {job_id} that this version cannot read."
            raise StatusUnavailable(message) from error

    def prune(self) -> int:
        """Delete jobs whose retention is over.

        Returns:
            The number of deleted rows: at most 10,000 for each call.
        """
        expired = select(JOBS.c.id).where(JOBS.c.completed_at < utc_now() - self._retention)
        # Several workers may prune at the same time: each skips the rows that another is deleting.
        batch = (
            expired.order_by(JOBS.c.completed_at).limit(PRUNE_BATCH_ROWS).with_for_update(skip_locked=True)
        )
        statement, deleted = delete(JOBS).where(JOBS.c.id.in_(batch)), 0
        self._upgrade_once()
        for _ in range(MAX_PRUNE_BATCHES):
            count = self._database.run(lambda connection: connection.execute(statement).rowcount)
            deleted += count
            if count < PRUNE_BATCH_ROWS:
                break
        return deleted

    def upgrade(self) -> None:
        """Create the table, or migrate it to this version's schema: one worker does, the others wait.

        A schema of a newer version is left as it is: see `gradcam_worker.delivery.migrations`.
        """
        config = Config()
        config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
        scripts = ScriptDirectory.from_config(config)
        head = scripts.get_current_head()
        known_revisions = {script.revision for script in scripts.walk_revisions()}

        def is_upgraded(connection: Connection) -> bool:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            revision = context.get_current_revision()
            return revision is not None and (revision == head or revision not in known_revisions)

        def migrate(connection: Connection) -> None:
            with self._database.exclusive_transaction(connection):
                if not is_upgraded(connection):
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")

        if not self._database.run(is_upgraded):  # this check needs no permission to change the schema
            self._database.run(migrate, MIGRATION_TIMEOUT_S)
        self._upgraded = True

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._database.close()

    def _upgrade_once(self) -> None:
        """Upgrade before the first use, if the database could not be reached at the start."""
        if self._upgraded:
            return
        if not self._upgrading.acquire(blocking=False):  # a thread of the dispatcher must not wait
            message = f"{self._database} is being upgraded."
            raise StatusUnavailable(message)
        try:
            self.upgrade()
        finally:
            self._upgrading.release()
