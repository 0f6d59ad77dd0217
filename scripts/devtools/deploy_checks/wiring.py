"""Whether the objects of the chart find each other: what no schema says, since each is right by itself.

A Service its pods, an address its Service, a policy its ports, a mount its volume, a setting its file.
A container that writes has a writable volume, a node can be drained, and names are as long as they may be.
"""

import re
from collections.abc import Iterator
from typing import Any

Document = dict[str, Any]
WRITTEN = ("/cache", "/tmp")  # noqa: S108  # all that the images write to
FILES = "/etc/gradcam"
URL = re.compile(r"http://([a-z0-9-]+)(?:\.([a-z0-9-]+)\.svc)?:([0-9]+)")
DNS = 53
NAMESPACE = "vision"  # that the chart is rendered for
OURS = {"worker", "deliver", "gateway", "networks", "backfill"}  # the components with an image of ours
MEASURED = {"worker", "deliver", "gateway"}  # those that serve metrics
# Kubernetes adds to a name what makes a label of its pods, and a label has 63 characters.
MAX_LABEL = 63
MAX_NAME = {"StatefulSet": 52, "CronJob": 52}


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    """The objects of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def findings(documents: list[Document]) -> Iterator[str]:
    """What does not fit together, in all that a template made."""
    pods = [document["spec"]["template"] for document in workloads(documents)]
    ours = [pod for pod in pods if _component(pod) in OURS]
    for document in documents:
        yield from _name(document)
    for service in of_kind(documents, "Service"):
        yield from _service(service, pods)
    for document in of_kind(documents, "ScaledObject", "ConfigMap"):
        yield from _addresses(document, documents)
    for policy in of_kind(documents, "NetworkPolicy"):
        yield from _policy(policy, pods)
    for monitor in of_kind(documents, "PodMonitor", "ServiceMonitor"):
        yield from _monitor(monitor, pods, of_kind(documents, "Service"))
    for route in of_kind(documents, "Ingress", "HTTPRoute"):
        yield from _route(route, of_kind(documents, "Service"))
    for budget in of_kind(documents, "PodDisruptionBudget"):
        yield from _budget(budget)
    for pod in ours:
        yield from (f"{_component(pod)}: {finding}" for finding in _mounts(pod, documents))


def _budget(budget: Document) -> Iterator[str]:
    if "maxUnavailable" not in budget["spec"]:
        yield "the PodDisruptionBudget lets no node be drained that has the only worker"
    elif budget["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
        yield "a pod that never becomes ready keeps its node from being drained"


def workloads(documents: list[Document]) -> list[Document]:
    """What makes pods; of a CronJob, the Job that it makes."""
    made = of_kind(documents, "Deployment", "StatefulSet", "Job")
    for cron in of_kind(documents, "CronJob"):
        made.append({**cron["spec"]["jobTemplate"], "kind": "Job", "metadata": cron["metadata"]})
    return made


def _name(document: Document) -> Iterator[str]:
    kind, name = document["kind"], document["metadata"]["name"]
    most = MAX_NAME.get(kind, MAX_LABEL)
    if len(name) > most or not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name):
        yield f"{kind} {name} has {len(name)} characters: {most} are allowed, a-z, 0-9 and - between them"


def _monitor(monitor: Document, pods: list[Document], services: list[Document]) -> Iterator[str]:
    kind, spec = monitor["kind"], monitor["spec"]
    if kind == "PodMonitor":
        measured = {_component(pod): {*_ports(pod)} for pod in selected(spec["selector"], pods)}
        asked = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
    else:
        chosen = selected(spec["selector"], services)
        measured = {_component(its): {port["name"] for port in its["spec"]["ports"]} for its in chosen}
        asked = {endpoint["port"] for endpoint in spec["endpoints"]}
    there = MEASURED & {_component(pod) for pod in pods}
    if missing := there - {name for name, ports in measured.items() if asked <= ports}:
        yield f"the {kind} does not find {', '.join(sorted(missing))} at {', '.join(asked)}"


def _route(route: Document, services: list[Document]) -> Iterator[str]:
    """Whether what leads in leads to a Service."""
    known = {
        (its["metadata"]["name"], port[key])
        for its in services
        for port in its["spec"]["ports"]
        for key in ("name", "port")
        if key in port
    }
    if route["kind"] == "Ingress":
        backends = [
            path["backend"]["service"] for rule in route["spec"]["rules"] for path in rule["http"]["paths"]
        ]
        named = [(backend["name"], next(iter(backend["port"].values()))) for backend in backends]
    else:
        named = [(ref["name"], ref["port"]) for rule in route["spec"]["rules"] for ref in rule["backendRefs"]]
    for name, port in named:
        if (name, port) not in known:
            yield f"{route['kind']} leads to {name}:{port}, which is no Service"


def _component(pod: Document) -> str:
    return str(pod["metadata"]["labels"]["app.kubernetes.io/component"])


def _ports(pod: Document) -> dict[str, int]:
    """Name -> number."""
    containers = pod["spec"]["containers"]
    return {
        port["name"]: port["containerPort"] for container in containers for port in container.get("ports", [])
    }


def selected(selector: Document, pods: list[Document]) -> list[Document]:
    """The pods that a selector means."""
    wanted = {name: [value] for name, value in selector.get("matchLabels", {}).items()}
    wanted |= {rule["key"]: rule["values"] for rule in selector.get("matchExpressions", [])}
    labels = [(pod, pod["metadata"]["labels"]) for pod in pods]
    return [pod for pod, its in labels if all(its.get(name) in values for name, values in wanted.items())]


def _service(service: Document, pods: list[Document]) -> Iterator[str]:
    name, spec = service["metadata"]["name"], service["spec"]
    chosen = selected({"matchLabels": spec["selector"]}, pods)
    if [f"-{_component(pod)}" for pod in chosen] != [name[name.rindex("-") :]]:
        yield f"Service {name} leads to {[_component(pod) for pod in chosen]}"
    for pod, port in ((pod, port) for pod in chosen for port in spec["ports"]):
        if _ports(pod).get(port["targetPort"]) != port["port"]:
            yield f"Service {name}: its pods do not listen at {port}"


def _addresses(document: Document, documents: list[Document]) -> Iterator[str]:
    """Whether what it names by `http://` is a Service here."""
    services = of_kind(documents, "Service")
    known = {(its["metadata"]["name"], port["port"]) for its in services for port in its["spec"]["ports"]}
    texts = [trigger["metadata"]["url"] for trigger in document.get("spec", {}).get("triggers", [])]
    texts += [document.get("data", {}).get("GRADCAM_S3_ENDPOINT_URL", "")]
    for host, namespace, port in URL.findall(" ".join(texts)):
        if (host, int(port)) not in known or namespace not in {"", NAMESPACE}:
            yield f"{document['kind']} names {host}:{port} in {namespace or NAMESPACE}, which is no Service"


def _policy(policy: Document, pods: list[Document]) -> Iterator[str]:
    name, spec = policy["metadata"]["name"], policy["spec"]
    chosen = selected(spec["podSelector"], pods)
    if not chosen:
        yield f"NetworkPolicy {name} is for no pod"
    ports = [port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]]
    listened = {one for pod in chosen for pair in _ports(pod).items() for one in pair}
    for port in {*ports} - listened:
        yield f"NetworkPolicy {name} lets in at {port}, where none of its pods listens"
    if "egress" in spec:
        others = [pod for pod in pods if pod not in chosen]
        for place in _closed(spec["egress"], others):
            yield f"NetworkPolicy {name} lets nothing out to {place}"


def _closed(egress: list[Document], pods: list[Document]) -> Iterator[str]:
    """Which of the DNS and of these pods cannot be reached."""
    protocols = {port.get("protocol") for rule in egress for port in rule["ports"] if port["port"] == DNS}
    if not {"TCP", "UDP"} <= protocols:
        yield "the DNS"
    for pod in pods:
        open_ports = {
            port["port"]
            for rule in egress
            for peer in rule.get("to", [])
            if "podSelector" in peer and pod in selected(peer["podSelector"], pods)
            for port in rule["ports"]
        }
        if not open_ports & {*_ports(pod).values()}:
            yield _component(pod)


def _mounts(pod: Document, documents: list[Document]) -> Iterator[str]:
    """Whether there is a place for what is written, and what is read is there."""
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    for path, mount in mounts.items():
        if mount["name"] not in volumes:
            yield f"{path} is of a volume {mount['name']}, which there is not"
    for path in WRITTEN:
        if path not in mounts or mounts[path].get("readOnly"):
            yield f"{path} cannot be written to"
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(documents, "ConfigMap")}
    sources = [source["configMap"] for source in volumes[mounts[FILES]["name"]]["projected"]["sources"]]
    files = {item["path"] for source in sources for item in source.get("items", [])}
    files |= {key for source in sources for key in maps.get(source["name"], {})}
    names = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    for name, value in (pair for map_name in names for pair in maps.get(map_name, {}).items()):
        folder, _, file = str(value).rpartition("/")
        if folder == FILES and file not in files:
            yield f"{name} is {value}, and {FILES} holds {sorted(files)}"
    if not any("secretRef" in source for source in container["envFrom"]):
        yield "it gets no Secret, and so no GRADCAM_BROKER_URL"
