"""docs/how-to/telemetry.md names the settings and fields that there are."""

import re
from pathlib import Path

from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "telemetry.md"


def test_each_setting_that_is_named_exists_and_each_of_telemetry_is_named() -> None:
    named = set(re.findall(r"`GRADCAM_([A-Z_]+)", PAGE.read_text()))
    assert {one.lower() for one in named} <= Settings.model_fields.keys()
    assert named >= {"METRICS_PORT", "METRICS_HOST", "LOG_FORMAT", "LOG_LEVEL", "TRACES"}


def test_the_field_that_joins_traces_is_the_contracts() -> None:
    assert "`traceparent`" in PAGE.read_text()
    assert "traceparent" in Job.model_fields
