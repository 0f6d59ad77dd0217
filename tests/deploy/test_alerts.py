"""The alerts fire when they should, by Prometheus' own tool; and are quiet while all is well."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

RULES = Path(__file__).parents[2] / "deploy" / "alerts" / "gradcam.rules.yaml"
ALERTS = [
    rule
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
]
HOUR = 60  # minutes
WELL = {  # what a worker shows that does 600 jobs a minute, all of them well
    'gradcam_build_info{instance="a"}': "1x400",
    'gradcam_workers_alive{instance="a"}': "1x400",
    'gradcam_jobs_total{instance="a",state="succeeded",code=""}': "0+600x400",
    'gradcam_jobs_total{instance="a",state="failed",code="internal"}': "0x400",
    'gradcam_job_seconds_bucket{instance="a",network="n",priority="high",le="60.0"}': "0+600x400",
    'gradcam_job_seconds_count{instance="a",network="n",priority="high"}': "0+600x400",
    'gradcam_queue_oldest_seconds{instance="a",priority="high"}': "1x400",
    'gradcam_queue_jobs{instance="a",priority="high"}': "3x400",
    'gradcam_batch_seconds_sum{instance="a",process="engine-0"}': "0+30x400",
    'gradcam_networks_resident{instance="a",process="engine-0"}': "1x400",
    'gradcam_batch_seconds_sum{instance="deliver"}': "0x400",
    'gradcam_networks_resident{instance="deliver"}': "0x400",
    'gradcam_device_utilization_ratio{instance="a"}': "0.5x400",
    'gradcam_dead_jobs{instance="a"}': "2x400",
    'gradcam_outbox_oldest_seconds{instance="a"}': "2x400",
    'gradcam_events_delivered_total{instance="a",outcome="parked"}': "0x400",
    'gradcam_breaker_open{instance="a"}': "0x400",
    'gradcam_leases_lost_total{instance="a"}': "0x400",
    'process_start_time_seconds{instance="a"}': "1x400",
    'gradcam_engine_restarts_total{instance="a",process="engine-0"}': "0x400",
    'gradcam_ready{instance="a"}': "1x400",
    'gradcam_redis_check_failing{instance="a",check="eviction"}': "0x400",
}
FAILED = 'gradcam_jobs_total{instance="a",state="failed",code="internal"}'
IN_TIME = 'gradcam_job_seconds_bucket{instance="a",network="n",priority="high",le="60.0"}'
OLDEST = 'gradcam_queue_oldest_seconds{instance="a",priority="high"}'
BUSY = 'gradcam_batch_seconds_sum{instance="a",process="engine-0"}'
GONE = dict.fromkeys(WELL, "_x400")


@dataclass(frozen=True)
class Trouble:
    """What a worker shows then, in place of what it shows when all is well; and the alerts that fire."""

    shows: Mapping[str, str]
    fires: set[str]
    after: int = 90  # minutes


TROUBLES = {
    "all is well": Trouble({}, set(), 3 * HOUR),
    "the queue grows old": Trouble(
        {OLDEST: "600x400"}, {"GradcamQueueTooOld", "GradcamQueueAgeBudget", "GradcamQueueAgeBudgetSlowly"}
    ),
    "no worker": Trouble({'gradcam_workers_alive{instance="a"}': "0x400"}, {"GradcamNoWorker"}),
    "one job in ten fails": Trouble(
        {FAILED: "0+60x400"}, {"GradcamErrorRate", "GradcamErrorBudget", "GradcamErrorBudgetSlowly"}
    ),
    "one job in 300 fails": Trouble({FAILED: "0+2x400"}, {"GradcamErrorBudgetSlowly"}),
    "one job in 300 fails, for ten minutes": Trouble({FAILED: "0x120 0+2x10 20x400"}, set(), 3 * HOUR),
    "every second job is slow": Trouble(
        {IN_TIME: "0+300x400"}, {"GradcamLatencyBudget", "GradcamLatencyBudgetSlowly"}
    ),
    "every second job was slow, for a while, long ago": Trouble(
        {IN_TIME: "0+300x30 9000+600x400"}, {"GradcamLatencyBudgetSlowly"}, 3 * HOUR
    ),
    "one job in 50 is slow": Trouble({IN_TIME: "0+588x400"}, {"GradcamLatencyBudgetSlowly"}),
    "of few jobs one fails": Trouble(
        {FAILED: "0x60 1x400", 'gradcam_jobs_total{instance="a",state="succeeded",code=""}': "0+0.1x400"},
        {"GradcamErrorBudgetSlowly"},  # which is a ticket, and wakes nobody
        2 * HOUR + 5,
    ),
    "the device computes all the time, and jobs wait": Trouble(
        {BUSY: "0+59x400", OLDEST: "40x400"}, {"GradcamDeviceSaturated"}
    ),
    "the device computes all the time, and none waits": Trouble({BUSY: "0+59x400"}, set()),
    "failed jobs": Trouble({'gradcam_dead_jobs{instance="a"}': "0+5x400"}, {"GradcamDeadLettersGrow"}),
    "an old outbox": Trouble(
        {'gradcam_outbox_oldest_seconds{instance="a"}': "1000x400"}, {"GradcamOutboxTooOld"}
    ),
    "events are given up": Trouble(
        {'gradcam_events_delivered_total{instance="a",outcome="parked"}': "0x60 5x400"},
        {"GradcamEventsParked"},
    ),
    "storage fails": Trouble({'gradcam_breaker_open{instance="a"}': "1x400"}, {"GradcamBreakerOpen"}),
    "leases are lost": Trouble({'gradcam_leases_lost_total{instance="a"}': "0+1x400"}, {"GradcamLeasesLost"}),
    "a worker ends again and again": Trouble(
        {'process_start_time_seconds{instance="a"}': "0+300x400"}, {"GradcamWorkerRestarts"}
    ),
    "an engine ends again and again": Trouble(
        {'gradcam_engine_restarts_total{instance="a",process="engine-0"}': "0+1x400"},
        {"GradcamEngineRestarts"},
    ),
    "not ready": Trouble({'gradcam_ready{instance="a"}': "0x400"}, {"GradcamWorkerNotReady"}),
    "idle devices": Trouble(
        {
            'gradcam_device_utilization_ratio{instance="a"}': "0.1x400",
            'gradcam_queue_jobs{instance="a",priority="high"}': "3000x400",
        },
        {"GradcamDeviceIdle"},
    ),
    "no ledger": Trouble({'gradcam_workers_alive{instance="a"}': "_x400"}, {"GradcamLedgerOutOfReach"}),
    "a Redis that loses jobs": Trouble(
        {'gradcam_redis_check_failing{instance="a",check="eviction"}': "1x400"}, {"GradcamRedisUnsafe"}
    ),
    "no metrics": Trouble(GONE, {"GradcamNoMetrics"}),
}


def promtool(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Prometheus' tool, or skip the test."""
    program = shutil.which("promtool")
    if not program:
        missing = "promtool is not installed: scripts/promtool installs it where it can"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


