"""Every URL of `ssrf_urls`, as the image and as the webhook of a job, while this machine listens.

The lists of allowed hosts name whatever can be named: only the addresses are left to be refused.
"""

import contextlib
import socket
import socketserver
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
# A name that leads nowhere cannot be distinguished from one that leads nowhere just now.
NOWHERE = "image_fetch_failed"


class _Handler(socketserver.BaseRequestHandler):
    """Notes that somebody has connected."""

    def handle(self) -> None:
        self.server.connections.append(str(self.client_address))  # type: ignore[attr-defined]


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, connections: list[str]) -> None:
        self.connections = connections
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


@contextlib.contextmanager
def listening() -> Iterator[tuple[int, list[str]]]:
    """Listen at one port of this machine, over IPv4 and, where available, IPv6; yield it and who connects."""
    connections: list[str] = []
    with contextlib.ExitStack() as stack:
        port = 0
        for host in ("127.0.0.1", "127.255.255.254", "::1"):
            with contextlib.suppress(OSError):
                server = stack.enter_context(_Server(host, port, connections))
                port = server.server_address[1]
                threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
                stack.callback(server.shutdown)
        yield port, connections


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
    with listening() as (port, connections):
        lists: dict[str, Any] = {
            "image_schemes": ("s3", "http", "https"),
            "image_hosts": permissive_hosts(port),
            "webhook_hosts": permissive_hosts(port),
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

            urls = [url for _ in range(count) for url, _ in forbidden_urls(port)]
            for number, url in enumerate(urls):
                fetched = one(2 * number, image=url)
                notified = one(2 * number + 1, webhooks=[{"url": url}])
                refused_at_once += (fetched is None) + (notified is None)
                if notified:
                    of_webhooks.add(notified.id)
            observer.drain(DRAINS_S)
            wait_for(lambda: not _untried(cluster), DRAINS_S, "every webhook is tried")
            # A webhook's address that cannot be refused by its text is refused when it is dialled.
            verdict = observer.verdict(
                faults=2 * len(urls),
                expected=lambda job_id: REFUSED | {"succeeded" if job_id in of_webhooks else NOWHERE},
            )
            ends = Counter(end_of(document) for document in observer.documents().values() if document)
    if connections:
        verdict.broken.append(f"{len(connections)} connections reached this machine, from {connections[0]}.")
    verdict.figures |= {
        "connections": len(connections),
        "refused_by_the_client": refused_at_once,
        "ends": dict(sorted(ends.items())),
    }
    return verdict
