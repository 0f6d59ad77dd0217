from typing import Any

import pytest
from pydantic import ValidationError

from gradcam_worker.schemas.annotations import AnnotatedBox, AnnotatedMask, Annotations, RunLengths
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Row

BOX = {"xyxy": [1, 2, 3.5, 4]}
JOB = {"image": "s3://in/a.png", "network": "vgg16", "target": {"top_n": 1}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"labels": ["cat", 3]},
        {"boxes": [{"xyxy": [1.0, 2.0, 3.5, 4.0]}]},
        {"boxes": [{"xyxy": [0.0, 0.0, 0.5, 1.5], "relative": True, "label": "cat"}]},
        {"mask": {"uri": "s3://in/mask.png"}},
        {"mask": {"rle": {"size": [2, 3], "counts": [1, 5]}}},
        {"mask": {"rle": {"size": [2, 3], "counts": "15"}}},
    ],
)
def test_annotations_survive_their_json_which_has_no_defaults(fields: dict[str, Any]) -> None:
    annotations = Annotations.model_validate(fields)
    assert annotations.model_dump(mode="json") == fields
    assert Annotations.model_validate_json(annotations.to_json()) == annotations


@pytest.mark.parametrize("xyxy", [[3, 2, 1, 4], [1, 2, 1, 4], [1, 4, 2, 4], [1, 2, float("inf"), 4]])
def test_a_box_without_an_area_is_refused(xyxy: list[float]) -> None:
    with pytest.raises(ValidationError, match=r"left < right and top < bottom|finite"):
        AnnotatedBox(xyxy=xyxy)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": [2, 3], "counts": [1, 4]}, "must sum to 6, not 5"),
        ({"size": [0, 3], "counts": []}, r"each from 1 to 65535, not \[0, 3\]"),
        ({"size": [2, 3], "counts": [7, -1]}, "greater than or equal to 0"),
    ],
)
def test_run_lengths_that_are_not_those_of_a_mask_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunLengths.model_validate(fields)


def test_a_mask_is_a_picture_or_run_lengths() -> None:
    for fields in ({}, {"uri": "s3://in/mask.png", "rle": {"size": [1, 1], "counts": [1]}}):
        with pytest.raises(ValidationError, match="exactly one of uri and rle is needed"):
            AnnotatedMask.model_validate(fields)


def test_a_row_names_all_that_is_fetched_for_it() -> None:
    masks = {"s3://in/a.png": None, "s3://in/b.png": {"rle": {"size": [1, 1], "counts": [1]}}}
    for uri, mask in masks.items():
        assert Row(uri=uri, annotations=Annotations(mask=mask)).uris == (uri,)
    row = Row(uri="s3://in/a.png", annotations=Annotations(mask={"uri": "s3://in/m.png"}))
    assert row.uris == ("s3://in/a.png", "s3://in/m.png")


def test_a_job_without_annotations_is_written_as_earlier_versions_write_it() -> None:
    assert "annotations" not in Job.parse(JOB).to_json()
    job = Job.parse({**JOB, "annotations": {"labels": ["cat"], "boxes": [BOX]}})
    assert Job.model_validate_json(job.to_json()) == job
    assert job.fingerprint() != Job.parse({**JOB, "id": job.id}).fingerprint()
