"""Every URL of `ssrf_urls`, as the image and as the webhook of a job, while this machine listens.

The lists of allowed hosts name whatever can be named: only the addresses are left to be refused.
"""

import contextlib
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.ssrf_urls import forbidden_urls, permissive_hosts
from devtools.faults.verdict import Verdict
from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.job import Job

DRAINS_S = 120.0
REFUSED = frozenset({"uri_not_allowed", "invalid_job"})
# A name that leads nowhere cannot be told from one that leads nowhere just now.
NOWHERE = "image_fetch_failed"


class Inside:
    """Listens at one port of this machine, over IPv4 and, where there is one, IPv6; counts who comes."""

    def __init__(self) -> None:
        """It listens from now on."""
        self.came: list[str] = []
        self._ended = threading.Event()
        self._listeners = [socket.create_server(("127.0.0.1", 0))]
        self.port = int(self._listeners[0].getsockname()[1])
        for host, family in (("127.255.255.254", socket.AF_INET), ("::1", socket.AF_INET6)):
            with contextlib.suppress(OSError):
                self._listeners.append(socket.create_server((host, self.port), family=family))
        self._thread = threading.Thread(target=self._accept, name="inside", daemon=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator["Inside"]:
        """Until the block is left."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()
            for one in self._listeners:
                one.close()

    def _accept(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for one in self._listeners:
                waiting.register(one, selectors.EVENT_READ, one)
            while not self._ended.is_set():
                for key, _ in waiting.select(0.1):
                    client, address = key.data.accept()
                    client.close()
                    self.came.append(str(address))


def _untried(cluster: Cluster) -> set[str]:
    """Recipients of webhooks to which no delivery has been tried to its end."""
    prefix = cluster.settings.key_prefix
    with cluster.ledger as server:
        known = {key.removeprefix(f"{prefix}events:") for key in server.scan_iter(f"{prefix}events:*")}
        members: Any = server.zrange(f"{prefix}parked", 0, -1)
        parked = {member.partition(" ")[0] for member in members}
        tried: Any = server.hkeys(f"{prefix}tries")
        return known - parked - set(tried)


def attack(count: int, seed: int) -> Verdict:
    """Try each URL `count` times."""
    with Inside().listening() as inside:
        lists: dict[str, Any] = {
            "image_schemes": ("s3", "http", "https"),
            "image_hosts": permissive_hosts(inside.port),
            "webhook_hosts": permissive_hosts(inside.port),
            "private_networks": (),
            "fetch_timeout_s": 5,
        }
        of_webhooks: set[str] = set()
        refused_at_once = 0
        with running_cluster("addresses", seed, **lists) as cluster, JobObserver(cluster) as observer:
            cluster.work()

            def one(number: int, **changes: Any) -> Job | None:
                with contextlib.suppress(InvalidJob):
                    job = cluster.job(number, max_attempts=1, **changes)
                    cluster.submit(job)
                    return job
                return None

            urls = [url for _ in range(count) for url, _ in forbidden_urls(inside.port)]
            for number, url in enumerate(urls):
                fetched = one(2 * number, image=url)
                notified = one(2 * number + 1, webhooks=[{"url": url}])
                refused_at_once += (fetched is None) + (notified is None)
                if notified:
                    of_webhooks.add(notified.id)
            observer.drain(DRAINS_S)
            wait_for(lambda: not _untried(cluster), DRAINS_S, "every webhook is tried")
            # A webhook's address that cannot be refused by its look alone is refused when it is dialled.
            verdict = observer.verdict(
                faults=2 * len(urls),
                expected=lambda job_id: REFUSED | {"succeeded" if job_id in of_webhooks else NOWHERE},
            )
            ends = Counter(end_of(document) for document in observer.documents().values() if document)
    if inside.came:
        verdict.broken.append(f"{len(inside.came)} connections reached the inside, from {inside.came[0]}.")
    verdict.figures |= {
        "connections": len(inside.came),
        "refused_by_the_client": refused_at_once,
        "ends": dict(sorted(ends.items())),
    }
    return verdict
