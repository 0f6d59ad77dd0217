"""The OpenAPI document says what the wire's models and the app say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from gradcam_worker.gateway import examples
from gradcam_worker.gateway.app import create_app
from gradcam_worker.gateway.openapi import OPERATIONS
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

WIRE = Path(__file__).parents[2] / "deploy" / "schemas"
OF_WIRE = {"Job": "job.v1.json", "StatusDocument": "status.v1.json", "Manifest": "manifest.v1.json"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings()).openapi()


def validate(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema_rs.validator_for(schema).validate(value)


def in_document(schema: Any) -> Any:
    """A schema of `deploy/schemas` with its references as they are in the document."""
    return json.loads(json.dumps(schema).replace("#/$defs/", "#/components/schemas/"))


@pytest.mark.parametrize(("name", "file"), OF_WIRE.items())
def test_its_schemas_are_those_of_the_wire(document: dict[str, Any], name: str, file: str) -> None:
    wire = in_document(json.loads((WIRE / file).read_text()))
    parts = wire.pop("$defs", {})
    schemas = document["components"]["schemas"]
    if name == "StatusDocument":  # a job is its document, and its artifacts
        resource = dict(schemas["JobResource"]["properties"])
        resource.pop("artifacts")
        assert resource == wire["properties"]
        assert schemas["JobResource"]["required"] == wire["required"]
    else:
        assert schemas[name] == wire
    for part, schema in parts.items():
        assert schemas[part] == schema, part


def test_a_request_takes_every_field_of_a_job(document: dict[str, Any]) -> None:
    wire, request = (document["components"]["schemas"][name]["properties"] for name in ("Job", "JobRequest"))
    assert {*request} - {*wire} == {"top_n", "classes", "against", "webhook"}
    short = {"image", "method", "artifacts", "webhooks"}
    assert all(request[name] == wire[name] for name in {*wire} - short)
    for form in ({"method": "rise"}, {"artifacts": ["report"]}, {"webhook": "https://app.example.com/x"}):
        validate(document, "JobRequest", {**examples.JOB, **form})


def test_it_describes_every_operation_of_the_app_and_no_other(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    described = {one["operationId"] for path in document["paths"].values() for one in path.values()}
    assert described == {*OPERATIONS}


def schemas_with_examples(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every schema of a body that has an example, with the example."""
    for path in document["paths"].values():
        for one in path.values():
            bodies = [one.get("requestBody", {}), *one["responses"].values()]
            for content in (content for body in bodies for content in body.get("content", {}).values()):
                shown = [example["value"] for example in content.get("examples", {}).values()]
                shown += [content["example"]] if "example" in content else []
                yield from ((content["schema"], example) for example in shown)


def test_its_examples_are_valid(document: dict[str, Any]) -> None:
    found = [*schemas_with_examples(document)]
    assert len(found) > 5
    for schema, example in found:
        jsonschema_rs.validator_for({**schema, "components": document["components"]}).validate(example)
    rest = {name: value for name, value in examples.JOB.items() if name != "top_n"}
    assert Job.parse({**rest, "target": {"top_n": examples.JOB["top_n"]}})
