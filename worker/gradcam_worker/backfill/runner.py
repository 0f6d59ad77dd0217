"""A very long list of images -> a steady stream of shards -> a dataset. It stops and goes on anywhere.

    input -> shards --at most a window of them--> ledger and queue -> workers -> files in the output -> seal

Nothing is kept here that matters. Which shards are done is what is listed in the output, and those in flight
are found again by their ids: see `gradcam_worker.backfill.inflight`. So nothing is done twice, and nothing is
left out.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gradcam_worker.backfill.inflight import HOPELESS, InFlight, InFlightShard, renamed
from gradcam_worker.backfill.output import DatasetDir, Weights
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import OutageLog, Progress, RateMeter, RunOptions
from gradcam_worker.backfill.registry import BackfillLease, BackfillRegistry
from gradcam_worker.errors import BackfillConflict, BackfillStopped, InvalidInput, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.resilience.prefetch import Prefetcher
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

TRIES = 3  # of a shard that fails as a whole
FIRST_LOOK_S, LAST_LOOK_S = 0.05, 1.0  # between two looks at what is in flight: longer while nothing changes
TURN_S = 0.2  # of handing out shards
AT_EASE = RunOptions()
WORKERS_EVERY_S = 2.0  # between two questions who works


class BackfillRunner:
    """Runs a plan: from its input to the seal of its dataset."""

    def __init__(
        self,
        plan: Plan,
        output: DatasetDir,
        ledger: Ledger,
        publish: Callable[[str], None],
        registry: BackfillRegistry,
        *,
        pace: RunOptions = AT_EASE,
        each: int = 2,
        show: Callable[[Progress], None] = lambda _: None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        """`publish` publishes a shard by its id. A worker has `each` shards in hand at most.

        `show` is called again and again with how far it is, `say` with what somebody should know.
        """
        self.plan, self.standing, self._speed = plan, Progress(), RateMeter()
        self._output, self._ledger, self._publish, self._fleet = output, ledger, publish, registry
        self._pace, self._each, self._show, self._say = pace, each, show, say
        self._outages = OutageLog(say)
        self.flights = InFlight(ledger, output.has, self._announce, say)
        self._waiting: deque[InFlightShard] = deque()  # to be submitted before any other
        self._keys: list[str] = []  # of all shards of the input so far
        self._codes: Counter[str] = Counter()
        self._unknown: list[str] = []  # ids of shards that nobody knows with which weights they were done
        self._ended = 0  # shards, in this run
        self._free_s = self._asked_s = 0.0  # when the next shard may go; when workers were counted last
        self._unsealed = False

    def lease(self) -> BackfillLease:
        """This backfill's place in the registry: enter it, then `run`."""
        return BackfillLease(self._fleet, self.plan.output, self._facts, lambda: self.flights.ids)

    def run(self, lease: BackfillLease, shards: Iterable[Shard]) -> dict[str, Any] | None:
        """Make the output its own and run it; return the seal, or None where shards are missing.

        Ledger and broker, when they are away, are tried again for ever. Raises BackfillConflict,
        BackfillStopped, StorageUnavailable, and what reading `shards` does. However it ends, it can go on.
        """
        self._seat = lease
        if lease.before and lease.before.facts["backfill"] != self.plan.id:
            self._settle()
        self._output.begin(self.plan)
        self._weights, self._held = Weights(self._output), self._output.done()
        self._with_failed = self._output.failed() if self._pace.only_failed else frozenset()
        with Prefetcher(shards) as ahead:
            pause_s = FIRST_LOOK_S
            while not self._over():
                self._check_cancel()
                seen = len(self._keys), self._ended
                self._outages.asking(lambda: self._step(ahead))
                self._show_now()
                if not self._over() and (why := self._pace.hopeless(self.standing, self._ended)):
                    self._stop(f"{why} A greater --max-failed lets more.")
                moved = seen != (len(self._keys), self._ended)
                pause_s = FIRST_LOOK_S if moved else min(pause_s * 1.5, LAST_LOOK_S)
                if self._full() or not moved:
                    time.sleep(pause_s)
        if self.standing.lost:
            return None
        self._settle()
        return self._sealed()

    def _settle(self) -> None:
        """What an earlier run has left in flight must not write any more."""
        before = self._seat.before.shards if self._seat.before else ()

        def settled() -> bool:
            self._count_workers()
            return self.flights.settled(before)

        while before and not self._outages.asking(settled):
            self._check_cancel()
            self._show_now()
            time.sleep(FIRST_LOOK_S)

    def _check_cancel(self) -> None:
        """Whether it is to go on. Raises BackfillConflict, BackfillStopped where it is not."""
        self._seat.check()
        if self._seat.heard.cancel:
            self._stop("The backfill was cancelled on request.")

    def _step(self, ahead: Prefetcher[Shard]) -> None:
        """Raises LedgerUnavailable: the next one does what is left."""
        self._count_workers()
        self._hand_out(ahead)
        self._look()

    def _count_workers(self) -> None:
        if self._outages.away or time.monotonic() - self._asked_s >= WORKERS_EVERY_S:
            self.standing = replace(self.standing, workers=len(self._ledger.workers()))
            self._asked_s = time.monotonic()

    def _over(self) -> bool:
        return self.standing.whole and not self.flights and not self._waiting

    def _full(self) -> bool:
        """Whether the window or the rate allow no other shard just now."""
        return len(self.flights) >= self._window() or time.monotonic() < self._free_s

    def _hand_out(self, ahead: Prefetcher[Shard]) -> None:
        """Submit what may be, for a little while: there are other things to do."""
        end = time.monotonic() + TURN_S
        while not self._full() and time.monotonic() < end and not self._over():
            if self._waiting:
                self._submit(self._waiting[0])
                self._waiting.popleft()
                continue
            shard = ahead.next(FIRST_LOOK_S)
            if shard is None:
                self.standing = replace(self.standing, whole=ahead.ended)
                return
            self._plan(shard)

    def _window(self) -> int:
        """How many shards may be in flight: a fair share, where other backfills run."""
        most = self._pace.most(self.standing.workers, self._each)
        return max(most // max(self._seat.heard.running, 1), 1)

    def _plan(self, shard: Shard) -> None:
        """Take down a shard of the input, and see what is to be done for it."""
        self._keys.append(shard.key)
        rows, there, now = len(shard.rows), self._held.pop(shard.index, ()), self.standing
        self.standing = replace(now, planned=now.planned + rows)
        for key in there:
            if key != shard.key:
                self._drop(key, shard)
        if shard.key not in there:
            self._waiting.append(InFlightShard(shard))
        elif shard.key in self._with_failed:
            self._waiting.append(InFlightShard(renamed(shard, "failed").model_copy(update={"keep": True})))
        else:
            self.standing = replace(self.standing, before=self.standing.before + rows)
            if not self._weights.network:
                self._unknown.append(shard.id)

    def _drop(self, key: str, shard: Shard) -> None:
        if not self._pace.changed:
            message = (
                f"The input has changed: shard {shard.index}, from row {shard.first} on, is {shard.key} now, "
                f"and {self._output.uri} holds {key}. --changed runs again what has changed."
            )
            raise BackfillConflict(message)
        self._unseal()
        self._output.drop(key)

    def _unseal(self) -> None:
        """Before anything changes."""
        if not self._unsealed:
            self._output.uncommit()
            self._unsealed = True

    def _submit(self, flight: InFlightShard) -> None:
        self._unseal()
        shard = self._weights.pinned(flight.shard).model_copy(update={"token": self._seat.token})
        flight, document = self.flights.submit(replace(flight, shard=shard))
        if document.final:
            self._succeeded(flight, document)
            return
        if self._pace.rate:
            self._free_s = max(self._free_s, time.monotonic()) + len(flight.shard.rows) / self._pace.rate
        self._outages.publishing(lambda: self._publish(flight.shard.id))

    def _announce(self) -> None:
        self._seat.beat()
        self._seat.check()

    def _look(self) -> None:
        """See which shards in flight have come to their end, and how."""
        for flight, document in self.flights.look():
            if document is None:  # the ledger has forgotten it
                self._waiting.append(flight)
            elif document.status == "succeeded":
                self._succeeded(flight, document)
            else:
                self._on_shard_failed(flight, document)
        self.standing = replace(self.standing, partly=self.flights.partly)
        if self._unknown:
            for one in self._ledger.read_many(self._unknown).values():
                self._compare(one)
            self._unknown.clear()

    def _succeeded(self, flight: InFlightShard, document: StatusDocument) -> None:
        found = {name.partition("failed_")[2]: int(count) for name, count in document.metrics.items()}
        self._count(flight.shard, {code: count for code, count in found.items() if code})
        self._compare(document)

    def _count(self, shard: Shard, codes: Mapping[str, int]) -> None:
        self._ended += 1
        self._codes.update(codes)
        self.standing = replace(
            self.standing,
            done=self.standing.done + len(shard.rows),
            failed=self._codes.total(),
            codes=dict(sorted(self._codes.items())),
        )

    def _compare(self, document: StatusDocument) -> None:
        """All shards must have been explained with the same weights, at the same layer."""
        if differs := self._weights.differ(document):
            self._output.discard_plan()
            self._stop(
                f"The workers do not agree: shard {document.metadata['shard']} was explained with {differs}. "
                f"What lies in {self._output.uri} is no dataset: give all workers the same weights, and "
                "begin again in another output.",
                resume=False,
            )

    def _on_shard_failed(self, flight: InFlightShard, document: StatusDocument) -> None:
        """A shard has failed as a whole."""
        code = document.error.code if document.error else document.status
        why = f"{code}: {document.error.detail if document.error else 'nobody knows why'}"
        if code in HOPELESS:
            self._stop(f"No shard can be done, because of {why}", resume=False)
        if flight.tries < TRIES:
            self._waiting.append(flight.again())
            return
        shard = flight.shard
        last = shard.first + len(shard.rows) - 1
        self._say(
            f"Shard {shard.index}, rows {shard.first} to {last}, failed {TRIES} times, at last with {why}"
        )
        self._count(shard, {code: len(shard.rows)})
        self.standing = replace(self.standing, lost=self.standing.lost + 1)

    def _stop(self, why: str, *, resume: bool = True) -> None:
        """Cancel what is in flight. Raises BackfillStopped."""
        try:
            self.flights.cancel()
        except LedgerUnavailable as error:
            self._say(f"What is in flight cannot be cancelled, and comes to its end by itself: {error}")
        self._show_now()
        raise BackfillStopped(f"{why} To go on with it: --resume." if resume else why)

    def _sealed(self) -> dict[str, Any]:
        if not self._keys:
            message = f"There is nothing to explain: {self.plan.input} holds no rows."
            raise InvalidInput(message)
        said = None if self._unsealed or self._held else self._output.is_committed()
        if said is None and self._pace.changed:
            self._unseal()  # what is no part of the input any more is removed now
        return said or self._output.commit(
            self.plan, self._keys, self.standing.planned, self._weights.network, changed=self._pace.changed
        )

    def _show_now(self) -> None:
        now = self.standing
        rows_per_s = self._speed.of(now.done + now.partly)
        self.standing = replace(now, in_flight=len(self.flights), rows_per_s=rows_per_s)
        self._show(self.standing)

    def _facts(self) -> dict[str, Any]:
        own = {"backfill": self.plan.id, "input": self.plan.input, "output": self.plan.output}
        now = replace(self.standing, in_flight=len(self.flights.ids))
        return {**own, "network": self.plan.network, **now.facts()}