def test_each_alert_fires_in_its_trouble_and_in_no_other(tmp_path: Path) -> None:
    """All troubles in one run of the tool: an alert that should be quiet is one with no instance expected."""
    names = {alert["alert"] for alert in ALERTS}
    assert set().union(*(trouble.fires for trouble in TROUBLES.values())) == names
    cases = []
    for title, trouble in TROUBLES.items():
        shown = {**WELL, **trouble.shows}
        # Whether an alert fires, whatever its labels and texts are.
        checks = [
            {
                "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
                "eval_time": f"{trouble.after}m",
                "exp_samples": [{"labels": "{}", "value": 1}] if name in trouble.fires else [],
            }
            for name in sorted(names)
        ]
        series = [{"series": name, "values": values} for name, values in shown.items()]
        cases.append({"name": title, "interval": "1m", "input_series": series, "promql_expr_test": checks})
    file = tmp_path / "troubles.yaml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": cases}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_alert_about_failures_names_their_most_frequent_cause(tmp_path: Path) -> None:
    shown = {
        **WELL,
        FAILED: "0+20x400",
        'gradcam_jobs_total{instance="a",state="failed",code="timeout"}': "0+50x400",
    }
    expected = {
        "exp_labels": {"severity": "critical"},
        "exp_annotations": {
            "summary": "Too many jobs fail by the service's fault",
            "description": "10.45% of the jobs failed by the service's fault. Most failures of the last five "
            "minutes: timeout.",
            "runbook_url": "docs/how-to/runbook.md#gradcamerrorbudget",
        },
    }
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in shown.items()],
        "alert_rule_test": [
            {"eval_time": "90m", "alertname": "GradcamErrorBudget", "exp_alerts": [expected]}
        ],
    }
    file = tmp_path / "cause.yaml"
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": [case]}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr
