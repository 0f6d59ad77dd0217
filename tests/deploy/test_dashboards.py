"""The dashboard and the alerts ask for what a scrape holds, and for nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from gradcam_worker import errors
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.observability.definitions import PRIORITIES
from gradcam_worker.observability.events import EndedJob
from gradcam_worker.observability.gpu import DeviceUse
from gradcam_worker.observability.prometheus import HostMetrics, Metrics, ProcessScrape
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
RUNBOOK = DEPLOY.parent / "docs" / "how-to" / "runbook.md"
GROUPS = yaml.safe_load((DEPLOY / "alerts" / "gradcam.rules.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
DASHBOARD = json.loads((DEPLOY / "grafana" / "gradcam.json").read_text())
PANELS = [one for one in DASHBOARD["panels"] if one["type"] != "row"]
OF_PROMETHEUS = {"instance"}  # labels that a scrape adds
SELECTOR = re.compile(r"\b((?:gradcam|process)_[a-z_]+)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'([a-z_]+)(=~|!~|!=|=)"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without) \(([^)]*)\)")


def scrape() -> dict[str, dict[str, set[str]]]:
    """What a worker with a GPU and a ledger shows: name of a sample -> label -> its values.

    As one process, and as an engine process and a job process.
    """
    each = dict.fromkeys(ROUTES, 1)
    tenants = {"acme": TenantUse(1, 1, 1.0)}
    depths = QueueDepths(each, dict.fromkeys(each, 1.0), 1, 1, 1, 1, 1.0, 1, tenants)
    worker, engine, jobs = (Metrics(role=role) for role in ("worker", "engine", "jobs"))
    worker.set_ledger_gauges(lambda: depths)
    for metrics in (worker, engine):
        metrics.set_device_gauges(lambda: DeviceUse(memory_bytes=1, utilization=0.5))
    for metrics in (worker, jobs):
        metrics.job_finished("failed", "a code of a later version")
        for priority in PRIORITIES:
            metrics.job_ended(EndedJob("a network", priority, "succeeded", 1, 1))
    host = HostMetrics(lambda: depths)
    scrapes = [
        ProcessScrape("engine-0", is_engine=True, starts=1, text=engine.scrape()),
        ProcessScrape("jobs-0-1", is_engine=False, starts=1, text=jobs.scrape()),
    ]
    found: dict[str, dict[str, set[str]]] = {}
    for text in (worker.scrape(), host.render(scrapes, host.ledger_gauges())):
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


def asked() -> Iterator[tuple[str, str]]:
    """Where an expression stands, and the expression."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def wrong(expression: str, there: dict[str, dict[str, set[str]]]) -> list[str]:
    """What an expression asks for that is not there."""
    found, known = [], set(OF_PROMETHEUS)
    for name, selector in SELECTOR.findall(expression):
        if name not in there:
            found.append(f"no metric {name}")
            continue
        known |= there[name].keys()
        for label, operator, text in MATCHER.findall(selector):
            if label in OF_PROMETHEUS:
                continue
            values = text.split("|") if "~" in operator else [text]
            missing = set(values) - there[name].get(label, set())
            if label not in there[name] or missing:
                found.append(f"{name} has no {label} {sorted(missing)}")
    for labels in GROUPING.findall(expression):
        found += [f"no label {one}" for one in labels.split(", ") if one not in known]
    return found


def test_dashboard_and_alerts_ask_only_for_metrics_labels_and_values_that_a_scrape_holds() -> None:
    there = scrape()
    assert {where: said for where, text in asked() if (said := wrong(text, there))} == {}


NO_FAULT_OF_THE_SERVICE = set[
    str
]()  # codes of a worker's errors that do not count as failures of the service


def test_failures_of_the_service_are_all_errors_of_workers_that_are_worth_another_try() -> None:
    worth_another = {error.code for error in errors.all_errors() if issubclass(error, errors.WorkerError)} & {
        error.code for error in errors.all_errors() if issubclass(error, errors.RetryableError)
    }
    patterns = [pattern for _, text in asked() for pattern in re.findall(r'code=~"([^"]*)"', text)]
    assert len(patterns) >= 7
    for pattern in patterns:
        assert worth_another - NO_FAULT_OF_THE_SERVICE <= set(pattern.split("|"))


@pytest.mark.parametrize(
    "expression",
    [
        "sum(gradcam_jobs)",
        'rate(gradcam_jobs_total{status="failed"}[5m])',
        'rate(gradcam_jobs_total{state="lost"}[5m])',
        'gradcam_queue_jobs{priority=~"high|urgent"}',
        "sum by (network) (gradcam_queue_jobs)",
    ],
    ids=["metric", "label", "value", "one of several values", "grouping"],
)
def test_what_a_scrape_does_not_hold_is_found(expression: str) -> None:
    assert wrong(expression, scrape())


def test_every_metric_that_there_is_is_on_the_dashboard() -> None:
    base = re.compile(r"_(bucket|sum|count)$")
    shown = {base.sub("", name) for _, text in asked() for name, _ in SELECTOR.findall(text)}
    ours = {base.sub("", name) for name in scrape() if name.startswith("gradcam_")}
    assert ours - shown == set()


def test_expressions_are_whole() -> None:
    for where, text in asked():
        for left, right in ("()", "{}", "[]"):
            assert text.count(left) == text.count(right), where
        assert text.count('"') % 2 == 0, where


def test_each_alert_says_what_it_is_and_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^## (.+)$", RUNBOOK.read_text(), re.MULTILINE)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/how-to/runbook.md#{alert['alert'].lower()}"
    assert sections == [*(alert["alert"] for alert in ALERTS), "Redis has lost its data"]


def test_the_commands_of_the_runbook_exist() -> None:
    text = RUNBOOK.read_text()
    root: click.Command = gradcam
    named = re.findall(r"`gradcam ([^`]+)`", text) + re.findall(r"^gradcam ([^#\n]+)", text, re.MULTILINE)
    for line in named:
        words, command = line.split(), root
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if isinstance(command, click.Group):  # as `gradcam backfill INPUT`
            command = command.commands.get("run", command)
        options = {option for one in command.params for option in one.opts}
        assert command is not root, line
        assert {word for word in words if word.startswith("--")} <= options, line


def test_the_settings_of_the_runbook_exist() -> None:
    named = set(re.findall(r"GRADCAM_([A-Z0-9_]+)", RUNBOOK.read_text()))
    assert named
    assert {name.lower() for name in named} <= Settings.model_fields.keys()


def variables(document: Any) -> set[str]:
    """Names of variables that a dashboard's texts use."""
    return set(re.findall(r"\$\{?([a-z_]+)\b", json.dumps(document)))


def test_the_dashboard_knows_its_variables_and_its_panels_have_places_of_their_own() -> None:
    defined = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables(PANELS) - {"__rate_interval"} == defined
    assert DASHBOARD["uid"] == "gradcam"
    assert DASHBOARD["schemaVersion"] >= 41
    assert len({one["id"] for one in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for one in DASHBOARD["panels"]
        for x in range(one["gridPos"]["x"], one["gridPos"]["x"] + one["gridPos"]["w"])
        for y in range(one["gridPos"]["y"], one["gridPos"]["y"] + one["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
