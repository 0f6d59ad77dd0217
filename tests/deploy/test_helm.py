"""The chart, its scaler and its schemas."""

import copy
import functools
import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import redis

import gradcam_worker
from devtools.deploy_checks import cluster_environment, egress, helm, scaling, tools, wiring
from devtools.deploy_checks.scaling import Scaler, Work
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.runtime.processes import supervisor
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

CHART = helm.CHART
COMPONENT = "app.kubernetes.io/component"
CONTAINER = ("spec", "template", "spec", "containers", 0)
FILES_ALONE = [{"name": "files", "mountPath": "/etc/gradcam"}]
MAP = "rehearsal-gradcam"
SCALER = Scaler(job_s=0.05, shard_s=5, drain_s=60, slots=18, most=8)


@pytest.fixture(scope="module", autouse=True)
def _tools() -> None:
    """Helm, and what else looks at the chart."""
    tools.make()


@functools.cache
def template(name: str, *sets: str) -> list[dict[str, Any]]:
    documents, errors = helm.template(CHART / "ci" / f"{name}.yaml", *sets)
    assert not errors
    return documents


def rendered(name: str, *sets: str) -> list[dict[str, Any]]:
    """What a file of values makes: each test may change it."""
    return copy.deepcopy(template(name, *sets))


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [
        each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, f"rehearsal-{name}")
    ]
    return found


