"""The commands `gradcam ledger export` and `gradcam ledger import`."""

import contextlib
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO, cast

import click

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.cli.options import json_option
from gradcam_worker.errors import InvalidExport
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.ledger.redis.transfer import ImportCounts, LedgerImport, export_ledger
from gradcam_worker.operations.signals import interrupted_by_sigterm
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

STANDARD = "-"  # standard output, or standard input
PRIVATE = 0o600  # an export holds presigned URLs, webhooks and hashes of API keys
GZIP_LEVEL, GZIP_MAGIC = 6, b"\x1f\x8b"


@click.group()
def ledger() -> None:
    """Export the ledger to a file, and import it where Redis has lost, or rolled back, what it had."""


@ledger.command("export")
@click.argument("file")
def export_file(*, file: str) -> int:
    """Write everything that the ledger holds to FILE, as JSON Lines; `-` is standard output.

    FILE is compressed if its name ends with .gz. It holds jobs, their idempotency keys, dead letters, events
    that are still to be delivered, tenants, hashes of API keys, and usage. It may be written while jobs run;
    each job is as it was at one moment. Keep it as secret as Redis: it holds URLs of images and webhooks.

    \b
    Example:
      gradcam ledger export ledger.jsonl.gz
      gradcam ledger export - | gzip | aws s3 cp - s3://backups/ledger.jsonl.gz
    """
    server = RedisLedger(Settings.from_environment()).server
    counts: dict[str, int] = {}
    with interrupted_by_sigterm(), _write(file) as lines:
        for record in export_ledger(server):
            lines.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
            counts = record.get("end", counts)
    console.err.print(f"{counted(counts['jobs'], 'job')} exported.")
    return 0


@ledger.command("import")
@click.argument("file")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option()
def import_file(*, file: str, dry_run: bool, as_json: bool) -> int:
    """Enter in the ledger what FILE holds, which `gradcam ledger export` wrote; `-` is standard input.

    It may be compressed by gzip, whatever its name is. The ledger may be in use, and the import may be
    repeated: what is newer there stays. Jobs that waited are queued again, and events that waited are
    delivered. Tenants and API keys are entered only where there are none.

    \b
    Example:
      gradcam ledger import --dry-run ledger.jsonl.gz
      gradcam ledger import ledger.jsonl.gz
      aws s3 cp s3://backups/ledger.jsonl.gz - | gradcam ledger import -
    """
    settings = Settings.from_environment()
    publisher = Publisher(settings)
    importer = LedgerImport(
        RedisLedger(settings).server,
        publisher.republish,
        lease_s=settings.lease_s,
        retention_s=max(settings.retention_s, settings.idempotency_retention_s),
        dry_run=dry_run,
    )
    with _read(file, dry_run=dry_run) as lines:
        counts = importer.run(lines)
    if as_json:
        console.print_json(asdict(counts))
    else:
        console.out.print(_summary(counts, dry_run=dry_run), soft_wrap=True, highlight=False)
    return 0


def _summary(counts: ImportCounts, *, dry_run: bool) -> str:
    would = "would be " if dry_run else ""
    entered = f"{counted(counts.added, 'job')} {would}added, {counts.updated:,} updated"
    queued = f"{counts.published:,} of them {would}queued"
    others = f"{counts.superseded:,} whose idempotency key is another's by now, {counts.expired:,} that ended"
    kept = f"Not used: {counts.kept:,} that the ledger has, {others} too long ago."
    fields = f"{counted(counts.fields, 'record')} of tenants, keys, usage and webhooks {would}entered."
    return f"{entered}: {queued}.\n{kept}\n{fields}"


@contextlib.contextmanager
def _write(file: str) -> Iterator[TextIO]:
    """The lines of a file that replaces another only when it is whole. Raises InvalidExport."""
    if file == STANDARD:
        yield sys.stdout
        return
    unfinished = Path(f"{file}.part")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, PRIVATE)
        with contextlib.ExitStack() as opened:
            raw = opened.enter_context(os.fdopen(descriptor, "wb"))
            packed = gzip.GzipFile("", "wb", GZIP_LEVEL, raw) if file.endswith(".gz") else raw
            yield opened.enter_context(io.TextIOWrapper(packed, encoding="utf-8"))
        unfinished.replace(file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        message = f"{file} cannot be written ({error})."
        raise InvalidExport(message) from error


@contextlib.contextmanager
def _read(file: str, *, dry_run: bool) -> Iterator[TextIO]:
    """The lines of a file, compressed or not. Raises InvalidExport if it cannot be read, or is no text."""
    with contextlib.ExitStack() as opened:
        try:
            # Standard input stays open: it is not ours.
            if file == STANDARD:
                raw = cast("io.BufferedReader", sys.stdin.buffer)
            else:
                raw = opened.enter_context(Path(file).open("rb"))
            packed = gzip.GzipFile(fileobj=raw) if raw.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC) else raw
        except OSError as error:
            message = f"{file} cannot be read: {error.strerror}."
            raise InvalidExport(message) from error
        lines = io.TextIOWrapper(packed, encoding="utf-8")
        opened.callback(lines.detach)
        try:
            yield lines
        # Gzip raises the second at its end.
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            done = "Nothing was changed." if dry_run else "What was read of it is in the ledger."
            message = f"{file} cannot be read to its end ({error}). {done}"
            raise InvalidExport(message) from error
