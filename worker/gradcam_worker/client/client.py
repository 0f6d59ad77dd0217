"""The client of web apps and scripts: submit a job, read its state, wait for it. No numpy, no TensorFlow.

>>> client = GradcamClient("redis://127.0.0.1:6379/0")
>>> job = client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
>>> job.wait().status
>>> job.result().overlays[0].url  # for a browser
"""

import builtins
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self, Unpack, overload

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.client import results
from gradcam_worker.client.calls import REDIS_RETRIES, ClientCalls
from gradcam_worker.client.datasets.backfill_handle import BackfillHandle
from gradcam_worker.client.datasets.backfills import BackfillStatus, Cancellation
from gradcam_worker.client.datasets.submitted_backfills import OptionValue, SubmittedBackfills, still_running
from gradcam_worker.client.job_fields import Classes, Image, ListConditions, TopN, WithTarget, naming_fields
from gradcam_worker.client.job_handle import JobHandle
from gradcam_worker.client.results import Objects, Result
from gradcam_worker.client.waiting.waiter import JobWaiter
from gradcam_worker.client.webhooks import Webhooks
from gradcam_worker.errors import WaitTimeout
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.blocking import run_blocking
from gradcam_worker.resilience.outages import Outage, Outages
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import JobPage, JobQuery
from gradcam_worker.schemas.options import MethodName, MethodSpec, Metric
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.worker_report import NetworkOffer, WorkerReport
from gradcam_worker.settings import Settings

TIMEOUT_S = 2  # for one answer of Redis: a web request is waiting