def of_component(workloads: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [each for each in workloads if each["metadata"]["labels"][COMPONENT] == name]


def work(running: int = 0, retrying: int = 0, **queued: int) -> Work:
    return Work(dict.fromkeys(ROUTES, 0) | queued, retrying, running)


def as_keda(names: dict[str, int]) -> float:
    """What the formula makes of numbers of jobs."""
    said: float = eval(SCALER.formula, {"ceil": math.ceil, "max": max}, names)  # noqa: S307  # our own text
    return said


WRONG: list[tuple[tuple[Any, ...], Any, str]] = [  # in the pod of a worker: path, value, what is said of it
    (("securityContext", "runAsUser"), 1000, "securityContext.runAsUser: 10001 was expected"),
    (("securityContext", "runAsNonRoot"), False, "securityContext.runAsNonRoot: True was expected"),
    (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccompProfile: {"),
    (("automountServiceAccountToken",), True, "automountServiceAccountToken: False was expected"),
    (("enableServiceLinks",), True, "enableServiceLinks: False was expected"),
    (("terminationGracePeriodSeconds",), 60, "killed after 60 s"),
    (
        ("containers", 0, "image"),
        "gradcam-worker:latest",
        "containers[0].image: 'gradcam-worker:latest'",
    ),
    (
        ("containers", 0, "image"),
        "localhost:5000/gradcam-worker",
        "image: 'localhost:5000/gradcam-worker'",
    ),
    (("containers", 0, "securityContext", "readOnlyRootFilesystem"), False, "securityContext: {"),
    (("containers", 0, "livenessProbe", "httpGet", "path"), "/ready", "path: '/live' was expected"),
    (("containers", 0, "resources", "limits"), {}, "limits: 'memory' is a required property"),
    (("containers", 0, "ports"), [], "containers[0].ports: "),
]


def with_wrong(path: tuple[Any, ...], value: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is rendered, and the Deployment of the worker in it, in which something is wrong."""
    documents = rendered("cpu")
    worker = one(documents, "Deployment", "gradcam-worker")
    place: Any = worker["spec"]["template"]["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return documents, worker


@pytest.fixture(scope="module")
def said_of_wrong(_tools: None) -> list[str]:
    """What schemas say of each of them, one finding after the other."""
    workers = {
        f"wrong-{number}": [with_wrong(path, value)[1]] for number, (path, value, _) in enumerate(WRONG)
    }
    return re.split(r"\n(?=  /)", "\n".join(helm.by_schema(workers)))


class TestFormula:
    def test_there_are_no_workers_only_where_nothing_waits_retries_or_runs(self) -> None:
        assert SCALER.desired(work()) == 0
        for least in (work(running=1), work(retrying=1), *(work(**{route: 1}) for route in ROUTES)):
            assert SCALER.desired(least) == 1

    def test_what_waits_is_weighed_by_the_time_it_takes(self) -> None:
        assert SCALER.desired(work(high=600, normal=300, low=200, bulk=100)) == 1
        assert SCALER.desired(work(high=600, normal=301, low=200, bulk=100)) == 2
        assert SCALER.desired(work(shard=13)) == 2

    def test_workers_left_over_can_hold_what_runs(self) -> None:
        draw = random.Random(1)  # noqa: S311  # not a secret
        for _ in range(500):
            some = work(
                draw.randrange(300), draw.randrange(5), high=draw.randrange(999), shard=draw.randrange(9)
            )
            assert SCALER.desired(some) >= min(-(-some.running // SCALER.slots), SCALER.most)

    def test_busy_workers_ask_for_no_more(self) -> None:
        for workers in range(1, SCALER.most):
            assert SCALER.desired(work(running=workers * SCALER.slots, high=100)) == workers

    def test_the_limits_hold(self) -> None:
        always = Scaler(job_s=1, shard_s=1, drain_s=1, slots=1, most=3, least=2)
        assert [always.desired(work(high=count)) for count in (0, 1, 3, 9)] == [2, 2, 3, 3]

    def test_the_text_that_keda_gets_says_the_same(self) -> None:
        draw = random.Random(2)  # noqa: S311  # not a secret
        for _ in range(200):
            some = work(
                draw.randrange(99), draw.randrange(9), **{name: draw.randrange(99) for name in ROUTES}
            )
            names = {**some.queued, "retrying": some.retrying, "running": some.running}
            assert as_keda(names) == math.ceil(SCALER.load(some))

    def test_one_job_is_enough_for_keda_which_cuts_to_thousandths(self) -> None:
        none = dict.fromkeys([*ROUTES, "retrying", "running"], 0)
        assert as_keda(none) == 0
        for name in none:
            assert int(as_keda({**none, name: 1}) * 1000) > 0, name


class TestReplay:
    def test_the_last_worker_stays_while_a_job_runs_and_goes_after_the_cooldown(self) -> None:
        trace = [(0.0, work()), (10.0, work(high=1)), (20.0, work(running=1)), (900.0, work(running=1))]
        trace += [(1000.0, work()), (1199.0, work()), (1200.0, work())]
        assert SCALER.replay(trace) == [0, 1, 1, 1, 1, 1, 0]

    def test_one_that_counts_only_what_waits_takes_the_last_worker_from_a_running_job(self) -> None:
        trace = [(0.0, work(high=1)), (10.0, work()), (310.0, work())]  # `running` left out
        assert SCALER.replay(trace)[-1] == 0

    def test_up_at_once_and_down_by_steps(self) -> None:
        deep, shallow = work(high=9600), work(running=1)
        trace = [(0.0, deep), (10.0, shallow), *((300.0 + 30 * number, shallow) for number in range(1, 5))]
        assert SCALER.replay(trace) == [8, 8, 7, 7, 6, 6]


def test_a_ledger_is_read_as_it_is(settings: Settings, job: Job) -> None:
    with GradcamClient(settings=settings) as client:
        client.submit_many([job, job.model_copy(update={"id": "018f0000-0000-7000-8000-000000000001"})])
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as server:
        found = scaling.read(server, settings.key_prefix)
    assert found == work(**{job.priority: 2})


def test_the_settings_that_the_values_may_hold_are_those_of_the_code() -> None:
    names = {*helm.settings_schema()["properties"]}
    assert names | helm.SECRET | helm.OWN == {*Settings.model_fields}


def test_no_secret_may_stand_in_the_values() -> None:
    hidden = {name for name, said in Settings.model_fields.items() if "Secret" in str(said.annotation)}
    shown = {name for name, said in Settings.model_fields.items() if not said.repr}
    assert hidden | shown <= helm.SECRET


def test_chart_and_package_have_one_version() -> None:
    text = (CHART / "Chart.yaml").read_text()
    assert f"\nversion: {gradcam_worker.__version__}\n" in text
    assert f'\nappVersion: "{gradcam_worker.__version__}"\n' in text


def test_valkey_in_the_cluster_is_set_up_as_deploy_redis_says() -> None:
    def directives(text: str) -> set[str]:
        lines = (line.strip() for line in text.splitlines())
        return {line for line in lines if line and not line.startswith(("#", "maxmemory ", "dir "))}

    template = (CHART / "templates" / "redis.yaml").read_text()
    inside = template.partition("says why\n")[2].partition("---")[0]
    assert directives(inside) == directives((CHART.parents[1] / "redis" / "redis.conf").read_text())


def test_every_level_of_the_values_refuses_what_it_does_not_know() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def open_ones(level: dict[str, Any], path: str) -> list[str]:
        if "properties" not in level:
            return []
        found = [] if level.get("additionalProperties") is False else [path]
        return found + [
            name for key, below in level["properties"].items() for name in open_ones(below, f"{path}.{key}")
        ]

    assert open_ones(schema, "values") == []


class TestRendered:
    def test_a_service_that_reads_as_a_setting_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        documents = rendered("everything")
        named: Any = one(documents, "Service", "gradcam-deliver")
        named["metadata"]["name"] = "gradcam-deliver"
        assert list(cluster_environment.findings(documents)) == []
        monkeypatch.setattr("gradcam_worker.settings.SERVICE_LINKS", ())
        (found,) = cluster_environment.findings(documents)
        assert "Service gradcam-deliver: GRADCAM_DELIVER_" in found

    def test_a_gpu_is_asked_for_and_only_for_workers(self) -> None:
        documents = rendered("gpu-keda")
        limits = {
            name: one(documents, "Deployment", f"gradcam-{name}")["spec"]["template"]["spec"]["containers"][0]
            for name in ("worker", "deliver")
        }
        assert limits["worker"]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert limits["worker"]["image"].endswith("-gpu")
        assert limits["worker"]["env"] == [{"name": "GRADCAM_DEVICES", "value": "0"}]
        assert "nvidia.com/gpu" not in limits["deliver"]["resources"]["limits"]
        assert limits["deliver"]["image"].endswith("-cpu")

    def test_who_scales_what_the_chart_does_not_is_not_overruled_at_an_upgrade(self) -> None:
        values = ("worker.replicas=null", "gateway.replicas=null", "gateway.enabled=true")
        documents = rendered("cpu", *values)
        for name in ("worker", "gateway"):
            assert "replicas" not in one(documents, "Deployment", f"gradcam-{name}")["spec"]

    def test_a_variable_that_is_said_twice_is_what_was_said_last(self) -> None:
        documents = rendered(
            "cpu",
            "env.HOME=/data",
            "extraEnv[0].name=TZ,extraEnv[0].value=UTC",
            "worker.extraEnv[0].name=TZ,worker.extraEnv[0].value=Europe/Vienna",
            "worker.extraEnv[1].name=GRADCAM_DEVICES,worker.extraEnv[1].value=auto",
        )
        pod = one(documents, "Deployment", "gradcam-worker")["spec"]["template"]["spec"]
        assert pod["containers"][0]["env"] == [
            {"name": "TZ", "value": "Europe/Vienna"},
            {"name": "GRADCAM_DEVICES", "value": "auto"},
        ]
        said = one(documents, "ConfigMap", "gradcam")["data"]
        assert (said["HOME"], said["KERAS_HOME"]) == ("/data", "/cache/keras")

    def test_a_long_deadline_is_written_as_a_number_without_an_exponent(self) -> None:
        backfill = {"input": "s3://a/", "output": "s3://gradcam/results/c", "deadlineSeconds": 1209600}
        values = f"backfills={json.dumps({'archive': backfill})}"  # a float, as in a file
        made = tools.run("helm", "template", CHART, "-f", CHART / "ci" / "cpu.yaml", "--set-json", values)
        assert "activeDeadlineSeconds: 1209600\n" in made.stdout

    def test_a_worker_ends_within_the_notice_that_its_node_gets(self) -> None:
        documents = rendered("eks-spot")
        settings = one(documents, "ConfigMap", "gradcam")["data"]
        pod = one(documents, "Deployment", "gradcam-worker")["spec"]["template"]["spec"]
        grace_s, left_s = pod["terminationGracePeriodSeconds"], float(settings["GRADCAM_SHUTDOWN_TIMEOUT_S"])
        assert (grace_s, left_s) == (25, 13)
        assert left_s + supervisor.REQUEUE_TIMEOUT_S < grace_s

    @pytest.mark.parametrize(
        ("values", "unavailable", "surge"),
        [
            ((), 0, "25%"),
            (("worker.rollout=replace",), 1, 0),
            (("worker.device=gpu",), 1, 0),
            (("worker.device=gpu", "worker.rollout=surge"), 0, "25%"),
        ],
    )
    def test_a_new_worker_comes_before_the_old_one_goes_unless_they_need_the_same_gpu(
        self, values: tuple[str, ...], unavailable: int, surge: int | str
    ) -> None:
        strategy = one(rendered("cpu", *values), "Deployment", "gradcam-worker")["spec"]["strategy"]
        assert strategy["rollingUpdate"] == {"maxUnavailable": unavailable, "maxSurge": surge}

    def test_what_no_policy_lets_out_and_what_one_lets_out_too_much_is_found(self) -> None:
        documents = rendered("eks-spot")
        values = "networkPolicy.identity={eks-pod-identity}"
        assert list(egress.findings(rendered("cpu"), {values: (documents, "")})) == []
        policy = one(documents, "NetworkPolicy", "gradcam-worker")["spec"]
        policy["egress"] = [rule for rule in policy["egress"] if "169.254.170.23/32" not in str(rule)]
        policy["egress"].append({"to": [{"ipBlock": {"cidr": "169.254.170.0/28"}}]})
        assert list(egress.findings(rendered("cpu"), {values: (documents, "")})) == [
            f"{values} does not open 169.254.170.23:80/TCP",
            f"{values} opens 169.254.170.2:80/TCP",
        ]

    def test_names_may_be_looked_up_at_addresses_alone(self) -> None:
        values = "networkPolicy.dns=null,networkPolicy.dnsAddresses={10.96.0.11/32}"
        opened = rendered("cpu", values)
        assert list(egress.findings(rendered("cpu"), {values: (opened, "")})) == []

    def test_the_notes_name_the_hosts_that_the_chart_makes(self) -> None:
        def said(*sets: str) -> str:
            values = [part for one in sets for part in ("--set", f"gateway.{one}")]
            given: list[str | Path] = ["-f", CHART / "ci/everything.yaml", *values]
            shown = tools.run("helm", "install", "it", CHART, "--dry-run=client", *given).stdout
            (line,) = (one for one in shown.splitlines() if one.startswith("The HTTP API is at "))
            hosts, _, _ = line.removeprefix("The HTTP API is at ").partition(". ")
            return hosts.removeprefix("http://it-gradcam-gateway.default:8000")

        assert said("httpRoute.enabled=false") == ", https://api.example.com"
        assert said("httpRoute.enabled=false", "ingress.tlsSecret=") == ", http://api.example.com"
        assert (
            said("ingress.enabled=false", "httpRoute.hostnames={route.example.com}") == ", route.example.com"
        )
        assert said("ingress.enabled=false", "httpRoute.enabled=false") == ""

    def test_a_tag_is_a_version_and_each_has_the_image_of_its_device(self) -> None:
        documents = rendered("everything")
        images = {
            name: one(documents, "Deployment", f"gradcam-{name}")["spec"]["template"]["spec"]["containers"][
                0
            ]["image"].removeprefix("registry.example:5000/vision/gradcam-worker")
            for name in ("worker", "deliver", "gateway")
        }
        digest = f"@sha256:{hashlib.sha256().hexdigest()}"  # where one is given, it says more than the tag
        assert images == {"worker": ":1.2.3-gpu", "deliver": ":1.2.3-cpu", "gateway": digest}

    def test_who_brings_no_account_and_makes_none_has_the_default_one(self) -> None:
        for sets, account in (
            ("serviceAccount.create=true", "rehearsal-gradcam"),
            ("serviceAccount.create=false", "default"),
            ("serviceAccount.create=false,serviceAccount.name=vision", "vision"),
        ):
            worker = one(rendered("cpu", *sets.split(",")), "Deployment", "gradcam-worker")
            assert worker["spec"]["template"]["spec"]["serviceAccountName"] == account

    def test_it_may_be_part_of_another_chart(self) -> None:
        assert rendered("cpu", "global.of=another")

    def test_variables_of_others_reach_the_pods(self) -> None:
        said = one(rendered("everything"), "ConfigMap", "gradcam")["data"]
        assert said["HTTPS_PROXY"] == "http://proxy.example:3128"

    def test_a_worker_has_room_for_what_it_may_keep(self) -> None:
        documents = rendered("cpu")
        settings = one(documents, "ConfigMap", "gradcam")["data"]
        read = Settings.from_environment({name: settings[name] for name in settings if "GRADCAM_" in name})
        pod = one(documents, "Deployment", "gradcam-worker")["spec"]["template"]["spec"]
        (cache,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "cache"]
        assert int(cache["sizeLimit"].removesuffix("Gi")) * 2**30 > read.cache_bytes
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
        in_flight = read.max_bytes_in_flight + 3 * read.max_pixels_in_flight
        assert read.resident_bytes + in_flight + 2**30 < memory

    def test_large_numbers_are_written_out_and_lists_with_commas(self) -> None:
        said = one(rendered("gpu-keda"), "ConfigMap", "gradcam")["data"]
        assert said["GRADCAM_MAX_BYTES_IN_FLIGHT"] == "1073741824"
        assert said["GRADCAM_PRELOAD"] == "efficientnet_lite0,xception"
        assert said["GRADCAM_REDIS_CA"] == "/etc/gradcam/redis-ca.pem"

    def test_changed_settings_start_new_pods(self) -> None:
        sums = [
            one(rendered(name), "Deployment", "gradcam-worker")["spec"]["template"]["metadata"]["annotations"]
            for name in ("cpu", "gpu-keda")
        ]
        assert sums[0]["checksum/settings"] != sums[1]["checksum/settings"]

    def test_the_scaler_counts_the_slots_that_a_worker_has(self) -> None:
        cases = [
            ("gpu-keda", (), 6 * 11 + 6 * 2),  # as the supervisor divides 64 threads
            ("gpu-keda", ("settings.job_processes=0",), 64 + 2),
            ("gpu-keda", ("settings.job_processes=32",), 32 * 4 + 32 * 2),
            ("everything", (), 48 + 3),
            ("gpu-keda", ("settings.job_processes=2", "settings.threads=48"), 2 * (48 + 2)),
        ]
        for name, sets, slots in cases:
            scaled = one(rendered(name, *sets), "ScaledObject", "gradcam-worker")["spec"]["advanced"]
            formula = scaled["scalingModifiers"]["formula"]
            assert helm.scaler(formula, 1).slots == slots

    @pytest.mark.parametrize(
        "number", range(len(WRONG)), ids=[re.sub(r"\W+", "-", said) for _, _, said in WRONG]
    )
    def test_what_is_wrong_is_found(self, number: int, said_of_wrong: list[str]) -> None:
        path, value, said = WRONG[number]
        documents, _ = with_wrong(path, value)
        of_schemas = [each for each in said_of_wrong if f"/wrong-{number}-" in each.partition("::")[0]]
        assert said in "\n".join([*of_schemas, *helm.findings(documents)])

    @pytest.mark.parametrize(
        ("kind", "name", "path", "value", "said"),
        [
            ("Service", "deliver", ("spec", "selector", COMPONENT), "delivery", "leads to"),
            ("Service", "deliver", ("spec", "ports", 0, "port"), 9465, "do not listen"),
            ("Service", "redis", ("spec", "ports", 0, "port"), 6380, "do not listen"),
            (
                "ScaledObject",
                "worker",
                ("spec", "triggers", 0, "metadata", "url"),
                "http://a:9464",
                "no Service",
            ),
            ("ConfigMap", "", ("data", "GRADCAM_S3_ENDPOINT_URL"), "http://b:8333", "no Service"),
            ("ConfigMap", "", ("data", "GRADCAM_NETWORKS"), "/etc/gradcam/nets.toml", "holds"),
            ("NetworkPolicy", "worker", ("spec", "egress", 0, "ports", 0, "port"), 54, "out to the DNS"),
            ("NetworkPolicy", "worker", ("spec", "egress", 1, "ports", 0, "port"), 6380, "out to redis"),
            (
                "NetworkPolicy",
                "worker",
                ("spec", "ingress", 0, "ports", 0, "port"),
                "metric",
                "none of its pods",
            ),
            ("NetworkPolicy", "s3", ("spec", "podSelector", "matchLabels", COMPONENT), "s4", "for no pod"),
            (
                "PodMonitor",
                "",
                ("spec", "podMetricsEndpoints", 0, "port"),
                "metric",
                "PodMonitor does not find",
            ),
            ("PodDisruptionBudget", "worker", ("spec",), {"minAvailable": 1}, "drained"),
            ("PodDisruptionBudget", "worker", ("spec",), {"maxUnavailable": 1}, "never becomes ready"),
            ("Deployment", "worker", (*CONTAINER, "volumeMounts"), FILES_ALONE, "/cache cannot be written"),
            (
                "Deployment",
                "deliver",
                (*CONTAINER, "envFrom", 1),
                {"configMapRef": {"name": MAP}},
                "no Secret",
            ),
        ],
        ids=lambda value: value.replace(" ", "-") if isinstance(value, str) and " " in value else "",
    )
    def test_what_does_not_find_each_other_is_found(
        self, kind: str, name: str, path: tuple[Any, ...], value: Any, said: str
    ) -> None:
        documents = rendered("everything")
        place: Any = one(documents, kind, "-".join(filter(None, ("gradcam", name))))
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        assert any(said in each for each in wiring.findings(documents))

    def test_what_an_operator_adds_is_in_every_pod_with_an_image_of_ours(self) -> None:
        pods = {
            each["metadata"]["labels"][COMPONENT]: each["spec"]["template"]["spec"]
            for each in wiring.workloads(rendered("everything"))
        }
        assert {*pods} == {*wiring.OURS, "redis", "s3"}
        for name in wiring.OURS:
            (container,) = pods[name]["containers"]
            assert {"NODE"} <= {each["name"] for each in container["env"]}
            assert {"configMapRef": {"name": "proxy", "optional": True}} in container["envFrom"]
            assert "/etc/ssl/own" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "certificates" in {volume["name"] for volume in pods[name]["volumes"]}
            assert [each["name"] for each in pods[name]["initContainers"]] == ["mesh"]
            important = "important" if name == "deliver" else "usual"
            assert pods[name]["priorityClassName"] == important
        assert "GRADCAM_S3_REGION" in str(pods["worker"])
        assert "GRADCAM_S3_REGION" not in str(pods["deliver"])
        assert pods["worker"]["securityContext"]["supplementalGroups"] == [44]

    def test_a_cluster_may_choose_the_users_of_all_pods(self) -> None:
        for each in wiring.workloads(rendered("openshift")):
            context = each["spec"]["template"]["spec"]["securityContext"]
            assert context["runAsNonRoot"]
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & {*context}
        redis_pod = one(rendered("everything"), "StatefulSet", "gradcam-redis")["spec"]["template"]["spec"]
        assert redis_pod["securityContext"]["runAsUser"] == 999

    def test_who_only_submits_may_have_a_secret_of_its_own(self) -> None:
        pods = wiring.workloads(rendered("everything"))
        secrets = {
            each["metadata"]["labels"][COMPONENT]: source["secretRef"]["name"]
            for each in pods
            for source in each["spec"]["template"]["spec"]["containers"][0].get("envFrom", [])
            if "secretRef" in source
        }
        submits = dict.fromkeys(("gateway", "backfill"), "gradcam-submitter")
        assert secrets == {
            **dict.fromkeys(("worker", "deliver", "networks"), "gradcam"),
            "s3": "gradcam-s3",
            **submits,
        }

    def test_a_backfill_goes_on_where_it_was_and_one_that_is_changed_is_another_job(self) -> None:
        def jobs(*sets: str) -> dict[str, list[str]]:
            values = (
                "backfills.a.input=s3://photos/a.csv",
                "backfills.a.output=s3://gradcam/results/a",
                *sets,
            )
            made = of_component(wiring.workloads(rendered("cpu", *values)), "backfill")
            return {
                each["metadata"]["name"]: each["spec"]["template"]["spec"]["containers"][0]["args"]
                for each in made
            }

        command = ["backfill", "s3://photos/a.csv", "--output", "s3://gradcam/results/a", "--json"]
        ((name, args),) = jobs().items()
        assert args == [*command, "--resume"]
        assert re.fullmatch("rehearsal-gradcam-backfill-a-[0-9a-f]{8}", name)
        assert [*jobs("backfillDefaults.continue=no").values()] == [command]
        assert {*jobs("backfills.a.options={--top-n,2}")} != {name}
        assert {*jobs("backfills.a.schedule=@daily")} == {"rehearsal-gradcam-backfill-a"}

    def test_long_names_stay_apart_and_are_not_too_long(self) -> None:
        first, second = (
            helm.template(CHART / "ci" / "everything.yaml", release=f"{'a' * 52}{last}")[0] for last in "bc"
        )
        assert [*wiring.findings(first)] == []
        named = [{(each["kind"], each["metadata"]["name"]) for each in each} for each in (first, second)]
        assert not named[0] & named[1]

    def test_a_name_that_is_too_long_or_leads_nowhere_is_found(self) -> None:
        documents = rendered("everything")
        one(documents, "StatefulSet", "gradcam-redis")["metadata"]["name"] = f"{'a' * 50}-redis"
        one(documents, "Ingress", "gradcam-gateway")["spec"]["rules"][0]["http"]["paths"][0]["backend"][
            "service"
        ]["port"] = {"name": "web"}
        backend = one(documents, "HTTPRoute", "gradcam-gateway")["spec"]["rules"][0]["backendRefs"][0]
        backend["port"] = 80
        found = "\n".join(wiring.findings(documents))
        assert "redis has 56 characters: 52 are allowed" in found
        assert "Ingress leads to rehearsal-gradcam-gateway:web, which is no Service" in found
        assert "HTTPRoute leads to rehearsal-gradcam-gateway:80, which is no Service" in found

    def test_a_formula_of_another_shape_is_found(self) -> None:
        documents = rendered("gpu-keda")
        scaled = one(documents, "ScaledObject", "gradcam-worker")["spec"]["advanced"]["scalingModifiers"]
        scaled["formula"] = scaled["formula"].replace("max(", "min(")
        assert any("the formula is" in each for each in helm.findings(documents))


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(tools.Missing, match="no-such-program is not installed"):
        tools.run("no-such-program")
