"""The Helm chart, checked as far as possible without a cluster.

For each file of values in deploy/helm/gradcam/ci: `helm lint --strict`, `helm template`, Kubernetes' own
schemas, those of KEDA and the Prometheus operator (deploy/helm/schemas), and what no schema says: who runs
as whom, which settings there are, that a pod has longer to end than its worker, that the scaler's formula
is `scaling.Scaler.formula`. Then values that must be refused, and what Kubernetes says of each release's
Services in the environment of whatever else runs in its namespace: settings must pass over it.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from devtools import ROOT
from devtools.deploy_checks import tools, wiring
from devtools.deploy_checks.scaling import Scaler
from gradcam_worker.errors import InvalidSettings
from gradcam_worker.runtime import supervisor
from gradcam_worker.schemas.work import ROUTE, ROUTES
from gradcam_worker.settings import Settings

CHART = ROOT / "deploy" / "helm" / "gradcam"
SCHEMAS = {
    "ScaledObject": "keda-scaledobject.json",
    "PodMonitor": "podmonitor.json",
    "PrometheusRule": "prometheusrule.json",
}
ALERTS = ROOT / "deploy" / "alerts" / "gradcam.rules.yaml"
PORT = 9464
USER = 10001  # of the images, docker/Dockerfile
# They come from the Secret: no ConfigMap may hold them ...
SECRET = {"broker_url", "ledger_url", "s3_access_key_id", "s3_secret_access_key"}
SECRET |= {"status_sql_url", "traces", "webhook_secrets"}
# ... and these from the chart, or from a supervisor.
OWN = {"cache_dir", "devices", "metrics_host", "metrics_port", "networks", "redis_ca", "starts"}
# Values that must be refused, as `--set` takes them -> what has to be in the message.
REFUSED = {
    "settings.treads=4": "treads",
    "settings.threads=0": "threads",
    "settings.lease_s=0.5": "lease_s",
    "settings.precision=float16": "precision",
    "settings.image_schemes=s3": "image_schemes",
    "settings.broker_url=redis://a": "broker_url",
    "secret.existingSecret=": "GRADCAM_BROKER_URL",
    "worker.device=tpu": "device",
    "worker.replicas=-1": "replicas",
    "worker.gpus=2": "gpus",
    "env.GRADCAM_THREADS=4": "GRADCAM_THREADS",
    "redis.enabled=true": "users.acl",
    "redis.image=valkey": "image",
    "s3.enabled=true": "RCLONE_AUTH_KEY",
    "networkPolicy.egress=null": "networkPolicy.egress",
    "keda.enabled=true,keda.minReplicas=9": "keda.maxReplicas",
    "keda.drainSeconds=0": "drainSeconds",
    "monitoring.prometheusRule.enabled=true": "--set-file",
    "nonsense=1": "nonsense",
}
RELEASES = ("gradcam", "gradcam-prod", "x")  # as people call them: the first two begin as settings do
Document = dict[str, Any]


def chart_findings() -> list[str]:
    """Return what is wrong with the chart. Raises tools.Missing."""
    found = list(stale())
    for values in sorted((CHART / "ci").glob("*.yaml")):
        lint = tools.run("helm", "lint", "--strict", CHART, "-f", values)
        if lint.returncode or "WARNING" in lint.stdout + lint.stderr:
            found.append(f"{values.name}: helm lint: {lint.stdout} {lint.stderr}")
        text, errors = template(values)
        if errors:
            found.append(f"{values.name}: helm template: {errors}")
            continue
        documents = parsed(text)
        found += [f"{values.name}: {finding}" for finding in (*checked(documents), *findings(documents))]
    return [*found, *(one for release in RELEASES for one in released(release)), *refused()]


def template(values: Path, *sets: str, release: str = "rehearsal") -> tuple[str, str]:
    """Run `helm template`, with the alerts given as an operator would give them; return output and errors."""
    words: list[str | Path] = ["template", release, CHART, "--namespace", "vision", "-f", values]
    if not sets:
        words += ["--set-file", f"monitoring.prometheusRule.rules={ALERTS}"]
    for one in sets:
        words += ["--set", one]
    done = tools.run("helm", *words)
    return done.stdout, done.stderr or ("it failed" if done.returncode else "")


def parsed(text: str) -> list[Document]:
    """The objects that a template made."""
    return [one for one in yaml.safe_load_all(text) if one]


def checked(documents: list[Document]) -> Iterator[str]:
    """Yield what the schemas do not allow: Kubernetes' strictly, and ours for custom resources."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.yaml"
        file.write_text(yaml.safe_dump_all(one for one in documents if one["kind"] not in SCHEMAS))
        done = tools.run("kubernetes-validate", "--strict", "--quiet", file)
        if done.returncode or (done.stdout + done.stderr).strip():
            yield f"kubernetes-validate: {done.stdout} {done.stderr}"
        for one in documents:
            if schema := SCHEMAS.get(one["kind"]):
                file.write_text(yaml.safe_dump(one))
                yield from tools.findings(
                    "check-jsonschema", "--schemafile", CHART.parent / "schemas" / schema, file
                )