class GradcamClient:
    """Submits jobs and reads their state and results.

    It may be shared between threads and created before a process forks. While Redis is unreachable, a call
    is retried for a few seconds (`client.calls.REDIS_RETRIES`), then raises LedgerUnavailable, which says
    whether the job was accepted. A refused password, user or database is not retried.

    Examples:
        >>> client = GradcamClient("redis://127.0.0.1:6379/0")
        >>> job = client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
        >>> job.wait().status
        'succeeded'
    """

    webhooks = Webhooks()  # needs no server

    def __init__(
        self,
        broker_url: str | None = None,
        status_url: str | None = None,
        *,
        settings: Settings | None = None,
        ledger: Ledger | None = None,
        publish: Callable[[Job], None] | None = None,
        objects: Objects | None = None,
        outages: Outages | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            broker_url: the queue, as `redis://host:6379/0`; default: GRADCAM_BROKER_URL.
            status_url: the ledger; default: GRADCAM_LEDGER_URL, else the broker's server.
            settings: in place of those of the environment.
            ledger: stands in for Redis in unit tests: see `gradcam_worker.testing`.
            publish: stands in for the queue.
            objects: stands in for S3.
            outages: log outages of Redis; default: those that outlast the retries of one call, which raises.

        Raises:
            InvalidSettings: a URL or a setting is not what it should be.
        """
        change = settings.changed if settings else Settings.from_environment
        self._settings = settings = change(broker_url=broker_url, ledger_url=status_url)
        self.outages = outages = outages or Outages(
            Outage("ledger", quiet_s=REDIS_RETRIES.total_s), Outage("broker", quiet_s=REDIS_RETRIES.total_s)
        )
        self._ledger = ledger = ledger or RedisLedger(
            settings, timeout_s=TIMEOUT_S, retries=0, outage=outages.ledger
        )
        # One server has one outage: most jobs are published in the step in which they are entered.
        of_queues = outages.ledger if settings.has_one_server else outages.broker
        queues = publish or Publisher(settings, timeout_s=TIMEOUT_S, outage=of_queues)
        self.calls = ClientCalls(settings, ledger, queues, objects or results.SettingsObjects(settings))
        self.waiter = JobWaiter(ledger)
        self.submitted_backfills = SubmittedBackfills(settings)

    @overload
    def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[TopN]
    ) -> JobHandle: ...

    @overload
    def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[Classes]
    ) -> JobHandle: ...

    @overload
    def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[WithTarget]
    ) -> JobHandle: ...

    @overload
    def submit(self, job: Job | Mapping[str, Any], /, *, retry_failed: bool = False) -> JobHandle: ...

    @naming_fields
    def submit(
        self, job: Job | Mapping[str, Any] | None = None, /, *, retry_failed: bool = False, **fields: Any
    ) -> JobHandle:
        """Enter a job in the ledger, put its message on the queue, return the job's id.

        Submitting the same job again (by id, or by `idempotency_key`) returns the first one's id and runs
        nothing twice. A job that is in the ledger is accepted: if the broker is another server, and cannot be
        reached at that moment, a worker publishes the message within a minute.

        Args:
            job: a `Job`, or its fields in a dictionary; else its fields by name.
            retry_failed: try the job again where it is one that has failed; without it the failure stays.
            **fields: `image`, `network`, `top_n` or `classes`, and any other field of `Job`. Instead of an
                object, `method` may be a name, `artifacts` a list of kinds, and `webhook` a URL.

        Returns:
            The job's id, which has the calls for this job: `wait`, `result` and others of `JobHandle`.

        Raises:
            InvalidJob: no worker would accept it; the message names each field that is wrong.
            IdempotencyConflict: the id or key belongs to a different job.
            LedgerUnavailable: the job was not accepted, or that is not known: `in_doubt` has its id then, and
                submitted again with the same id or key it runs once.

        Examples:
            >>> job = client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5, method="gradcam++")
            >>> job.wait().status
            'succeeded'
        """
        return JobHandle(run_blocking(self.calls.submit(job, retry_failed=retry_failed, **fields)), self)

    def submit_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], *, retry_failed: bool = False
    ) -> builtins.list[JobHandle]:
        """Submit jobs, hundreds in a round trip.

        Args:
            jobs: `Job`s, or their fields. They are taken as they are needed: a generator of a million is not
                held in memory.
            retry_failed: see `submit`.

        Returns:
            The jobs' ids, in the same order.

        Raises:
            InvalidJob, IdempotencyConflict: as `submit`, with the number of the job. Those before it are
                accepted, and their ids are in `accepted`; what follows it is not.
            LedgerUnavailable: those in `accepted` are, and of those in `in_doubt` it is not known.

        Examples:
            >>> uris = (f"s3://in/{number}.jpg" for number in range(1000))
            >>> client.submit_many({"image": uri, "network": "vgg16", "top_n": 1} for uri in uris)
        """
        ids = run_blocking(self.calls.submit_many(jobs, retry_failed=retry_failed))
        return [JobHandle(job_id, self) for job_id in ids]

    def job(self, job_id: str) -> JobHandle:
        """A handle of a job that was submitted elsewhere. No server is asked: it may be unknown.

        Args:
            job_id: the job's id.

        Returns:
            The id, with the calls for this job.

        Examples:
            >>> client.job(request.path_params["job_id"]).status()
        """
        return JobHandle(job_id, self)

    def status(self, job_id: str) -> StatusDocument:
        """What is known about a job.

        Args:
            job_id: what `submit` returned.

        Returns:
            Its status document.

        Raises:
            UnknownJob: the ledger has no such job, or its time there has passed.
            LedgerUnavailable: the ledger cannot be reached.
        """
        return run_blocking(self.calls.status(job_id))

    def statuses(self, job_ids: Iterable[str]) -> dict[str, StatusDocument]:
        """What is known about many jobs, in one round trip.

        Args:
            job_ids: what `submit` returned.

        Returns:
            The documents by job id, without the jobs that the ledger does not know.

        Raises:
            LedgerUnavailable: the ledger cannot be reached.
        """
        return run_blocking(self.calls.statuses(job_ids))

    def cancel(self, job_id: str) -> StatusDocument:
        """Stop a job: one that waits is `canceled` at once, a running one as soon as its worker sees it.

        Args:
            job_id: what `submit` returned.

        Returns:
            Its document. A final one stays as it is: look at its `status`.

        Raises:
            UnknownJob: the ledger has no such job.
            LedgerUnavailable: the ledger cannot be reached; the message says whether the job may be canceled.
        """
        return run_blocking(self.calls.cancel(job_id))

    def retry(self, job_id: str) -> StatusDocument:
        """Try a failed job again, as the same one: its id, its idempotency key and its webhooks stay.

        It is queued again with all its attempts, and webhooks hear how it ends this time, too. One that waits
        or runs is left as it is.

        Args:
            job_id: what `submit` returned.

        Returns:
            Its document.

        Raises:
            JobNotFailed: it succeeded, was canceled or expired: submit a new one.
            UnknownJob: the ledger has no such job.
            LedgerUnavailable: the ledger cannot be reached; the message says whether the job may be queued.
        """
        return run_blocking(self.calls.retry(job_id))

    def result(self, job_id: str, *, manifest_uri: str | None = None, expires_s: int = 3600) -> Result:
        """The result of a job that succeeded: its manifest, and a presigned URL for each artifact.

        A presigned URL grants access to that one object, so it can be put into a web page. The manifest is
        read with the settings `GRADCAM_S3_*`.

        Args:
            job_id: what `submit` returned.
            manifest_uri: where the manifest is, if you have stored it: the ledger forgets a job after a week.
                Never one from untrusted input.
            expires_s: how long the URLs are valid, in seconds, at most a week.

        Returns:
            Manifest, URLs and files. `heatmaps` and `save` read from the storage while they are called: with
            asyncio, call them in a thread, as in `await asyncio.to_thread(result.save, "explained")`.

        Raises:
            NoResult: the job has not succeeded, or there is no manifest of this job.
            UnknownJob: the ledger has no such job.
            StorageUnavailable: the manifest cannot be read.
            InvalidSettings: a storage setting or `expires_s` is invalid.
            LedgerUnavailable: the ledger cannot be reached.

        Examples:
            >>> result = client.result(job_id)
            >>> [(overlay.class_name, overlay.url) for overlay in result.overlays]
            >>> result.save("explained")
        """
        return run_blocking(self.calls.result(job_id, manifest_uri=manifest_uri, expires_s=expires_s))

    @overload
    def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[TopN],
    ) -> JobHandle: ...

    @overload
    def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[Classes],
    ) -> JobHandle: ...

    @overload
    def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[WithTarget],
    ) -> JobHandle: ...

    @naming_fields
    def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Any,
    ) -> JobHandle:
        """Upload an image, and submit a job for it.

        It is stored under its SHA-256, so the same bytes are stored once. Nothing is uploaded for an invalid
        job.

        Args:
            image: the path of a file of this machine, or its bytes.
            to: the URI below which it is stored, such as `s3://photos/uploads`; default: GRADCAM_UPLOADS.
            retry_failed: see `submit`.
            **fields: those of `submit`, without the image.

        Returns:
            As `submit`.

        Raises:
            ImageNotFound: the file cannot be read.
            ImageTooLarge: it has more bytes than GRADCAM_MAX_IMAGE_BYTES.
            StorageUnavailable: it cannot be stored.
            InvalidSettings: nothing says where it goes.
            InvalidJob, IdempotencyConflict, LedgerUnavailable: as `submit`.

        Examples:
            >>> job = client.upload_and_submit("pier.jpg", network="vgg16", top_n=5)
        """
        upload = self.calls.upload_and_submit(image, to=to, retry_failed=retry_failed, **fields)
        return JobHandle(run_blocking(upload), self)

    def list(self, **conditions: Unpack[ListConditions]) -> Iterator[StatusDocument]:
        """Jobs, newest first; they are read in pages, while they are taken.

        The ledger keeps a job for a week after its end (GRADCAM_RETENTION_S).

        Args:
            **conditions: all have to be fulfilled: `status`, `network`, `label` (one of the job's `metadata`,
                as `name=value`), `created_after` (a time with its zone).

        Returns:
            An iterator of their documents. Jobs that are submitted meanwhile do not disturb it.

        Raises:
            InvalidQuery: a condition is not what it should be.
            LedgerUnavailable: the ledger cannot be reached.

        Examples:
            >>> for document in client.list(status="failed", label="customer=42"):
            ...     client.retry(document.id)
        """
        return self._pages(JobQuery.of_all(**conditions))

    def _pages(self, query: JobQuery) -> Iterator[StatusDocument]:
        while True:
            page = self.list_page(query)
            yield from page.jobs
            if page.cursor is None:
                return
            query = query.model_copy(update={"cursor": page.cursor})

    def list_page(self, query: JobQuery) -> JobPage:
        """One page of `list`, for apps that show pages.

        Args:
            query: which jobs, how many, and the cursor of the page before.

        Returns:
            The jobs and the cursor of the next page. There may be fewer jobs than asked for, and a cursor.

        Raises:
            LedgerUnavailable: the ledger cannot be reached.

        Examples:
            >>> page = client.list_page(JobQuery(status="failed", limit=20))
            >>> client.list_page(JobQuery(status="failed", limit=20, cursor=page.cursor))
        """
        return run_blocking(self.calls.list_page(query))

    def networks(self) -> tuple[NetworkOffer, ...]:
        """The networks that live workers offer, by name.

        Returns:
            For each, its name, what its classes are, its input and target layer, and how many workers
            have it. A network of the catalog is offered where its weights are on the worker's machine; others
            may be downloaded when a job names them.

        Raises:
            LedgerUnavailable: the ledger cannot be reached, or does not let this user read its workers.

        Examples:
            >>> [network.name for network in client.networks()]
            ['efficientnet_lite0', 'vgg16']
        """
        return run_blocking(self.calls.live_workers()).networks

    def workers(self) -> tuple[WorkerReport, ...]:
        """The workers that live: they have reported within the last seconds.

        Returns:
            For each, what it computes on, how many jobs it runs, and what keeps it from taking any, if so.
            Empty: nobody would run a job just now. It would wait in the queue.

        Raises:
            LedgerUnavailable: the ledger cannot be reached, or does not let this user read its workers.

        Examples:
            >>> any(not worker.trouble for worker in client.workers())
            True
        """
        return run_blocking(self.calls.live_workers()).workers

    def submit_backfill(
        self,
        /,
        input: str,  # noqa: A002  # as the command calls it
        output: str,
        *,
        network: str,
        top_n: int | None = None,
        classes: Sequence[int | str] | None = None,
        method: MethodSpec | MethodName | dict[str, Any] | None = None,
        metrics: Sequence[Metric] | None = None,
        inputs: Mapping[str, float | str | Sequence[float]] | None = None,
        overlays: bool = False,
        resume: bool = True,
        **options: OptionValue,
    ) -> BackfillHandle:
        """Explain every image of a list, a folder or a prefix into one dataset.

        `gradcam backfill` runs it in a process beside this one, and ends with this one: what is done is kept.
        Submitted again, by this process or another one, it is continued; where it is complete, nothing is
        computed; where another process runs it, `wait` waits for that one, and continues it if it ends early.
        So a task of a scheduler may be killed and started again at any time. It needs the extra `backfill`.

        Args:
            input: A list (JSON Lines, CSV, Parquet, text) here or in a bucket, a folder, or a prefix.
            output: Where the dataset is written, as `s3://results/photos`.
            network: The classifier.
            top_n: Explain the n most probable classes of each image.
            classes: Explain these classes, in place of `top_n`.
            method: How the heatmap is computed.
            metrics: How well a heatmap explains the score.
            inputs: What the network takes beside each image.
            overlays: Also write an overlay image for each explanation.
            resume: Continue a backfill that the output holds; else that is refused.
            **options: Every other option of `gradcam backfill`, with _ in place of -, as `shard_rows=64`,
                `changed=True`, `input_column={"age": "patient_age"}`.

        Returns:
            Its output, which has the calls for this backfill: `wait`, `status`, `cancel`.

        Raises:
            InvalidJob: What is asked of each image is not possible, or there is no such option.
            InvalidInput: The input cannot be read.
            OutputNotAllowed: The dataset may not be there.
            BackfillConflict: The output holds another backfill, or the input has changed: `changed=True`.
            MissingExtra: The extra is not installed.
            LedgerUnavailable, StorageUnavailable: A server cannot be reached.

        Examples:
            >>> backfill = client.submit_backfill("s3://photos/", "s3://results/a", network="vgg16", top_n=3)
            >>> backfill.wait().failed
            0
        """
        fields = {
            "network": network,
            "top_n": top_n,
            "classes": classes,
            "method": method,
            "metrics": metrics,
            "inputs": inputs,
            "artifacts": ["overlay"] if overlays else None,
        }
        owner = self.calls.owner
        started = self.submitted_backfills.submit(input, output, fields, {"resume": resume, **options}, owner)
        return BackfillHandle(started, self)

    def backfill(self, output: str) -> BackfillHandle:
        """A handle of a backfill that was submitted elsewhere. No server is asked: there may be none.

        Args:
            output: The dataset that it writes.

        Returns:
            The output, with the calls for this backfill.

        Examples:
            >>> client.backfill("s3://results/photos").status().state
            'running'
        """
        return BackfillHandle(output.rstrip("/"), self)

    def backfill_status(self, output: str) -> BackfillStatus:
        """What is known about a backfill.

        Args:
            output: The dataset that it writes.

        Returns:
            Its state, its rows so far and how many of them have failed.

        Raises:
            OutputNotAllowed: The dataset may not be there.
            BackfillConflict: There is no backfill.
            LedgerUnavailable, StorageUnavailable: A server cannot be reached.
        """
        return self.submitted_backfills.status(output)

    def wait_for_backfill(self, output: str, timeout_s: float | None = None) -> BackfillStatus:
        """Wait until a dataset is complete, whichever process writes it.

        Args:
            output: The dataset.
            timeout_s: How long to wait, in seconds; None: for ever.

        Returns:
            Its status.

        Raises:
            WaitTimeout: It is not complete yet.
            BackfillStopped: It has ended before it was complete, or more rows failed than may.
            BackfillCanceled: It was cancelled.
            GradcamError: Whatever else it has ended with.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while isinstance(found := self.submitted_backfills.find_end(output), float):
            if end is not None and time.monotonic() >= end:
                raise WaitTimeout(still_running(output, timeout_s))
            time.sleep(found)
        return found

    def cancel_backfill(self, output: str) -> Cancellation:
        """Stop a backfill, on whichever machine it runs. What is done is kept.

        Args:
            output: The dataset that it writes.

        Returns:
            What has ended.

        Raises:
            OutputNotAllowed, BackfillConflict, LedgerUnavailable, StorageUnavailable: As `backfill_status`.
        """
        return self.submitted_backfills.cancel(output)

    def is_upload(self, uri: str, *others: str) -> bool:
        """Whether a URI lies below GRADCAM_UPLOADS, or below one of `others`.

        For apps that accept URIs from their users: workers can read more than these users may see.

        Args:
            uri: the URI from a user.
            *others: further URIs, such as `s3://photos/public`.

        Returns:
            Whether it does.
        """
        allowed = [root for root in (self._settings.uploads, *others) if root]
        return any(results.is_below(uri, root) for root in allowed)

    def wait(self, job_id: str, timeout_s: float = 120) -> StatusDocument:
        """Wait until a job is final, whichever way it ended.

        Args:
            job_id: what `submit` returned.
            timeout_s: how long to wait, in seconds.

        Returns:
            The final document: look at its `status`, and at `error` where it failed.

        Raises:
            WaitTimeout: the job is not final yet; the message says what workers and queues are doing.
            UnknownJob, LedgerUnavailable: as `stream`.

        Examples:
            >>> client.wait(job_id).status
            'succeeded'
        """
        *_, document = self.stream(job_id, timeout_s)
        return document

    def stream(self, job_id: str, timeout_s: float | None = None) -> Iterator[StatusDocument]:
        """The document of a job as it is, then each later one as it is written; the final one is the last.

        If several are written while the caller processes one, the caller gets the latest of them. An
        unreachable ledger is waited for up to a minute, and not beyond `timeout_s`.

        Args:
            job_id: what `submit` returned.
            timeout_s: how long to wait for the final one, in seconds; None: for ever.

        Returns:
            An iterator of documents.

        Raises:
            WaitTimeout: the job is not final yet.
            UnknownJob: the ledger has no such job.
            LedgerUnavailable: the ledger stayed unreachable, or the client was closed.

        Examples:
            >>> for document in client.stream(job_id):
            ...     print(document.status, document.stage)
        """
        return self.waiter.stream(job_id, timeout_s, self.calls.owner)

    def as_tenant(self, tenant: Tenant | None) -> Self:
        """The client of one tenant: it submits jobs of this tenant, and finds no other ones.

        For servers that have many users. It shares the connections of this client, and is made for each
        request; closing one closes all.

        Args:
            tenant: the tenant; None: nobody, who finds the jobs of all.

        Returns:
            The client.
        """
        client = copy(self)
        client.calls = self.calls.as_tenant(tenant)
        return client

    def close(self) -> None:
        """Close every connection: waits end with LedgerUnavailable. Used again, the client connects again.

        Backfills that it has submitted end; what is done is kept.
        """
        self.submitted_backfills.close()
        self.waiter.close()
        run_blocking(self.calls.close())

    def __enter__(self) -> Self:
        """Nothing is connected yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()
