"""The generated pages of docs/reference are what the code says."""

import pytest

from devtools.docs import reference_pages
from gradcam_worker import errors
from gradcam_worker.cli.commands import gradcam
from gradcam_worker.observability.definitions import METRICS, PREFIX
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    text = (reference_pages.FOLDER / name).read_text(encoding="utf-8")
    assert text.count(reference_pages.NOTE) == 1
    assert text == reference_pages.page(name), "run scripts/docs"


def test_the_published_schemas_are_those_of_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference_pages.main(["--check"]) == 0, capsys.readouterr().err


def test_every_setting_has_a_row_with_a_meaning() -> None:
    lines = reference_pages.settings()
    rows = {line.split("`")[1]: line.split(" | ") for line in lines if line.startswith("| `")}
    assert rows.keys() == {f"GRADCAM_{name.upper()}" for name in Settings.model_fields}
    assert [name for name, cells in rows.items() if len(cells[3].strip(" |")) < 5] == []


def test_every_field_of_a_job_has_a_meaning() -> None:
    meanings = {key: meaning for key, _, _, meaning in reference_pages.fields(Job)}
    assert meanings.keys() == {field.alias or name for name, field in Job.model_fields.items()}
    assert [key for key, meaning in meanings.items() if len(meaning) < 5] == []


def test_every_command_is_on_its_page() -> None:
    page = "\n".join(reference_pages.command_line())
    for name in gradcam.commands:
        assert f"\n### gradcam {name}\n" in page
    assert "`--max-failed TEXT`" in page
    assert "--ready-fd" not in page, "hidden options are not shown"


def test_every_error_and_every_metric_is_on_its_page() -> None:
    known = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    page = "\n".join(reference_pages.error_codes())
    for one in known:
        assert one.__name__ in page
    page = "\n".join(reference_pages.metrics())
    for metric in METRICS:
        assert f"`{PREFIX}{metric.name}`" in page


def test_a_page_that_is_not_current_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_pages, "PAGES", {"settings.md": lambda: iter(["## Other"])})
    assert reference_pages.main(["--check"]) == 1
    assert "docs/reference/settings.md is not what the code says" in capsys.readouterr().err