def refused() -> Iterator[str]:
    """Yield values that should be refused and are not, or in a message that does not name them."""
    for values, word in REFUSED.items():
        _, errors = template(CHART / "ci" / "cpu.yaml", *values.split(","))
        if not errors:
            yield f"--set {values} is not refused."
        elif word not in errors:
            yield f"--set {values} is refused without {word!r}: {errors}"


def released(release: str) -> Iterator[str]:
    """What is wrong with the chart under the name of a release, with all that it can bring."""
    text, errors = template(CHART / "ci" / "everything.yaml", release=release)
    if errors:
        yield f"release {release}: helm template: {errors}"
        return
    documents = parsed(text)
    yield from (f"release {release}: {one}" for one in (*findings(documents), *injected(documents)))


def injected(documents: list[Document]) -> Iterator[str]:
    """What settings make of the Services of a namespace, as its other pods see them in their environment."""
    for service in (one for one in documents if one["kind"] == "Service"):
        links = service_links(service["metadata"]["name"], service["spec"]["ports"])
        try:
            read = Settings.from_environment(links)
        except InvalidSettings as error:
            yield f"Service {service['metadata']['name']}: {error}"
            continue
        if read != Settings():
            yield f"Service {service['metadata']['name']} changes settings"


def service_links(service: str, ports: list[Document]) -> dict[str, str]:
    """What Kubernetes sets for a Service in the pods of its namespace (`enableServiceLinks`)."""
    name, address = service.upper().replace("-", "_"), "10.96.0.7"
    first = ports[0]
    found = {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(first["port"]),
        f"{name}_PORT": f"tcp://{address}:{first['port']}",
    }
    for port in ports:
        protocol = port.get("protocol", "TCP")
        link = f"{name}_PORT_{port['port']}_{protocol}"
        found[link] = f"{protocol.lower()}://{address}:{port['port']}"
        found |= {
            f"{link}_PROTO": protocol.lower(),
            f"{link}_PORT": str(port["port"]),
            f"{link}_ADDR": address,
        }
        if "name" in port:
            found[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    return found


def findings(documents: list[Document]) -> Iterator[str]:
    """What no schema says."""
    yield from wiring.findings(documents)
    for one in documents:
        if one["kind"] in {"Deployment", "StatefulSet"}:
            yield from _pod(one)
        elif one["kind"] == "ScaledObject":
            yield from _scaler(one, documents)
    by_name = {(one["kind"], one["metadata"]["name"]): one for one in documents}
    (worker,) = [name for kind, name in by_name if kind == "Deployment" and name.endswith("-worker")]
    release = worker.removesuffix("-worker")
    settings = by_name["ConfigMap", release]["data"]
    given = {name: str(value) for name, value in settings.items() if name.startswith("GRADCAM_")}
    # The file's folder is there in a pod, and not here.
    variables = {**given, "GRADCAM_BROKER_URL": "redis://somewhere:6379/0", "GRADCAM_REDIS_CA": ""}
    read = Settings.from_environment(variables)  # raises InvalidSettings where the worker would
    grace = _spec(by_name["Deployment", worker])["terminationGracePeriodSeconds"]
    if grace < read.shutdown_timeout_s + supervisor.REQUEUE_TIMEOUT_S:
        yield f"a worker that needs {read.shutdown_timeout_s:g} s to end is killed after {grace} s"
    denying = by_name.get(("NetworkPolicy", release), {}).get("spec", {})
    if set(denying) != {"podSelector", "policyTypes"} or len(denying["policyTypes"]) != len(("in", "out")):
        yield "no NetworkPolicy denies what the others do not allow"


def _spec(document: Document) -> Document:
    spec: Document = document["spec"]["template"]["spec"]
    return spec


def _pod(document: Document) -> Iterator[str]:
    name, spec = document["metadata"]["name"], _spec(document)
    user = spec["securityContext"]
    wrongs = [
        (
            not user["runAsNonRoot"] or user["seccompProfile"] != {"type": "RuntimeDefault"},
            "may run as root, or without seccomp",
        ),
        (spec["automountServiceAccountToken"], "has a token for the cluster"),
        (
            spec.get("enableServiceLinks", True),
            "gets the Services of its namespace as variables (enableServiceLinks)",
        ),
    ]
    yield from (f"{name} {said}" for wrong, said in wrongs if wrong)
    ours = name.endswith(("-worker", "-deliver"))
    if ours and user["runAsUser"] != USER:
        yield f"{name} runs as {user['runAsUser']}, and the image's user is {USER}"
    for one in [*spec["containers"], *spec.get("initContainers", [])]:
        rights = one["securityContext"]
        if rights != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            yield f"{name}/{one['name']} has rights that it needs not: {rights}"
        if ":" not in one["image"] or one["image"].endswith(":latest"):
            yield f"{name}/{one['name']}: {one['image']} says no version"
    for one in spec["containers"]:
        missing = {"livenessProbe", "readinessProbe", "resources"} - one.keys()
        if missing or "memory" not in one["resources"]["limits"]:
            yield f"{name}/{one['name']} lacks {missing or 'a limit of memory'}"
        if ours:
            yield from _our_container(name, one)


def _our_container(name: str, container: Document) -> Iterator[str]:
    asked = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")
    }
    if asked != {"startup": "/startup", "liveness": "/live", "readiness": "/ready"}:
        yield f"{name} is asked at {asked}"
    if container["ports"] != [{"name": "metrics", "containerPort": PORT}]:
        yield f"{name} does not serve metrics at {PORT}: {container['ports']}"


