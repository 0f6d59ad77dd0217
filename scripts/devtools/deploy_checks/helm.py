"""The Helm chart, checked as far as possible without a cluster.

Each file of values in deploy/helm/gradcam/ci, under each of RELEASES: `helm template`, whether the objects
fit together (`wiring`), and that settings pass over the variables of their Services (`cluster_environment`).
Once for each file: `helm lint --strict`, Kubernetes' own schemas, those of others' objects
(deploy/helm/schemas), ours of who may do what (workload.schema.json), and what no schema says: which settings
there are, that a pod has longer to end than its worker, that the scaler's formula is
`scaling.Scaler.formula`. Then refused.yaml, what must be refused, and `egress`: what each preset of the
NetworkPolicy lets out.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from devtools import ROOT
from devtools.deploy_checks import cluster_environment, egress, tools, wiring
from devtools.deploy_checks.scaling import Scaler
from devtools.deploy_checks.wiring import NAMESPACE, Document, of_kind, workloads
from gradcam_worker.runtime.processes import supervisor
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

CHART = ROOT / "deploy" / "helm" / "gradcam"
VALUES = CHART / "values.schema.json"
CUSTOM = {  # kinds that are not Kubernetes' own
    "ScaledObject": CHART.parent / "schemas" / "keda-scaledobject.json",
    "HTTPRoute": CHART.parent / "schemas" / "httproute.json",
    "PodMonitor": CHART.parent / "schemas" / "podmonitor.json",
    "ServiceMonitor": CHART.parent / "schemas" / "servicemonitor.json",
    "PrometheusRule": CHART.parent / "schemas" / "prometheusrule.json",
}
WORKLOAD = Path(__file__).with_name("workload.schema.json")
SCHEMAS = {**CUSTOM, **dict.fromkeys(("Deployment", "StatefulSet", "Job"), WORKLOAD)}
ALERTS = ROOT / "deploy" / "alerts" / "gradcam.rules.yaml"
CHART_ALERTS = (
    CHART / "files" / ALERTS.name
)  # a copy, which scripts/docs makes: a chart reads its own files alone
# As people call them. The first two begin as settings do; the last is as long as Helm allows.
RELEASES = ("gradcam", "gradcam-prod", "x", "2.0", "a-release-whose-name-has-as-many-characters-as-can-be")
# They come from the Secret: no ConfigMap may hold them ...
SECRET = {"broker_url", "ledger_url", "s3_access_key_id", "s3_secret_access_key"}
SECRET |= {"sentinel_password", "status_sql_url", "traces", "webhook_secrets"}
# ... and these from the chart, or from a supervisor.
OWN = {"cache_dir", "devices", "metrics_host", "metrics_port", "networks", "redis_ca"}
OWN |= {"engine_socket", "metrics_socket", "role", "starts", "stderr_pipe"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is there
REFUSED = Path(__file__).with_name("refused.yaml")


def chart_findings() -> list[str]:
    """Return what is wrong with the chart. Raises tools.Missing."""
    files = sorted((CHART / "ci").glob("*.yaml"))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        lints = threads.map(lambda file: tools.run("helm", "lint", "--strict", CHART, "-f", file), files)
        asked = [(file, release) for file in files for release in RELEASES]
        made = [*threads.map(lambda one: template(one[0], release=one[1]), asked)]
        wrong = [*refused(threads), *presets(threads)]
    for file, lint in zip(files, lints, strict=True):
        if lint.returncode or "WARNING" in lint.stdout + lint.stderr:
            wrong.append(f"{file.name}: helm lint: {lint.stdout} {lint.stderr}")
    for (file, release), (documents, errors) in zip(asked, made, strict=True):
        found = [f"helm template: {errors}"] if errors else findings(documents)
        wrong += [f"{file.name}, release {release}: {finding}" for finding in found]
    first = {asked[place]: made[place][0] for place in range(0, len(asked), len(RELEASES))}
    return [*wrong, *checked({file.stem: documents for (file, _), documents in first.items()})]


def template(values: Path, *sets: str, release: str = "rehearsal") -> tuple[list[Document], str]:
    """Run `helm template`; return objects and errors."""
    given = [word for value in sets for word in ("--set", value)]
    done = tools.run("helm", "template", release, CHART, "--namespace", NAMESPACE, "-f", values, *given)
    documents = [document for document in yaml.load_all(done.stdout, LOADER) if document]
    return documents, done.stderr or ("it failed" if done.returncode else "")


def checked(renderings: dict[str, list[Document]]) -> Iterator[str]:
    """Yield what the schemas do not allow: Kubernetes' strictly, and ours.

    Args:
        renderings: What was made, by the name that a finding gets.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, documents in renderings.items():
            files.append(Path(folder) / f"{name}.yaml")
            files[-1].write_text(yaml.safe_dump_all(one for one in documents if one["kind"] not in CUSTOM))
        done = tools.run("kubernetes-validate", "--strict", "--quiet", *files)
    if done.returncode or (done.stdout + done.stderr).strip():
        yield f"kubernetes-validate: {done.stdout} {done.stderr}"
    yield from by_schema(renderings)


