"""Status in a database of the operator's: one row a job, for his own queries.

The ledger's document is the truth; a row is a copy of it, brought by a dispatcher. Its `document` is the
very text that Redis and webhooks hold.
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

MIGRATION_TIMEOUT_S = 600.0  # for a change of the schema, or the wait for another worker's
PRUNE_ROWS, PRUNE_BATCHES = 1000, 10  # deleted in one statement, and such statements in one call

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
    Column("created_at", DateTime(timezone=True), nullable=False),  # SQLite's are UTC, without saying so
    Column("updated_at", DateTime(timezone=True), nullable=False),
    Column("completed_at", DateTime(timezone=True)),
    Column("document", Text, nullable=False),
    Index("gradcam_jobs_status", "status", "updated_at"),
    Index("gradcam_jobs_completed", "completed_at"),
)


class SqlStatus:
    """The table `gradcam_jobs`. Every method but `close` raises StatusUnavailable."""

    def __init__(self, url: str, retention_s: float, connections: int = 4) -> None:
        """Nothing is connected yet. `retention_s` is a final job's. Raises InvalidSettings."""
        self._database = Database(url, connections)
        self._retention = timedelta(seconds=retention_s)
        self._upgraded = False
        self._upgrading = threading.Lock()

    def write(self, document: StatusDocument) -> None:
        """Keep a document, unless the row holds this revision or a newer one."""
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
        self._ready()
        self._database.run(lambda connection: connection.execute(upsert))

    def read(self, job_id: str) -> StatusDocument:
        """The document of a job. Raises UnknownJob."""
        wanted = select(JOBS.c.document).where(JOBS.c.id == job_id)
        found = self._database.run(lambda connection: connection.scalar(wanted))
        if found is None:
            message = f"{self._database} has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        try:
            return StatusDocument.model_validate_json(found)
        except ValidationError as error:
            message = f"{self._database} holds a document of job {job_id} that this version cannot read."
            raise StatusUnavailable(message) from error

    def prune(self) -> int:
        """Forget what was completed longer ago than the retention: how many rows, at most 10,000 a call."""
        old = select(JOBS.c.id).where(JOBS.c.completed_at < utc_now() - self._retention)
        # Several workers may do this at once: each takes what no other has in hand.
        some = old.order_by(JOBS.c.completed_at).limit(PRUNE_ROWS).with_for_update(skip_locked=True)
        statement, forgotten = delete(JOBS).where(JOBS.c.id.in_(some)), 0
        self._ready()
        for _ in range(PRUNE_BATCHES):
            count = self._database.run(lambda connection: connection.execute(statement).rowcount)
            forgotten += count
            if count < PRUNE_ROWS:
                break
        return forgotten

    def upgrade(self) -> None:
        """Make the table, or add what it lacks; one worker at a time, the others wait and find it done.

        A database that a newer worker has changed already is left as it is: see
        `gradcam_worker.delivery.migrations`.
        """
        config = Config()
        config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
        scripts = ScriptDirectory.from_config(config)
        head, ours = scripts.get_current_head(), {script.revision for script in scripts.walk_revisions()}

        def changed(connection: Connection) -> bool:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            found = context.get_current_revision()
            return found is not None and (found == head or found not in ours)

        def change(connection: Connection) -> None:
            with self._database.alone(connection):
                if not changed(connection):
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")

        if not self._database.run(changed):  # which needs no right to change anything
            self._database.run(change, MIGRATION_TIMEOUT_S)
        self._upgraded = True

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._database.close()

    def _ready(self) -> None:
        """Upgraded: at the start or, where the database was away then, now."""
        if self._upgraded:
            return
        if not self._upgrading.acquire(blocking=False):  # no dispatcher has to wait behind another who waits
            message = f"{self._database} is being prepared."
            raise StatusUnavailable(message)
        try:
            self.upgrade()
        finally:
            self._upgrading.release()