def _scaler(scaled: Document, documents: list[Document]) -> Iterator[str]:
    spec = scaled["spec"]
    targets = {one["metadata"]["name"]: one for one in documents if one["kind"] == "Deployment"}
    target = targets.get(spec["scaleTargetRef"]["name"])
    if not target or "replicas" in target["spec"]:
        yield "the ScaledObject's target is not there, or says itself how many replicas it has"
    asked = {one["name"]: one["metadata"]["valueLocation"] for one in spec["triggers"]}
    right = {route: f'gradcam_queue_jobs{{priority="{route}"}}' for route in ROUTES}
    right |= {name: f"gradcam_{name}_jobs" for name in ("retrying", "running")}
    if asked != right:
        yield f"the triggers are {asked}, not {right}"
    formula = spec["advanced"]["scalingModifiers"]["formula"]
    if formula != scaler(formula, spec["maxReplicaCount"]).formula:
        yield f"the formula is {formula}, and scaling.py says {scaler(formula, 1).formula}"


def scaler(formula: str, most: int) -> Scaler:
    """The scaler whose numbers stand in a formula."""
    names = "|".join([*ROUTES, "retrying", "running"])
    job_s, shard_s, drain_s, slots = re.findall(r"[0-9.]+", re.sub(names, "", formula))
    return Scaler(float(job_s), float(shard_s), float(drain_s), int(slots), most)


def settings_schema() -> dict[str, Any]:
    """The settings that values.yaml may hold, as worker/gradcam_worker/settings.py has them."""
    found: dict[str, Any] = {}
    for name, said in sorted(Settings.model_json_schema()["properties"].items()):
        if name in SECRET | OWN:
            continue
        kept = {key: value for key, value in said.items() if key not in {"default", "title", "writeOnly"}}
        if "anyOf" in kept:  # a path, or nothing
            kept = {"type": "string"}
        if kept["type"] == "array":  # an environment variable has commas between them
            kept["items"] = {"type": "string", "pattern": "^[^,]+$"}
        found[name] = kept
    return {"type": "object", "additionalProperties": False, "properties": found}


def stale() -> Iterator[str]:
    """What the chart says that is written elsewhere, and differs there."""
    schema: Mapping[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    if schema["properties"]["settings"] != settings_schema():
        yield "values.schema.json: settings are not those of settings.py: scripts/check-deploy --write"
    if {*ROUTES} != {"high", "normal", "low", "bulk", ROUTE}:
        yield f"the chart's formula does not know all of {ROUTES}"


def write() -> None:
    """Put the settings into values.schema.json."""
    file = CHART / "values.schema.json"
    schema = json.loads(file.read_text(encoding="utf-8"))
    schema["properties"]["settings"] = settings_schema()
    file.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