def by_schema(renderings: dict[str, list[Document]]) -> Iterator[str]:
    """Yield what our own schemas do not allow."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[Path, list[Path]] = {}
        for name, documents in renderings.items():
            for document in [*of_kind(documents, *CUSTOM), *workloads(documents)]:
                kind = document["kind"]
                files.setdefault(SCHEMAS[kind], []).append(
                    Path(folder) / f"{name}-{kind}-{document['metadata']['name']}.yaml"
                )
                files[SCHEMAS[kind]][-1].write_text(yaml.safe_dump(document))
        for schema, of_schema in files.items():
            yield from tools.findings("check-jsonschema", "--schemafile", schema, *of_schema)


def refused(threads: ThreadPoolExecutor) -> Iterator[str]:
    """Yield values that should be refused and are not, or in a message that does not name them."""
    cases = yaml.safe_load(REFUSED.read_text(encoding="utf-8"))
    made = threads.map(lambda values: template(CHART / "ci" / "cpu.yaml", *values.split(",")), cases)
    for (values, word), (_, errors) in zip(cases.items(), made, strict=True):
        if not errors:
            yield f"--set {values} is not refused."
        elif word not in errors:
            yield f"--set {values} is refused without {word!r}: {errors}"


def presets(threads: ThreadPoolExecutor) -> Iterator[str]:
    """Yield what the presets of networkPolicy do not let out, or let out beside it."""
    plain, *opened = threads.map(
        lambda values: template(CHART / "ci" / "cpu.yaml", *values), [(), *((one,) for one in egress.OPENED)]
    )
    yield from egress.findings(plain[0], dict(zip(egress.OPENED, opened, strict=True)))


def _rollouts(documents: list[Document]) -> Iterator[str]:
    """What would end the only pod of a Deployment before the next one is ready."""
    for deployment in of_kind(documents, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        unavailable = deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"]
        if unavailable and container["resources"]["limits"].keys() <= {"cpu", "memory"}:
            yield f"{deployment['metadata']['name']}: its only pod ends before the next one is ready"


def findings(documents: list[Document]) -> Iterator[str]:
    """What no schema says."""
    yield from _rollouts(documents)
    yield from wiring.findings(documents)
    for scaled in of_kind(documents, "ScaledObject"):
        yield from _scaler(scaled, documents)
    yield from cluster_environment.findings(documents)
    for rule in of_kind(documents, "PrometheusRule"):
        yield from _runbooks(rule)
    by_name = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    (worker,) = [name for kind, name in by_name if kind == "Deployment" and name.endswith("-worker")]
    release = worker.removesuffix("-worker")
    pod = by_name["Deployment", worker]["spec"]["template"]
    settings = cluster_environment.settings_of(cluster_environment.given_by_the_chart(documents, pod))
    grace = by_name["Deployment", worker]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    if grace < settings.shutdown_timeout_s + supervisor.REQUEUE_TIMEOUT_S:
        yield f"a worker that needs {settings.shutdown_timeout_s:g} s to end is killed after {grace} s"
    if not of_kind(documents, "NetworkPolicy"):
        return  # the operator has said so
    denying = by_name.get(("NetworkPolicy", release), {}).get("spec", {})
    if set(denying) != {"podSelector", "policyTypes"} or len(denying["policyTypes"]) != len(("in", "out")):
        yield "no NetworkPolicy denies what the others do not allow"


def _runbooks(rule: Document) -> Iterator[str]:
    for alert in (alert for group in rule["spec"]["groups"] for alert in group["rules"] if "alert" in alert):
        if not re.match("https?://", alert["annotations"]["runbook_url"]):
            yield f"{alert['alert']} leads to {alert['annotations']['runbook_url']}, which nobody can follow"


def _scaler(scaled: Document, documents: list[Document]) -> Iterator[str]:
    spec = scaled["spec"]
    targets = {target["metadata"]["name"]: target for target in of_kind(documents, "Deployment")}
    target = targets.get(spec["scaleTargetRef"]["name"])
    if not target or "replicas" in target["spec"]:
        yield "the ScaledObject's target is not there, or says itself how many replicas it has"
    triggers = {trigger["name"]: trigger["metadata"]["valueLocation"] for trigger in spec["triggers"]}
    right = {route: f'gradcam_queue_jobs{{priority="{route}"}}' for route in ROUTES}
    right |= {name: f"gradcam_{name}_jobs" for name in ("retrying", "running")}
    if triggers != right:
        yield f"the triggers are {triggers}, not {right}"
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
    allowed: dict[str, Any] = {}
    for name, schema in sorted(Settings.model_json_schema()["properties"].items()):
        if name in SECRET | OWN:
            continue
        kept = {key: value for key, value in schema.items() if key not in {"default", "title", "writeOnly"}}
        if {"type": "null"} in kept.get("anyOf", ()):  # a path, or nothing
            kept = {"type": "string"}
        if kept.get("type") == "array":  # an environment variable has commas between them
            kept["items"] = {"type": "string", "pattern": "^[^,]+$"}
        allowed[name] = kept
    return {"type": "object", "additionalProperties": False, "properties": allowed}
