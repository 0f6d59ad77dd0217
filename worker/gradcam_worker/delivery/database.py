"""Access to the operator's database, SQLite or PostgreSQL, with a time limit for each operation."""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

from sqlalchemy import URL, Connection, Dialect, Executable, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from gradcam_worker.errors import InvalidSettings, StatusUnavailable

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 5  # enforced by the database, for statements and locks
ANSWER_TIMEOUT_S = 10.0  # enforced here: if the server does not answer, its connection is cut
MAX_CONNECTION_AGE_S = 1800  # a proxy or firewall may have dropped an older connection
MIGRATION_LOCK = 0x6772_6164_6361_6D00  # "gradcam" in ASCII: the key of PostgreSQL's advisory lock
SQLITE_EXCLUSIVE = (
    "PRAGMA journal_mode = WAL",  # stored in the file: readers do not block writers, fewer syncs
    "BEGIN IMMEDIATE",
)
POSTGRES_EXCLUSIVE = (
    "BEGIN",
    "SET LOCAL statement_timeout = 0",  # it also limits the wait for the lock
    "SET LOCAL lock_timeout = 0",
    f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})",
)

Result = TypeVar("Result")


class Database:
    """A pool of connections that threads share. Each statement is committed by itself."""

    def __init__(self, url: str, connections: int) -> None:
        """Connect to nothing yet.

        Args:
            url: The database's URL.
            connections: The number of connections.

        Raises:
            InvalidSettings: The URL is not that of a supported database.
        """
        try:
            self._url = make_url(url)
            if self._url.drivername == "postgresql":
                self._url = self._url.set(drivername="postgresql+psycopg")
            self._kind = {"sqlite": sqlite, "postgresql": postgresql}[self._url.get_backend_name()]
            self._engine = create_engine(
                self._url,
                isolation_level="AUTOCOMMIT",  # one round trip for each statement instead of three
                hide_parameters=True,
                pool_size=connections,
                max_overflow=1,  # for pruning
                pool_timeout=STATEMENT_TIMEOUT_S,
                pool_recycle=MAX_CONNECTION_AGE_S,
                connect_args=self._connect_args(),
            )
        except (ArgumentError, NoSuchModuleError, KeyError) as error:
            message = (
                "GRADCAM_STATUS_SQL_URL is not the URL of a supported database: it must look like "
                "sqlite:////folder/status.db or postgresql://user:password@host/database."
            )
            raise InvalidSettings(message) from error
        event.listen(self._engine, "do_connect", self._connect)  # watched before the dialect's own statements
        self._local = threading.local()

    def __str__(self) -> str:
        url = self._url  # user, password and options may be secret
        shown = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return f"The status database {shown}"

    def upsert(self, table: Table, row: dict[str, Any], newer: str) -> Executable:
        """Make a statement that inserts a row, or replaces an older one.

        Args:
            table: The table.
            row: The values, by column.
            newer: The column by which rows with the same primary key are compared.

        Returns:
            The statement. It replaces an existing row only if its `newer` is less.
        """
        insert = self._kind.insert(table).values(row)
        keys = table.primary_key.columns.keys()
        upsert: Executable = insert.on_conflict_do_update(
            index_elements=keys,
            set_={name: insert.excluded[name] for name in row if name not in keys},
            where=table.c[newer] < insert.excluded[newer],
        )
        return upsert

    def run(self, work: Callable[[Connection], Result], timeout_s: float = ANSWER_TIMEOUT_S) -> Result:
        """Use a connection.

        Args:
            work: Called with the connection.
            timeout_s: The maximum time without an answer of the server; then the connection is cut.

        Returns:
            What `work` returns.

        Raises:
            StatusUnavailable: The database failed. The message contains no secret.
        """
        try:
            with _Watchdog(timeout_s) as watchdog:
                self._local.watchdog = watchdog
                with self._engine.connect() as connection:
                    watchdog.watch(connection.connection.driver_connection)
                    return work(connection)
        except SQLAlchemyError as error:
            reason = f"no answer within {timeout_s:g} s" if watchdog.expired else self._describe(error)
            message = f"{self} failed: {reason}."
            raise StatusUnavailable(message) from error

    @contextlib.contextmanager
    def exclusive_transaction(self, connection: Connection) -> Iterator[None]:
        """Run the block in a transaction that only one worker can be in at a time; others wait."""
        for statement in SQLITE_EXCLUSIVE if self._kind is sqlite else POSTGRES_EXCLUSIVE:
            connection.exec_driver_sql(statement)
        try:
            yield
        except BaseException:
            with contextlib.suppress(SQLAlchemyError):  # a connection that was cut has no transaction
                connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._engine.dispose()

    def _describe(self, error: SQLAlchemyError) -> str:
        """The driver's message on one line, without the statement and without secrets."""
        text = str(error.orig if isinstance(error, DBAPIError) else error)
        text = " ".join(text.split()).removesuffix(".") or type(error).__name__
        for secret in (self._url.password, *self._url.query.values()):
            if secret:
                text = text.replace(str(secret), "...")
        return text[:500]

    def _connect(self, dialect: Dialect, _: object, arguments: Any, options: dict[str, Any]) -> Any:
        driver = dialect.connect(*arguments, **options)
        self._local.watchdog.watch(driver)
        return driver

    def _connect_args(self) -> dict[str, Any]:
        """Defaults that the URL's options override."""
        if self._kind is sqlite:
            return {"timeout": STATEMENT_TIMEOUT_S}
        limits = f"-c statement_timeout={STATEMENT_TIMEOUT_S}s -c lock_timeout={STATEMENT_TIMEOUT_S}s"
        defaults = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "gradcam-worker",
            "options": limits,
        }
        return {name: value for name, value in defaults.items() if name not in self._url.query}


class _Watchdog:
    """Cuts connections when the time is up: a server that hangs does not enforce its own limits."""

    def __init__(self, timeout_s: float) -> None:
        self.expired = False
        self._watched: list[tuple[object, socket.socket]] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(timeout_s, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for _driver, connection in self._watched:
                connection.close()
            self._watched.clear()

    def watch(self, driver: Any) -> None:
        """Watch the connection of a driver, too. SQLite has none: its own limits are enough."""
        watched = (watched_driver for watched_driver, _ in self._watched)
        if not hasattr(driver, "fileno") or driver.closed or any(driver is one for one in watched):
            return
        with self._lock:  # a duplicate handle: the driver may have closed its own by then
            self._watched.append((driver, socket.socket(fileno=os.dup(driver.fileno()))))
        if self.expired:
            self._cut()

    def _cut(self) -> None:
        with self._lock:
            self.expired = True
            for _, connection in self._watched:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
