"""What is left out of botocore's data changes no request."""

from functools import cache
from typing import Any

import pytest
from botocore.session import Session

from gradcam_worker.storage import credentials

KEYS = {"aws_access_key_id": "id", "aws_secret_access_key": "secret"}


@cache
def sessions() -> tuple[Any, Any]:
    """Ours, and botocore's own, without the data that all tests share, and that clients in use change."""
    credentials._read_model_file.cache_clear()
    found = credentials.create_session("eu-central-1"), Session()
    for session in found:
        session.get_component("data_loader")._cache = {}
    return found


@pytest.mark.parametrize("region", ["eu-central-1", "us-east-1", "cn-north-1", "us-gov-west-1", "mars-1"])
def test_our_sessions_ask_the_same_servers_as_those_of_botocore(region: str) -> None:
    for service in ("s3", "sts", "sso", "sso-oidc"):
        ours, plain = (
            session.create_client(service, region_name=region, **KEYS).meta.endpoint_url
            for session in sessions()
        )
        assert ours == plain


def test_our_sessions_know_the_same_requests_and_regions_of_s3() -> None:
    ours, plain = (
        session.create_client("s3", region_name="eu-central-1", **KEYS).meta.service_model
        for session in sessions()
    )
    assert ours.operation_names == plain.operation_names
    for name in ("PutObject", "GetObject", "ListObjectsV2", "DeleteObject"):
        mine, its = ours.operation_model(name), plain.operation_model(name)
        assert [*mine.input_shape.members] == [*its.input_shape.members]
        assert mine.http == its.http
        assert mine.documentation == ""
    regions, of_botocore = (session.get_available_regions("s3") for session in sessions())
    assert regions == of_botocore


def test_a_file_that_does_not_exist_is_none() -> None:
    assert credentials.ModelFiles().load_file("/nowhere/service-2") is None
