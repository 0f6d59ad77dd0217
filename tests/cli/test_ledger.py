"""`gradcam ledger export` and `gradcam ledger import`, with the rights of the shipped user of workers."""

import gzip
import hashlib
import io
import json
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gradcam_worker.cli.exit_codes import ExitCode
from gradcam_worker.cli.main import main
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
PASSWORD = "planted-password"  # of a server that lives for a test


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """The administrator of a server that the environment names, with the shipped user of workers."""
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    lines = [line for line in USERS.read_text().splitlines() if "gradcam-worker" in line]
    users = lines[0].replace("SHA256-OF-THE-WORKERS-PASSWORD", digest)
    (tmp_path / "users.acl").write_text(f"{users}\nuser default on nopass ~* &* +@all\n")
    with servers.valkey(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as server:
        url = f"redis://gradcam-worker:{PASSWORD}@127.0.0.1:{server.port}/0"
        monkeypatch.setenv("GRADCAM_BROKER_URL", url)
        with redis.Redis(port=server.port, decode_responses=True) as connection:
            yield connection


@pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.jsonl.gz"])
def test_what_was_lost_is_imported_again(
    name: str, admin: redis.Redis, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, file = RedisLedger(Settings.from_environment()), tmp_path / name
    jobs = [job.model_copy(update={"id": new_id()}) for _ in range(3)]
    for one in jobs:
        ledger.submit(one, tenant=Tenant("acme"))
    assert main(["ledger", "export", str(file)]) == 0
    assert "3 jobs exported" in capsys.readouterr().err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not (tmp_path / f"{name}.part").exists()
    admin.flushall()
    assert main(["ledger", "import", "--dry-run", str(file)]) == 0
    assert "3 jobs would be added, 0 updated: 3 of them would be queued." in capsys.readouterr().out
    assert admin.dbsize() == 0
    assert main(["ledger", "import", "--json", str(file)]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["added"], counts["published"], counts["kept"]) == (3, 3, 0)
    assert ledger.count_jobs() == (3, 0)
    assert admin.llen("gradcam:gradcam.interactive\x06\x163") == 3
    assert main(["ledger", "import", str(file)]) == 0
    assert "Not used: 3 that the ledger has" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", [LedgerUnavailable("Gone."), KeyboardInterrupt()], ids=["outage", "stopped"]
)
def test_an_export_that_is_cut_off_leaves_no_file(
    fault: BaseException, environment: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(_: object) -> Iterator[dict[str, int]]:
        yield {"jobs": 0}
        if isinstance(fault, KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise fault

    (tmp_path / "ledger.jsonl").write_text("of yesterday")
    monkeypatch.setattr("gradcam_worker.cli.ledger.export_ledger", cut_off)
    assert main(["ledger", "export", str(tmp_path / "ledger.jsonl")]) in {
        ExitCode.UNREACHABLE,
        ExitCode.INTERRUPTED,
    }
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("ledger.jsonl", "of yesterday")]


def test_an_export_passes_through_a_pipe(
    environment: Settings, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    RedisLedger(environment).submit(job)
    assert main(["ledger", "export", "-"]) == 0
    exported = capsys.readouterr().out

    def pipe(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))

    for content in (exported.encode(), gzip.compress(exported.encode())):
        pipe(content)
        assert main(["ledger", "import", "-"]) == 0
        assert "1 that the ledger has" in capsys.readouterr().out
    pipe(exported[:-3].encode())
    assert main(["ledger", "import", "-"]) == ExitCode.BAD_INPUT
    assert "The export is damaged" in capsys.readouterr().err


def test_what_is_left_of_a_compressed_export_is_imported(
    environment: Settings, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, file = RedisLedger(environment), tmp_path / "ledger.jsonl.gz"
    ledger.submit(job)
    assert main(["ledger", "export", str(file)]) == 0
    file.write_bytes(file.read_bytes()[:-9])
    ledger.server.redis.flushdb()
    for options, where in (
        (["--dry-run"], "Nothing was changed"),
        ([], "What was read of it is in the ledger"),
    ):
        assert main(["ledger", "import", *options, str(file)]) == ExitCode.BAD_INPUT
        error = " ".join(capsys.readouterr().err.split())
        assert "cannot be read to its end" in error
        assert where in error
        assert ledger.count_jobs() == ((0, 0) if options else (1, 0))


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"\xff\xfe{}", mtime=0), gzip.compress(b"{}\n", mtime=0)[:-9]],
    ids=["no gzip", "no UTF-8", "cut off"],
)
def test_a_file_that_is_no_export_is_refused_with_a_sentence(
    content: bytes, environment: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment
    file = tmp_path / "ledger.jsonl.gz"
    file.write_bytes(content)
    assert main(["ledger", "import", "--dry-run", str(file)]) == ExitCode.BAD_INPUT
    assert "is in the ledger" not in capsys.readouterr().err
    assert main(["ledger", "import", str(file)]) == ExitCode.BAD_INPUT
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_is_not_there_is_said_to_be_missing_and_nothing_more(
    environment: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment
    assert main(["ledger", "import", str(tmp_path / "missing.jsonl")]) == ExitCode.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("missing.jsonl cannot be read: No such file or directory.")
