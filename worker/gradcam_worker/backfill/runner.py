"""Runs a backfill: a very long list of images -> shards -> a dataset. It can be stopped and resumed any time.

    input -> shards, at most a window of them in flight -> ledger and queue -> workers -> files in the output
          -> dataset.json

The runner has no state that must survive it. Shards that are done are listed in the output; those in flight
are found again by their ids: see `gradcam_worker.backfill.inflight`. So no shard is done twice, and none is
left out.

Rows that have moved in the input, or that are in it twice, are not computed again: their shards name the
files that hold them, see `gradcam_worker.backfill.reuse`. A shard waits for one before it that holds a row of
it. Outdated files are removed when all shards are done.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradcam_worker.backfill.inflight import FATAL_CODES, InFlight, InFlightShard, with_derived_id
from gradcam_worker.backfill.options import RunOptions
from gradcam_worker.backfill.outages import PatientCalls
from gradcam_worker.backfill.output import DatasetDir, WeightsCheck
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import Progress, RateMeter, describe_trouble
from gradcam_worker.backfill.registry import BackfillLease, BackfillRegistry
from gradcam_worker.backfill.reuse import DoneRows, FirstShards, read_done_rows
from gradcam_worker.errors import (
    BackfillCanceled,
    BackfillConflict,
    BackfillImpossible,
    BackfillStopped,
    InvalidInput,
    LedgerUnavailable,
)
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.resilience.prefetch import Prefetcher
from gradcam_worker.schemas.legacy_rows import row_state
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.visible import counted

log = EventLogger("gradcam")

MAX_TRIES = 3  # of a shard that fails as a whole
MIN_POLL_INTERVAL_S, MAX_POLL_INTERVAL_S = 0.05, 1.0  # of the shards in flight: longer while nothing changes
MAX_SUBMIT_S = 0.2  # before the shards in flight are polled again
WORKER_COUNT_INTERVAL_S = 1.0
DEFAULT_OPTIONS = RunOptions()


def _log_warning(message: str) -> None:
    log.warning("backfill_warning", reason=message)


class BackfillRunner:
    """Runs a plan, from its input to a complete dataset."""

    def __init__(
        self,
        plan: Plan,
        output: DatasetDir,
        ledger: Ledger,
        publish: Callable[[str], None],
        registry: BackfillRegistry,
        *,
        options: RunOptions = DEFAULT_OPTIONS,
        shards_per_worker: int = 2,
        tenant: Tenant | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        warn: Callable[[str], None] = _log_warning,
    ) -> None:
        """Prepare a run; nothing is read or written yet.

        Args:
            plan: The plan, as `DatasetDir.resolve` returned it.
            output: The dataset's folder.
            ledger: Where shards are submitted.
            publish: Puts the message of a shard on the queue, by the shard's id.
            registry: Holds the lease on the output.
            options: Options of this run.
            shards_per_worker: The number of shards that a worker runs at a time.
            tenant: Whose backfill it is; None: nobody's.
            on_progress: Called after each step.
            warn: Called with messages for the operator; default: they are logged.
        """
        self.plan, self.progress, self._rate = plan, Progress(), RateMeter()
        self._output, self._ledger, self._publish, self._registry = output, ledger, publish, registry
        self._options, self._shards_per_worker = options, shards_per_worker
        self._on_progress, self._warn = on_progress, warn
        self._calls = PatientCalls(warn)
        self.in_flight = InFlight(ledger, output.has_shard, self._renew_lease, warn, tenant)
        self._to_submit: deque[InFlightShard] = deque()  # before further shards of the input
        self._held: list[tuple[InFlightShard, set[str]]] = []  # with the keys of shards that they wait for
        self._undone: set[str] = set()  # keys of shards to submit, held or in flight
        self._first_shards = FirstShards()
        self._done_rows: DoneRows | None = None  # of the output; None: not read yet
        self._shard_keys: list[str] = []  # of the input so far
        self._error_codes: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()  # rows by code
        self._unchecked_ids: list[str] = []  # of shards done earlier whose weights are not checked yet
        self._shards_ended = 0  # in this run
        self._next_submit_s = 0.0  # when the rate allows the next shard
        self._workers_counted_s = 0.0  # when workers were last counted
        self._uncommitted = False  # dataset.json was removed

    def lease(self) -> BackfillLease:
        """Return this backfill's lease: enter it, then call `run`."""
        return BackfillLease(self._registry, self.plan.output, self._facts, lambda: self.in_flight.ids)

    def run(self, lease: BackfillLease, shards: Iterable[Shard]) -> dict[str, Any] | None:
        """Run the backfill. It keeps trying while the ledger or the broker is unavailable.

        Args:
            lease: As `lease` returned it, entered.
            shards: The shards of the input, in order.

        Returns:
            The content of dataset.json, or None if shards failed.

        Raises:
            BackfillConflict: The output belongs to another backfill, or the input has changed.
            BackfillRunning: Another process runs it now.
            BackfillStopped: Too many rows failed.
            BackfillImpossible: No shard can succeed.
            BackfillCanceled: It was cancelled.
            StorageUnavailable: The output cannot be read or written.
            InvalidInput: The input is empty, or cannot be read further.
        """
        self._lease = lease
        if lease.previous and lease.previous.facts["backfill"] != self.plan.id:
            self._cancel_previous_run()
        self._output.claim(self.plan)
        self._weights = WeightsCheck(self._output, self.plan.weights_sha256)
        self._done_keys = self._output.done_keys()
        self._places = self._output.files().places()
        only_failed = self._options.only_failed
        self._keys_with_failures = self._output.keys_with_failures() if only_failed else frozenset()
        with Prefetcher(shards) as prefetched:
            pause_s = MIN_POLL_INTERVAL_S
            while not self._is_finished():
                self._check_lease()
                before = len(self._shard_keys), self._shards_ended
                self._calls.call_ledger(lambda: self._step(prefetched))
                self._report_progress()
                self._check_failures()
                changed = before != (len(self._shard_keys), self._shards_ended)
                pause_s = MIN_POLL_INTERVAL_S if changed else min(pause_s * 1.5, MAX_POLL_INTERVAL_S)
                if self._must_wait() or not changed:
                    time.sleep(pause_s)
        for code, rows in self._warnings.items():
            self._warn(f"{counted(rows, 'row has', 'rows have')} the warning {code}.")
        if self.progress.lost:
            return None
        self._cancel_previous_run()
        return self._commit()

    def _cancel_previous_run(self) -> None:
        """Cancel shards that an earlier run left in flight, and wait until none can write any more."""
        ids = self._lease.previous.shards if self._lease.previous else ()

        def ended() -> bool:
            self._count_workers()
            return self.in_flight.cancel_others(ids)

        while ids and not self._calls.call_ledger(ended):
            self._check_lease()
            self._report_progress()
            time.sleep(MIN_POLL_INTERVAL_S)

    def _check_lease(self) -> None:
        """Raise BackfillRunning if the lease is lost, BackfillCanceled if a cancel was requested."""
        self._lease.check()
        if self._lease.status.cancel_requested:
            self._stop("The backfill was cancelled on request.", BackfillCanceled)

    def _check_failures(self) -> None:
        """Raise BackfillStopped if too many rows have failed."""
        if self._is_finished():
            return
        if reason := self._options.too_many_failed(self.progress, self._shards_ended):
            self._stop(f"{reason} A greater --max-failed lets more.")

    def _step(self, prefetched: Prefetcher[Shard]) -> None:
        """Submit and poll. Raises LedgerUnavailable; the next step continues."""
        self._count_workers()
        self._fill_window(prefetched)
        self._poll()

    def _count_workers(self) -> None:
        if self._calls.unavailable or time.monotonic() - self._workers_counted_s >= WORKER_COUNT_INTERVAL_S:
            workers = self._ledger.find_workers()
            trouble = describe_trouble(workers.values())
            if bool(trouble) != bool(self.progress.trouble):
                self._warn(
                    f"{trouble[0].upper()}{trouble[1:]}." if trouble else "All workers take work again."
                )
            self.progress = replace(self.progress, workers=len(workers), trouble=trouble)
            self._workers_counted_s = time.monotonic()

    def _is_finished(self) -> bool:
        return self.progress.whole and not self.in_flight and not self._to_submit and not self._held

    def _must_wait(self) -> bool:
        """Whether the window or the rate does not allow another shard yet."""
        return len(self.in_flight) >= self._window() or time.monotonic() < self._next_submit_s

    def _window(self) -> int:
        """The maximal number of shards in flight, shared with other running backfills."""
        limit = self._options.max_in_flight(self.progress.workers, self._shards_per_worker)
        return max(limit // max(self._lease.status.running, 1), 1)

    def _fill_window(self, prefetched: Prefetcher[Shard]) -> None:
        """Submit shards until the window is full, or for MAX_SUBMIT_S."""
        end = time.monotonic() + MAX_SUBMIT_S
        while not self._must_wait() and time.monotonic() < end and not self._is_finished():
            if self._to_submit:
                self._submit(self._to_submit[0])
                self._to_submit.popleft()
                continue
            if len(self._held) >= self._window():
                return
            shard = prefetched.next(MIN_POLL_INTERVAL_S)
            if shard is None:
                self.progress = replace(self.progress, whole=prefetched.ended)
                return
            self._enqueue(shard)

    def _enqueue(self, shard: Shard) -> None:
        """Record a shard of the input; queue it for submission unless it is done already."""
        digests = shard.row_digests()
        earlier = self._first_shards.add(len(self._shard_keys), digests)
        self._shard_keys.append(shard.key)
        rows, done, now = len(shard.rows), self._done_keys.pop(shard.index, ()), self.progress
        self.progress = replace(now, planned=now.planned + rows)
        self._check_unchanged(shard, done)
        if shard.key not in done:
            self._queue(shard, digests, earlier)
        elif shard.key in self._keys_with_failures:
            update = {"keep": True, "reuse": self._places.get(shard.key, ())}
            again = with_derived_id(shard, "failed").model_copy(update=update)
            self._undone.add(shard.key)
            self._to_submit.append(InFlightShard(again))
        else:
            self.progress = replace(self.progress, before=self.progress.before + rows)
            if not self._weights.network:
                self._unchecked_ids.append(shard.id)

    def _check_unchanged(self, shard: Shard, done: Iterable[str]) -> None:
        """Raise BackfillConflict if the rows of a shard have changed, without --changed."""
        outdated = next((key for key in done if key != shard.key), None)
        if outdated and not self._options.changed:
            message = (
                f"The input has changed: shard {shard.index}, from row {shard.first} on, is {shard.key} now, "
                f"and {self._output.uri} holds {outdated}. --changed runs again what has changed."
            )
            raise BackfillConflict(message)

    def _queue(self, shard: Shard, digests: Sequence[str | None], earlier: Sequence[int | None]) -> None:
        """Queue a shard for submission, with the places of rows that are done, or will be.

        Args:
            shard: The shard.
            digests: Of its rows.
            earlier: For each row the position of an earlier shard of the input that has it, too.
        """
        places: dict[str, None] = {}
        waits_for: set[str] = set()
        for in_output, position in zip(self._find_done_rows(digests), earlier, strict=True):
            if in_output is not None:
                places[in_output] = None
            elif position is not None:
                key = self._shard_keys[position]
                places |= dict.fromkeys(self._places.get(key, (key,)))
                waits_for |= {key} & self._undone
        self._undone.add(shard.key)
        entry = InFlightShard(shard.model_copy(update={"reuse": tuple(places)}) if places else shard)
        if waits_for:
            self._held.append((entry, waits_for))
        else:
            self._to_submit.append(entry)

    def _find_done_rows(self, digests: Sequence[str | None]) -> list[str | None]:
        """Return the place of each row in the output, if the input may have moved since it was written."""
        if not self._options.changed:
            return [None] * len(digests)
        if self._done_rows is None:
            self._done_rows = read_done_rows(self._output, self._weights.accepts, self._check_lease)
        return self._done_rows.find(digests)

    def _end(self, key: str) -> None:
        """Submit the shards that waited for one that has ended, well or not."""
        self._undone.discard(key)
        held, self._held = self._held, []
        for entry, waits_for in held:
            waits_for.discard(key)
            if waits_for:
                self._held.append((entry, waits_for))
            else:
                self._to_submit.append(entry)

    def _uncommit(self) -> None:
        """Remove dataset.json before the first change."""
        if not self._uncommitted:
            self._output.uncommit()
            self._uncommitted = True

    def _submit(self, entry: InFlightShard) -> None:
        self._uncommit()
        shard = self._weights.pin(entry.shard).model_copy(update={"token": self._lease.token})
        submitted, document = self.in_flight.submit(replace(entry, shard=shard))
        if document.final:
            self._on_shard_succeeded(submitted.shard, document)
            return
        shard = submitted.shard
        if self._options.rate:
            earliest_s = max(self._next_submit_s, time.monotonic())
            self._next_submit_s = earliest_s + len(shard.rows) / self._options.rate
        self._calls.call_broker(lambda: self._publish(shard.id))

    def _renew_lease(self) -> None:
        """Store the ids in flight; the registry must have an id before it is submitted."""
        self._lease.renew()
        self._lease.check()

    def _poll(self) -> None:
        """Handle the shards that have ended."""
        for entry, document in self.in_flight.poll():
            if document is None:  # it expired in the ledger
                self._to_submit.append(entry)
            elif document.status == "succeeded":
                self._on_shard_succeeded(entry.shard, document)
            else:
                self._on_shard_failed(entry, document)
        self.progress = replace(self.progress, partly=self.in_flight.rows_explained)
        if self._unchecked_ids:
            for earlier in self._ledger.read_many(self._unchecked_ids).values():
                self._check_weights(earlier)
            self._unchecked_ids.clear()

    def _on_shard_succeeded(self, shard: Shard, document: StatusDocument) -> None:
        state = row_state(document)
        self._count_rows(shard, state.failed)
        self._count_warnings(document, state.warnings)
        reused = self.progress.reused + int(document.metrics.get("reused", 0))
        self.progress = replace(self.progress, reused=reused)
        self._check_weights(document)

    def _count_warnings(self, document: StatusDocument, rows: Mapping[str, int]) -> None:
        """Count the rows of a shard that have a warning; the first of each kind is told."""
        for warning in document.warnings:
            if warning.code in rows.keys() - self._warnings.keys():
                self._warn(f"{warning.code} in shard {document.metadata['shard']}: {warning.detail}")
        self._warnings.update(rows)
        self.progress = replace(self.progress, warnings=dict(sorted(self._warnings.items())))

    def _on_shard_failed(self, entry: InFlightShard, document: StatusDocument) -> None:
        """Retry a shard that failed as a whole, or count it as lost."""
        code = document.error.code if document.error else document.status
        reason = f"{code}: {document.error.detail if document.error else 'nobody knows why'}"
        if code in FATAL_CODES:
            self._stop(f"No shard can be done, because of {reason}", BackfillImpossible, resume=False)
        if entry.tries < MAX_TRIES:
            self._to_submit.append(entry.retry())
            return
        shard = entry.shard
        last = shard.first + len(shard.rows) - 1
        self._warn(
            f"Shard {shard.index}, rows {shard.first} to {last}, failed {MAX_TRIES} times, "
            f"at last with {reason}"
        )
        self._count_rows(shard, {code: len(shard.rows)})
        self.progress = replace(self.progress, lost=self.progress.lost + 1)

    def _count_rows(self, shard: Shard, failed: Mapping[str, int]) -> None:
        """Count the rows of a shard that has ended; `failed`: error code -> number of rows."""
        self._shards_ended += 1
        self._end(shard.key)
        self._error_codes.update(failed)
        self.progress = replace(
            self.progress,
            done=self.progress.done + len(shard.rows),
            failed=self._error_codes.total(),
            codes=dict(sorted(self._error_codes.items())),
        )

    def _check_weights(self, document: StatusDocument) -> None:
        """Raise BackfillStopped unless all shards were explained with the same weights, at the same layer."""
        if mismatch := self._weights.mismatch(document):
            self._output.discard_plan()
            self._stop(
                f"The workers do not agree: shard {document.metadata['shard']} was explained with {mismatch}."
                f" What lies in {self._output.uri} is no dataset: give all workers the same weights, and "
                "begin again in another output.",
                resume=False,
            )

    def _stop(
        self,
        reason: str,
        kind: type[BackfillStopped | BackfillImpossible | BackfillCanceled] = BackfillStopped,
        *,
        resume: bool = True,
    ) -> None:
        """Cancel the shards in flight and raise `kind`."""
        try:
            self.in_flight.cancel()
        except LedgerUnavailable as error:
            self._warn(f"What is in flight cannot be cancelled, and comes to its end by itself: {error}")
        self._report_progress()
        raise kind(f"{reason} To go on with it: --resume." if resume else reason)

    def _commit(self) -> dict[str, Any]:
        if not self._shard_keys:
            message = f"There is nothing to explain: {self.plan.input} holds no rows."
            raise InvalidInput(message)
        changed, network = self._options.changed, self._weights.network
        unchanged = None if self._uncommitted or self._done_keys else self._output.read_summary()
        if unchanged is None and changed:
            self._uncommit()  # `commit` removes shards that are no longer part of the input
        return unchanged or self._output.commit(
            self.plan, self._shard_keys, self.progress.planned, network, changed=changed
        )

    def _report_progress(self) -> None:
        now = self.progress
        rows_per_s = self._rate.update(now.done + now.partly)
        self.progress = replace(now, in_flight=len(self.in_flight), rows_per_s=rows_per_s)
        self._on_progress(self.progress)

    def _facts(self) -> dict[str, Any]:
        """The facts of this run for the registry."""
        plan = {"backfill": self.plan.id, "input": self.plan.input, "output": self.plan.output}
        now = replace(self.progress, in_flight=len(self.in_flight.ids))
        return {**plan, "network": self.plan.network, **now.facts()}
