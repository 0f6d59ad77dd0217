"""The Helm chart, checked as far as possible without a cluster.

For each file of values in deploy/helm/gradcam/ci: `helm lint --strict`, `helm template`, Kubernetes' own
schemas, those of KEDA and the Prometheus operator (deploy/helm/schemas), ours of who may do what
(workload.schema.json), and what no schema says: which settings there are, that a pod has longer to end than
its worker, that the scaler's formula is `scaling.Scaler.formula`. Then refused.yaml: what must be refused.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from devtools import ROOT
from devtools.deploy_checks import tools, wiring
from devtools.deploy_checks.scaling import Scaler
from devtools.deploy_checks.wiring import NAMESPACE, Document, of_kind
from gradcam_worker.runtime import supervisor
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

CHART = ROOT / "deploy" / "helm" / "gradcam"
VALUES = CHART / "values.schema.json"
CUSTOM = {  # kinds that are not Kubernetes' own
    "ScaledObject": CHART.parent / "schemas" / "keda-scaledobject.json",
    "PodMonitor": CHART.parent / "schemas" / "podmonitor.json",
    "PrometheusRule": CHART.parent / "schemas" / "prometheusrule.json",
}
WORKLOAD = Path(__file__).with_name("workload.schema.json")
SCHEMAS = {**CUSTOM, "Deployment": WORKLOAD, "StatefulSet": WORKLOAD}
ALERTS = ROOT / "deploy" / "alerts" / "gradcam.rules.yaml"
# They come from the Secret: no ConfigMap may hold them ...
SECRET = {"broker_url", "ledger_url", "s3_access_key_id", "s3_secret_access_key"}
SECRET |= {"status_sql_url", "traces", "webhook_secrets"}
# ... and these from the chart, or from a supervisor.
OWN = {"cache_dir", "devices", "metrics_host", "metrics_port", "networks", "redis_ca"}
OWN |= {"engine_socket", "metrics_socket", "role", "starts", "stderr_pipe"}
REFUSED = Path(__file__).with_name("refused.yaml")


def chart_findings() -> list[str]:
    """Return what is wrong with the chart. Raises tools.Missing."""
    wrong = []
    for values in sorted((CHART / "ci").glob("*.yaml")):
        lint = tools.run("helm", "lint", "--strict", CHART, "-f", values)
        if lint.returncode or "WARNING" in lint.stdout + lint.stderr:
            wrong.append(f"{values.name}: helm lint: {lint.stdout} {lint.stderr}")
        documents, errors = template(values)
        of_file = [f"helm template: {errors}"] if errors else [*checked(documents), *findings(documents)]
        wrong += [f"{values.name}: {finding}" for finding in of_file]
    return [*wrong, *refused()]


def template(values: Path, *sets: str, release: str = "rehearsal") -> tuple[list[Document], str]:
    """Run `helm template`, with the alerts given as an operator gives them; return objects and errors."""
    given = [word for value in sets for word in ("--set", value)]
    given = given or ["--set-file", f"monitoring.prometheusRule.rules={ALERTS}"]
    done = tools.run("helm", "template", release, CHART, "--namespace", NAMESPACE, "-f", values, *given)
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    return documents, done.stderr or ("it failed" if done.returncode else "")


def checked(documents: list[Document]) -> Iterator[str]:
    """Yield what the schemas do not allow: Kubernetes' strictly, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "documents.yaml"
        file.write_text(yaml.safe_dump_all(item for item in documents if item["kind"] not in CUSTOM))
        done = tools.run("kubernetes-validate", "--strict", "--quiet", file)
    if done.returncode or (done.stdout + done.stderr).strip():
        yield f"kubernetes-validate: {done.stdout} {done.stderr}"
    yield from by_schema(documents)


def by_schema(documents: list[Document]) -> Iterator[str]:
    """Yield what our own schemas do not allow."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, schema in SCHEMAS.items():
            files = []
            for document in of_kind(documents, kind):
                files.append(Path(folder) / f"{kind}-{document['metadata']['name']}.yaml")
                files[-1].write_text(yaml.safe_dump(document))
            if files:
                yield from tools.findings("check-jsonschema", "--schemafile", schema, *files)


def refused() -> Iterator[str]:
    """Yield values that should be refused and are not, or in a message that does not name them."""
    for values, word in yaml.safe_load(REFUSED.read_text(encoding="utf-8")).items():
        _, errors = template(CHART / "ci" / "cpu.yaml", *values.split(","))
        if not errors:
            yield f"--set {values} is not refused."
        elif word not in errors:
            yield f"--set {values} is refused without {word!r}: {errors}"


def findings(documents: list[Document]) -> Iterator[str]:
    """What no schema says."""
    yield from wiring.findings(documents)
    for scaled in of_kind(documents, "ScaledObject"):
        yield from _scaler(scaled, documents)
    by_name = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    (worker,) = [name for kind, name in by_name if kind == "Deployment" and name.endswith("-worker")]
    release = worker.removesuffix("-worker")
    data = by_name["ConfigMap", release]["data"]
    given = {name: str(value) for name, value in data.items() if name.startswith("GRADCAM_")}
    # The file's folder is there in a pod, and not here.
    variables = {**given, "GRADCAM_BROKER_URL": "redis://somewhere:6379/0", "GRADCAM_REDIS_CA": ""}
    settings = Settings.from_environment(variables)  # raises InvalidSettings where the worker would
    grace = by_name["Deployment", worker]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    if grace < settings.shutdown_timeout_s + supervisor.REQUEUE_TIMEOUT_S:
        yield f"a worker that needs {settings.shutdown_timeout_s:g} s to end is killed after {grace} s"
    denying = by_name.get(("NetworkPolicy", release), {}).get("spec", {})
    if set(denying) != {"podSelector", "policyTypes"} or len(denying["policyTypes"]) != len(("in", "out")):
        yield "no NetworkPolicy denies what the others do not allow"


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
