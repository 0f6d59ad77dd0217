"""What the chart's NetworkPolicies let out: a small evaluator, and what each preset of the values must open.

As Kubernetes has it: a pod that no policy for egress selects may send anything; else what one rule of one of
them allows. A rule without `to` or without `ports` allows any. Ranges of ports are not used here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from devtools.deploy_checks.wiring import Document, of_kind, selected


@dataclass(frozen=True)
class Target:
    """Where a pod sends something: an address outside of the cluster's pods, or a pod of a namespace."""

    port: int
    address: str = ""
    namespace: str = ""
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{self.address or self.namespace}:{self.port}/{self.protocol}"


METADATA = Target(80, "169.254.169.254")
OPENED = {  # values, as `helm --set` takes them: what they must open, which is closed without them
    "networkPolicy.dns={node-local}": [Target(53, "169.254.20.10", protocol=one) for one in ("UDP", "TCP")],
    "networkPolicy.dns={openshift}": [
        Target(port, namespace="openshift-dns", protocol=one) for one in ("UDP", "TCP") for port in (53, 5353)
    ],
    "networkPolicy.dnsAddresses={10.96.0.10/32}": [Target(53, "10.96.0.10", protocol="UDP")],
    "networkPolicy.dns=null,networkPolicy.dnsAddresses={10.96.0.11/32}": [Target(53, "10.96.0.11")],
    "networkPolicy.identity={instance-metadata}": [METADATA, Target(80, "fd00:ec2::254")],
    "networkPolicy.identity={eks-pod-identity}": [Target(80, "169.254.170.23"), Target(80, "fd00:ec2::23")],
    "networkPolicy.identity={gke-metadata}": [METADATA, Target(988, "169.254.169.252")],
    "networkPolicy.privateEndpoints={10.0.12.0/24}": [Target(443, "10.0.12.7")],
}
ALWAYS = [  # with the default values
    Target(53, namespace="kube-system", protocol="UDP"),
    Target(53, namespace="kube-system"),
    Target(443, "52.216.1.1"),  # an S3 of the Internet
    Target(443, "2600:1fa0::1"),
]
NEVER = [  # whatever preset is chosen
    Target(6443, "10.0.12.7"),
    Target(443, "10.0.13.7"),
    Target(22, "52.216.1.1"),
    Target(80, "169.254.170.2"),
    Target(5353, namespace="kube-system", protocol="UDP"),
]


def allowed(documents: list[Document], pod: Document, target: Target) -> bool:
    """Whether a pod of a template may send something to a target."""
    policies = [one for one in of_kind(documents, "NetworkPolicy") if "Egress" in one["spec"]["policyTypes"]]
    rules = [
        one["spec"].get("egress") or [] for one in policies if selected(one["spec"]["podSelector"], [pod])
    ]
    return not rules or any(_opens(rule, target) for of_policy in rules for rule in of_policy)


def _opens(rule: Document, target: Target) -> bool:
    ports = rule.get("ports")
    by_port = not ports or any(
        one.get("port", target.port) == target.port and one.get("protocol", "TCP") == target.protocol
        for one in ports
    )
    return by_port and (not rule.get("to") or any(_is_peer(peer, target) for peer in rule["to"]))


def _is_peer(peer: Document, target: Target) -> bool:
    if block := peer.get("ipBlock"):
        return bool(target.address) and _within(block, target.address)
    named = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name")
    return bool(target.namespace) and named == target.namespace and "podSelector" not in peer


def _within(block: Document, address: str) -> bool:
    its = ip_address(address)
    return its in ip_network(block["cidr"]) and not any(
        its in ip_network(hole) for hole in block.get("except", [])
    )


def findings(plain: list[Document], opened: Mapping[str, tuple[list[Document], str]]) -> Iterator[str]:
    """Yield what a preset does not open, or opens though it is not its own.

    Args:
        plain: What the chart makes of the default values.
        opened: What it makes of each of OPENED, and errors.
    """
    yield from (f"a worker cannot reach {target}" for target in ALWAYS if not _from_worker(plain, target))
    for values, (documents, errors) in opened.items():
        if errors:
            yield f"{values}: {errors}"
            continue
        targets = OPENED[values]
        yield from (f"{values} does not open {one}" for one in targets if not _from_worker(documents, one))
        yield from (f"{one} is open without {values}" for one in targets if _from_worker(plain, one))
        yield from (f"{values} opens {one}" for one in NEVER if _from_worker(documents, one))


def _from_worker(documents: list[Document], target: Target) -> bool:
    pods = [one["spec"]["template"] for one in of_kind(documents, "Deployment")]
    (worker,) = (pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "worker")
    return allowed(documents, worker, target)
