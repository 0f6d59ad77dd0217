"""A database of the operator's, SQLite or PostgreSQL: every use of it bounded, every failure a sentence."""

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
STATEMENT_TIMEOUT_S = 5  # that the database gives a statement, or the file's lock
ANSWER_S = 10.0  # with a server that says nothing at all; then its connection is cut
RECYCLE_S = 1800  # after which a connection is made anew: what stands between may have forgotten it
LOCK = 0x6772_6164_6361_6D00  # "gradcam": PostgreSQL's advisory lock of whoever changes the schema
SQLITE_ALONE = (
    "PRAGMA journal_mode = WAL",  # kept in the file: readers hold up no writer, and half as much is synced
    "BEGIN IMMEDIATE",
)
POSTGRES_ALONE = (
    "BEGIN",
    "SET LOCAL statement_timeout = 0",  # the wait for the lock is a statement
    "SET LOCAL lock_timeout = 0",
    f"SELECT pg_advisory_xact_lock({LOCK})",
)

Result = TypeVar("Result")


class Database:
    """A few connections, for threads to share. Each statement stands for itself, without a transaction."""

    def __init__(self, url: str, connections: int) -> None:
        """Nothing is connected yet. Raises InvalidSettings."""
        try:
            self._url = make_url(url)
            if self._url.drivername == "postgresql":
                self._url = self._url.set(drivername="postgresql+psycopg")
            self._kind = {"sqlite": sqlite, "postgresql": postgresql}[self._url.get_backend_name()]
            self._engine = create_engine(
                self._url,
                isolation_level="AUTOCOMMIT",  # one way there and back, instead of three
                hide_parameters=True,
                pool_size=connections,
                max_overflow=1,  # for who prunes
                pool_timeout=STATEMENT_TIMEOUT_S,
                pool_recycle=RECYCLE_S,
                connect_args=self._connect_args(),
            )
        except (ArgumentError, NoSuchModuleError, KeyError) as error:
            message = (
                "GRADCAM_STATUS_SQL_URL is no database that can be used: it must look like "
                "sqlite:////folder/status.db or postgresql://user:password@host/database."
            )
            raise InvalidSettings(message) from error
        event.listen(self._engine, "do_connect", self._connect)  # the first words after it are not ours
        self._local = threading.local()

    def __str__(self) -> str:
        url = self._url  # without its user, password and options
        shown = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return f"The status database {shown}"

    def upsert(self, table: Table, row: dict[str, Any], newer: str) -> Executable:
        """Insert a row, or replace the one with its primary key if `newer`, a column, is less there."""
        insert = self._kind.insert(table).values(row)
        keys = table.primary_key.columns.keys()
        upsert: Executable = insert.on_conflict_do_update(
            index_elements=keys,
            set_={name: insert.excluded[name] for name in row if name not in keys},
            where=table.c[newer] < insert.excluded[newer],
        )
        return upsert

    def run(self, work: Callable[[Connection], Result], seconds: float = ANSWER_S) -> Result:
        """Do something on a connection. Raises StatusUnavailable, without a password in its words."""
        try:
            with _Timeout(seconds) as timeout:
                self._local.timeout = timeout
                with self._engine.connect() as connection:
                    timeout.watch(connection.connection.driver_connection)
                    return work(connection)
        except SQLAlchemyError as error:
            reason = f"no answer within {seconds:g} s" if timeout.over else self._reason(error)
            message = f"{self} failed: {reason}."
            raise StatusUnavailable(message) from error

    @contextlib.contextmanager
    def alone(self, connection: Connection) -> Iterator[None]:
        """A transaction that only one worker is in at a time; the others wait for their turn."""
        for statement in SQLITE_ALONE if self._kind is sqlite else POSTGRES_ALONE:
            connection.exec_driver_sql(statement)
        try:
            yield
        except BaseException:
            with contextlib.suppress(SQLAlchemyError):  # a connection that was cut has no transaction either
                connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")

    def close(self) -> None:
        """Close every connection that is not in use."""
        self._engine.dispose()

    def _reason(self, error: SQLAlchemyError) -> str:
        """The driver's own words, on one line, without the statement and without a secret."""
        text = str(error.orig if isinstance(error, DBAPIError) else error)
        text = " ".join(text.split()).removesuffix(".") or type(error).__name__
        for secret in (self._url.password, *self._url.query.values()):
            if secret:
                text = text.replace(str(secret), "...")
        return text[:500]

    def _connect(self, dialect: Dialect, _: object, arguments: Any, options: dict[str, Any]) -> Any:
        driver = dialect.connect(*arguments, **options)
        self._local.timeout.watch(driver)
        return driver

    def _connect_args(self) -> dict[str, Any]:
        """What the URL may say otherwise."""
        if self._kind is sqlite:
            return {"timeout": STATEMENT_TIMEOUT_S}
        limits = f"-c statement_timeout={STATEMENT_TIMEOUT_S}s -c lock_timeout={STATEMENT_TIMEOUT_S}s"
        arguments = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "gradcam-worker",
            "options": limits,
        }
        return {name: value for name, value in arguments.items() if name not in self._url.query}


class _Timeout:
    """Cuts a connection on which nothing comes back: a server that hangs keeps none of its own limits."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._watched: list[tuple[object, socket.socket]] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._cut)
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
        """Cut this one, too, when the time is up. A file has no connection, and limits of its own."""
        if not hasattr(driver, "fileno") or driver.closed or any(driver is one for one, _ in self._watched):
            return
        with self._lock:  # a handle of our own: the driver may have closed its own by the time it is cut
            self._watched.append((driver, socket.socket(fileno=os.dup(driver.fileno()))))
        if self.over:
            self._cut()

    def _cut(self) -> None:
        with self._lock:
            self.over = True
            for _, connection in self._watched:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
