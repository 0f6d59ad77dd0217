"""docs/TELEMETRY.md says what there is: its tables are held to the code."""

import re
from pathlib import Path

from gradcam_worker.observability.definitions import METRICS, PREFIX, Defined
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "TELEMETRY.md"
MANY = 12  # values of a label that are written out


def row(one: Defined) -> str:
    """A metric as the page has it."""
    labels = [
        f"`{name}`" + (f": {', '.join(filter(None, values))}" if 1 < len(values) <= MANY else "")
        for name, values in one.labels.items()
    ]
    return f"| `{PREFIX}{one.name}` | {one.kind} | {'; '.join(labels)} | {one.help} |"


def table(after: str) -> list[str]:
    """The rows of the first table below a line."""
    _, below = PAGE.read_text().split(f"\n{after}\n", 1)
    found = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    assert found is not None
    return found[0].splitlines()[2:]


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    expected = [row(one) for one in METRICS]
    assert table("## Metrics") == expected, "it has to be:\n" + "\n".join(expected)


def test_each_setting_that_is_named_exists_and_each_of_telemetry_is_named() -> None:
    named = set(re.findall(r"`GRADCAM_([A-Z_]+)", PAGE.read_text()))
    assert {one.lower() for one in named} <= Settings.model_fields.keys()
    assert named >= {"METRICS_PORT", "METRICS_HOST", "LOG_FORMAT", "LOG_LEVEL", "TRACES"}


def test_the_field_that_joins_traces_is_the_contracts() -> None:
    assert "`traceparent`" in PAGE.read_text()
    assert "traceparent" in Job.model_fields
