"""Whether the objects of the chart find each other: what no schema says, since each is right by itself.

A Service its pods, an address its Service, a policy its ports, a mount its volume, a setting its file.
A container that writes has a writable volume, and a node can be drained.
"""

import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]
WRITTEN = ("/cache", "/tmp")  # noqa: S108  # all that the images write to
FILES = "/etc/gradcam"
URL = re.compile(r"http://([a-z0-9-]+)(?:\.([a-z0-9-]+)\.svc)?:([0-9]+)")
DNS = 53
NAMESPACE = "vision"  # see `check_helm.template`


def findings(documents: list[Document]) -> Iterator[str]:
    """What does not fit together, in all that a template made."""
    pods = [one["spec"]["template"] for one in documents if one["kind"] in {"Deployment", "StatefulSet"}]
    ours = [pod for pod in pods if _component(pod) in {"worker", "deliver"}]
    for one in documents:
        if one["kind"] == "Service":
            yield from _service(one, pods)
        elif one["kind"] in {"ScaledObject", "ConfigMap"}:
            yield from _addresses(one, documents)
        elif one["kind"] == "NetworkPolicy":
            yield from _policy(one, pods)
        elif one["kind"] == "PodMonitor":
            for asked in one["spec"]["podMetricsEndpoints"]:
                if any(asked["port"] not in _ports(pod) for pod in ours):
                    yield f"the PodMonitor asks at {asked['port']}, which not all pods have"
        elif one["kind"] == "PodDisruptionBudget" and "maxUnavailable" not in one["spec"]:
            yield "the PodDisruptionBudget lets no node be drained that has the only worker"
    for pod in ours:
        yield from (f"{_component(pod)}: {said}" for said in _mounts(pod, documents))


def _component(pod: Document) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def _ports(pod: Document) -> dict[str, int]:
    """Name -> number."""
    return {port["name"]: port["containerPort"] for one in pod["spec"]["containers"] for port in one["ports"]}


def _selected(selector: Document, pods: list[Document]) -> list[Document]:
    """The pods that a selector means."""
    wanted = {name: [value] for name, value in selector.get("matchLabels", {}).items()}
    wanted |= {one["key"]: one["values"] for one in selector.get("matchExpressions", [])}
    labels = [(pod, pod["metadata"]["labels"]) for pod in pods]
    return [pod for pod, said in labels if all(said.get(name) in values for name, values in wanted.items())]


def _service(service: Document, pods: list[Document]) -> Iterator[str]:
    name, spec = service["metadata"]["name"], service["spec"]
    chosen = _selected({"matchLabels": spec["selector"]}, pods)
    if [f"-{_component(pod)}" for pod in chosen] != [name[name.rindex("-") :]]:
        yield f"Service {name} leads to {[_component(pod) for pod in chosen]}"
    for pod in chosen:
        for port in spec["ports"]:
            if _ports(pod).get(port["targetPort"]) != port["port"]:
                yield f"Service {name}: its pods do not listen at {port}"


def _addresses(document: Document, documents: list[Document]) -> Iterator[str]:
    """Whether what it names by `http://` is a Service here."""
    there = {
        (one["metadata"]["name"], port["port"])
        for one in documents
        if one["kind"] == "Service"
        for port in one["spec"]["ports"]
    }
    texts = [trigger["metadata"]["url"] for trigger in document.get("spec", {}).get("triggers", [])]
    texts += [document.get("data", {}).get("GRADCAM_S3_ENDPOINT_URL", "")]
    for host, namespace, port in URL.findall(" ".join(texts)):
        if (host, int(port)) not in there or namespace not in {"", NAMESPACE}:
            yield f"{document['kind']} names {host}:{port} in {namespace or NAMESPACE}, which is no Service"


def _policy(policy: Document, pods: list[Document]) -> Iterator[str]:
    name, spec = policy["metadata"]["name"], policy["spec"]
    chosen = _selected(spec["podSelector"], pods)
    if not chosen:
        yield f"NetworkPolicy {name} is for no pod"
    for way in spec.get("ingress", []):
        for port, pod in ((port["port"], pod) for port in way["ports"] for pod in chosen):
            if port not in {*_ports(pod), *_ports(pod).values()}:
                yield f"NetworkPolicy {name} lets in at {port}, where {_component(pod)} does not listen"
    if "egress" in spec:
        others = [pod for pod in pods if pod not in chosen]
        yield from (
            f"NetworkPolicy {name} lets nothing out to {one}" for one in _closed(spec["egress"], others)
        )


def _closed(egress: list[Document], pods: list[Document]) -> Iterator[str]:
    """Which of the DNS and of these pods cannot be reached."""
    out = [(way.get("to", []), port) for way in egress for port in way["ports"]]
    asked = {port.get("protocol") for _, port in out if port["port"] == DNS}
    if not {"TCP", "UDP"} <= asked:
        yield "the DNS"
    for pod in pods:
        there = {
            port["port"]
            for places, port in out
            for one in places
            if pod in _selected(one.get("podSelector", {}), pods) and "podSelector" in one
        }
        if not there & {*_ports(pod).values()}:
            yield _component(pod)


def _mounts(pod: Document, documents: list[Document]) -> Iterator[str]:
    """Whether there is a place for what is written, and what is read is there."""
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    volumes = {one["name"]: one for one in spec["volumes"]}
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    for path, mount in mounts.items():
        if mount["name"] not in volumes:
            yield f"{path} is of a volume {mount['name']}, which there is not"
    for path in WRITTEN:
        if path not in mounts or mounts[path].get("readOnly"):
            yield f"{path} cannot be written to"
    maps = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    sources = volumes[mounts[FILES]["name"]]["projected"]["sources"]
    files = {item["path"] for one in sources for item in one["configMap"].get("items", [])}
    files |= {key for one in sources for key in maps.get(one["configMap"]["name"], {})}
    names = [one["configMapRef"]["name"] for one in container["envFrom"] if "configMapRef" in one]
    for name, value in (pair for one in names for pair in maps[one].items()):
        folder, _, file = str(value).rpartition("/")
        if folder == FILES and file not in files:
            yield f"{name} is {value}, and {FILES} holds {sorted(files)}"
    if not any("secretRef" in one for one in container["envFrom"]):
        yield "it gets no Secret, and so no GRADCAM_BROKER_URL"
