"""`gradcam tenants` and `gradcam keys`."""

import json
import re
from typing import Any

import pytest

from gradcam_worker.cli.main import main
from gradcam_worker.gateway.access.api_keys import FORM, ApiKeys, read_prefix
from gradcam_worker.gateway.access.tenants import Tenants
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings


@pytest.fixture
def server(environment: Settings) -> RedisServer:
    return RedisServer(environment)


@pytest.fixture
def run(environment: Settings, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command; return its exit code, its output and its errors."""

    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run_command


def test_a_tenant_is_made_with_places_of_its_own_and_changed(
    run: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "There are no tenants" in run("tenants", "list")[1]
    assert "It can upload no image" in run("tenants", "set", "umbrella")[2]
    run("tenants", "remove", "umbrella")
    monkeypatch.setenv("GRADCAM_UPLOADS", "s3://uploads")
    code, output, errors = run("tenants", "set", "acme", "--input", "s3://acme-photos", "--share", "2")
    assert (code, "gradcam keys create acme" in errors, "refuse" in errors) == (0, True, False)
    assert "upload no image" not in errors
    policy = Tenants(server).get("acme")
    assert json.loads(output) == policy.model_dump(mode="json")
    assert (policy.inputs, policy.output, policy.uploads) == (
        ("s3://acme-photos",),
        "s3://gradcam/results/acme",
        "s3://uploads/acme",
    )
    assert run("tenants", "set", "acme", "--jobs-per-day", "5", "--input", "", "--scope", "read")[0] == 0
    changed = Tenants(server).get("acme")
    assert (changed.share, changed.inputs, changed.jobs_per_day, changed.scopes) == (2, (), 5, ("read",))
    code, _, errors = run("tenants", "set", "globex", "--input", "s3://uploads")
    assert (code, "invalid_policy" in errors) == (3, True)
    code, _, errors = run(
        "tenants", "set", "initech", "--output", "s3://else/initech", "--uploads", "s3://up/i"
    )
    assert (code, "GRADCAM_OUTPUT_PREFIXES" in errors) == (0, True)
    run("tenants", "remove", "initech")
    code, _, errors = run("tenants", "set", "../x")
    assert (code, "name: " in errors) == (3, True)
    assert [one.name for one in Tenants(server).find_all()] == ["acme"]


def test_a_key_is_shown_once_and_listed_without_its_secret(run: Any, server: RedisServer) -> None:
    code, _, errors = run("keys", "create", "acme")
    assert (code, "unknown_tenant" in errors) == (1, True)
    run("tenants", "set", "acme")
    code, _, errors = run("keys", "create", "acmee")
    assert "Did you mean acme?" in re.sub(r"\s+", " ", errors)
    code, output, _ = run("keys", "create", "acme", "--expires", "90d", "--note", "web [b]shop[/b]")
    key = output.strip()
    assert (code, bool(FORM.fullmatch(key))) == (0, True)
    made = json.loads(run("keys", "create", "acme", "--scope", "read", "--json")[1])
    assert (made["scopes"], made["expires_at"], made["valid"]) == (["read"], None, True)
    secrets = [key.rpartition("_")[2], made["key"].rpartition("_")[2]]
    listed, as_json = run("keys", "list", "acme")[1], run("keys", "list", "--json")[1]
    assert key.rpartition("_")[0] in as_json
    assert not any(secret in listed + as_json for secret in secrets)
    assert "digest" not in as_json
    assert "web" in listed
    record = ApiKeys(server).find(read_prefix(key) or "")
    assert record
    assert record.matches(key)
    assert record.expires_at
    assert 89 < (record.expires_at - record.created_at).total_seconds() / 86_400 < 91
    code, _, errors = run("keys", "create", "acme", "--scope", "operate")
    assert (code, "allows operate" in re.sub(r"\s+", " ", errors)) == (2, True)


def test_keys_are_revoked_by_what_is_shown_or_whole_and_with_their_tenant(run: Any) -> None:
    run("tenants", "set", "acme")
    keys = [run("keys", "create", "acme")[1].strip() for _ in range(3)]
    shown = keys[0].rpartition("_")[0]
    code, _, errors = run("keys", "revoke", shown, keys[1], "gck_000000000000")
    assert code == 1
    assert f"Key {shown} is revoked" in errors
    assert "gck_000000000000 is not known" in errors
    assert keys[1].rpartition("_")[2] not in errors
    valid = [one["valid"] for one in json.loads(run("keys", "list", "--json")[1])]
    assert valid == [False, False, True]
    code, _, errors = run("tenants", "remove", "acme")
    assert (code, "1 key revoked" in errors) == (0, True)
    assert not any(one["valid"] for one in json.loads(run("keys", "list", "--json")[1]))
    assert run("tenants", "remove", "acme")[0] == 1


def test_what_a_tenant_has_used_is_listed(run: Any, environment: Settings) -> None:
    run("tenants", "set", "acme")
    ledger = RedisLedger(environment)
    job = Job.parse({"image": "s3://acme/1.jpg", "network": "vgg16", "target": {"top_n": 1}})
    document = ledger.claim(
        ledger.submit(job, tenant=Tenant("acme")), WorkerRef(id="gpu-1:7", device="cpu")
    ).document
    ledger.finish(document, status="succeeded")
    (listed,) = json.loads(run("tenants", "list", "--json")[1])
    assert listed["name"] == "acme"
    assert sum(day["jobs"] for day in listed["usage"]) == 1
    assert "acme" in run("tenants", "list")[1]
