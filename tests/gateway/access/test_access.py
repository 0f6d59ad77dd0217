"""Keys, policies and limits, in a real Valkey; what a caller may do, and that no trick lets it do more."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from gradcam_worker.errors import (
    GradcamError,
    InvalidApiKey,
    InvalidJob,
    InvalidPolicy,
    LedgerUnavailable,
    OutputNotAllowed,
    QuotaExceeded,
    RateLimited,
    ScopeMissing,
    StorageUnavailable,
    UnknownTenant,
    UriNotAllowed,
)
from gradcam_worker.gateway.access import api_keys
from gradcam_worker.gateway.access import caller as caller_module
from gradcam_worker.gateway.access.api_keys import ApiKey, ApiKeys
from gradcam_worker.gateway.access.caller import Access, Caller, is_this_machine
from gradcam_worker.gateway.access.tenants import TenantPolicy, Tenants
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings

T = TypeVar("T")
HOST = "127.0.0.1:8000"
ACME = TenantPolicy.make(
    name="acme",
    share=2,
    inputs=["s3://acme-photos", "https://cdn.acme.example/photos"],
    output="s3://results/acme",
    uploads="s3://uploads/acme",
    webhook_hosts=["hooks.acme.example"],
    webhook_secrets=["acme"],
)
CALLER = Caller(ACME, frozenset(ACME.scopes), "gck_0", ACME.uploads)


@pytest.fixture
def server(settings: Settings) -> Iterator[RedisServer]:
    server = RedisServer(settings)
    yield server
    server.redis.delete(f"{settings.key_prefix}tenants", f"{settings.key_prefix}api_keys")
    server.close()


@pytest.fixture
def access(server: RedisServer, settings: Settings) -> Access:
    return Access(settings, loopback=True)


@pytest.fixture
def make_key(server: RedisServer) -> Callable[..., str]:
    """Make a key of a tenant, which is made, too."""
    Tenants(server).store(ACME)

    def make(tenant: str = "acme", **options: Any) -> str:
        key, record = ApiKey.make(tenant, **options)
        ApiKeys(server).store(record)
        return key

    return make


def bearer(access: Access, key: str) -> Caller:
    return asyncio.run(access.authenticate(f"Bearer {key}"))


def run(awaitable: Awaitable[T]) -> T:
    async def main() -> T:
        return await awaitable

    return asyncio.run(main())


def test_a_key_tells_its_tenant_and_its_scopes(access: Access, make_key: Callable[..., str]) -> None:
    caller = bearer(access, make_key(scopes=("read", "operate")))
    assert caller.tenant == Tenant("acme", 2)
    assert caller.tenant_name == "acme"
    assert caller.scopes == {"read"}, "no more than the tenant may do"
    assert caller.uploads == "s3://uploads/acme"
    caller.check_scope("read")
    with pytest.raises(ScopeMissing, match=r"gck_\w{12} lacks the scope submit: it has read"):
        caller.check_scope("submit")


def test_only_a_salted_hash_of_a_key_is_stored(server: RedisServer, make_key: Callable[..., str]) -> None:
    keys = [make_key(), make_key()]
    stored: Any = server.redis.hgetall(f"{server.prefix}api_keys")
    secret = keys[0].rpartition("_")[2]
    assert secret not in str(stored)
    assert len({ApiKey.model_validate_json(text).salt for text in stored.values()}) == 2
    assert api_keys.FORM.fullmatch(keys[0])
    assert api_keys.read_prefix(keys[0]) in stored


def altered(key: str, at: int) -> str:
    return key[:at] + ("a" if key[at] != "a" else "b") + key[at + 1 :]


def test_no_other_text_than_a_key_is_one(access: Access, make_key: Callable[..., str]) -> None:
    key, other = make_key(), make_key()
    prefix = key[:17]
    forged_body = prefix + "A" * api_keys.SECRET_LENGTH
    forged = forged_body + api_keys._checksum(forged_body)
    unknown, _ = ApiKey.make("acme")
    headers = [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {key}",
        key,
        f"Bearer {key} x",
        f"Bearer {key}\u0130",
        f"Bearer {key.upper()}",
        f"Bearer {key[:-1]}",
        f"Bearer {altered(key, -1)}",
        f"Bearer {altered(key, 20)}",
        f"Bearer {altered(key, 6)}",
        f"Bearer {forged}",
        f"Bearer {unknown}",
        f"Bearer {prefix}{other[17:]}",
        "Bearer gck_*",
        "Bearer " + "x" * 100_000,
    ]
    texts = set()
    for header in headers:
        with pytest.raises(InvalidApiKey) as caught:
            asyncio.run(access.authenticate(header))
        texts.add(str(caught.value))
    assert texts == {caller_module.WRONG_KEY}, "nothing tells a known prefix from an unknown one"
    assert bearer(access, key).tenant_name == "acme"
    assert asyncio.run(access.authenticate(f"bearer  {key} ")).tenant_name == "acme"


def test_an_expired_and_a_revoked_key_say_so_to_whoever_has_them_whole(
    access: Access, server: RedisServer, make_key: Callable[..., str]
) -> None:
    expired = make_key(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(InvalidApiKey, match=r"gck_\w{12} expired at"):
        bearer(access, expired)
    revoked = make_key()
    record = ApiKeys(server).find(api_keys.read_prefix(revoked) or "")
    assert record
    assert ApiKeys(server).revoke(ApiKeys(server).revoke(record)).revoked_at
    with pytest.raises(InvalidApiKey, match=r"gck_\w{12} was revoked at"):
        bearer(access, revoked)


def test_a_revoked_key_and_a_changed_policy_count_when_the_cache_is_over(
    access: Access, server: RedisServer, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "CACHE_S", 3600)
    key = make_key()
    assert bearer(access, key).scopes == {"read", "submit"}
    record = ApiKeys(server).find(api_keys.read_prefix(key) or "")
    assert record
    Tenants(server).store(ACME.model_copy(update={"scopes": ("read",)}))
    assert bearer(access, key).scopes == {"read", "submit"}, "from the cache"
    monkeypatch.setattr(caller_module, "CACHE_S", 0)
    assert bearer(access, key).scopes == {"read"}
    ApiKeys(server).revoke(record)
    with pytest.raises(InvalidApiKey):
        bearer(access, key)
    other = make_key()
    Tenants(server).remove("acme")
    with pytest.raises(InvalidApiKey):
        bearer(access, other)


def test_a_key_that_was_known_is_not_let_in_while_redis_is_away(
    make_key: Callable[..., str], server: RedisServer, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(broker_url=f"redis://127.0.0.1:{free_port}/0")
    away = Access(settings, loopback=True)
    with pytest.raises(LedgerUnavailable):
        bearer(away, make_key())
    with pytest.raises(LedgerUnavailable):
        asyncio.run(away.authenticate(None, host=HOST))


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (HOST, None),
        ("localhost", None),
        ("LOCALHOST:8000", "http://localhost:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("127.9.9.9", None),
    ],
)
def test_without_any_key_the_one_user_of_this_machine_may_do_everything(
    access: Access, host: str, origin: str | None
) -> None:
    caller = asyncio.run(access.authenticate(None, host=host, origin=origin))
    assert (caller.tenant, caller.tenant_name, caller.policy) == (None, None, None)
    caller.check_scope("operate")
    job = Job.parse({"id": "0" * 26, "image": "file:///etc/x", "network": "n", "target": {"top_n": 1}})
    assert caller.check_job(job) is job


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        (None, None),
        ("", None),
        ("evil.example", None),  # DNS rebinding
        ("evil.example:8000", "http://evil.example:8000"),
        ("127.0.0.1.evil.example", None),
        ("localhost.evil.example", None),
        ("localhost@evil.example", None),
        ("2130706433", None),
        ("0.0.0.0:8000", None),
        ("[::ffff:10.0.0.1]:8000", None),
        (HOST, "http://evil.example"),  # a form of another page
        (HOST, "null"),  # a sandboxed frame, a file
        (HOST, "http://127.0.0.1:9000"),
        (HOST, "http://evil@127.0.0.1:8000"),
        (HOST, ""),
    ],
)
def test_a_strangers_page_in_the_users_browser_may_do_nothing(
    access: Access, host: str | None, origin: str | None
) -> None:
    with pytest.raises(InvalidApiKey, match="No API key was sent"):
        asyncio.run(access.authenticate(None, host=host, origin=origin))


def test_a_page_that_the_operator_allows_may_ask_for_the_one_user(settings: Settings) -> None:
    allowing = settings.model_copy(update={"serve_origins": ("http://localhost:3000",)})
    access = Access(allowing, loopback=True)
    assert asyncio.run(access.authenticate(None, host=HOST, origin="http://localhost:3000")).policy is None
    with pytest.raises(InvalidApiKey):
        asyncio.run(access.authenticate(None, host=HOST, origin="http://localhost:3001"))
    with pytest.raises(InvalidApiKey):
        asyncio.run(access.authenticate(None, host="evil.example", origin="http://localhost:3000"))


def test_whoever_listens_for_others_needs_a_key_and_so_does_everybody_once_there_is_one(
    settings: Settings, server: RedisServer, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = Access(settings)
    with pytest.raises(InvalidApiKey, match="gradcam keys create"):
        asyncio.run(public.authenticate(None, host=HOST))
    assert asyncio.run(access.authenticate(None, host=HOST)).policy is None
    _, record = ApiKey.make("acme")
    ApiKeys(server).revoke(record)  # stored: also one that is not valid counts
    monkeypatch.setattr(caller_module, "CACHE_S", 0)
    access._keyless_until = 0
    with pytest.raises(InvalidApiKey):
        asyncio.run(access.authenticate(None, host=HOST))


def job(**fields: Any) -> Job:
    return Job.parse(
        {"image": "s3://acme-photos/1.jpg", "network": "vgg16", "target": {"top_n": 1}, **fields}
    )


def test_a_job_gets_its_tenants_output() -> None:
    checked = CALLER.check_job(job())
    assert checked.output == "s3://results/acme"
    assert checked.image.redirects
    assert CALLER.check_job(job(output="s3://results/acme/")).output == "s3://results/acme/"
    assert CALLER.check_job(job(output="s3://results/acme/2031")).output == "s3://results/acme/2031"
    assert CALLER.check_job(job(image="s3://uploads/acme/1.jpg"))
    hook = {"url": "https://hooks.acme.example/a?b=c", "secret_ref": "acme"}
    assert CALLER.check_job(job(webhooks=[hook])).webhooks[0].url == hook["url"]


def test_a_web_address_of_a_tenant_may_not_redirect() -> None:
    image = {"uri": "HTTPS://cdn.acme.example/photos/1.jpg", "redirects": True}
    assert not CALLER.check_job(job(image=image)).image.redirects
    mask = {"mask": {"uri": "https://cdn.acme.example/photos/1.png"}}
    assert not CALLER.check_job(job(annotations=mask)).image.redirects


def test_a_backfill_reads_lists_and_images_of_its_tenants_buckets() -> None:
    for uri in (
        "s3://acme-photos/",
        "s3://acme-photos",
        "s3://acme-photos/2031/",
        "s3://acme-photos/list.csv",
    ):
        CALLER.check_list(uri)
    for uri in ("s3://globex-photos/", "s3://acme-photos/../globex-photos/", "s3://", "s3://acme-photos-2/"):
        with pytest.raises(UriNotAllowed, match="must be below s3://acme-photos"):
            CALLER.check_list(uri)
    assert ACME.allows_row("s3://acme-photos/1.jpg")
    assert not ACME.allows_row("https://cdn.acme.example/photos/1.jpg"), "which could redirect"
    assert not ACME.allows_row("s3://globex-photos/1.jpg")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"id": "0" * 26}, InvalidJob),  # perhaps another tenant's
        ({"priority": "high"}, InvalidJob),
        ({"image": "s3://globex-photos/1.jpg"}, UriNotAllowed),
        ({"image": "s3://uploads/globex/1.jpg"}, UriNotAllowed),
        ({"image": "s3://uploads/acme/../globex/1.jpg"}, UriNotAllowed),
        ({"image": "s3://results/globex/1.jpg"}, UriNotAllowed),
        ({"image": "https://cdn.acme.example/photos/%2e%2e/globex/1.jpg"}, UriNotAllowed),
        ({"image": "file:///etc/passwd"}, UriNotAllowed),
        ({"annotations": {"mask": {"uri": "s3://globex-photos/1.png"}}}, UriNotAllowed),
        ({"image": "data:image/png;base64,planted"}, UriNotAllowed),
        ({"output": "s3://results"}, OutputNotAllowed),
        ({"output": "s3://results/globex"}, OutputNotAllowed),
        ({"output": "s3://results/acme-2"}, OutputNotAllowed),
        ({"output": "s3://results/acme/../globex"}, OutputNotAllowed),
        ({"output": "s3://results/acme/%2e%2e/globex"}, OutputNotAllowed),
        ({"output": "file:///srv"}, OutputNotAllowed),
        ({"output": ""}, None),  # as if none were named
        ({"webhooks": [{"url": "https://evil.example/"}]}, UriNotAllowed),
        ({"webhooks": [{"url": "https://hooks.acme.example:8443/"}]}, UriNotAllowed),
        ({"webhooks": [{"url": "https://hooks.acme.example\\.evil.example/"}]}, UriNotAllowed),
        ({"webhooks": [{"url": "https://hooks.acme.example/", "secret_ref": "globex"}]}, InvalidJob),
    ],
)
def test_a_job_stays_within_its_tenants_policy(
    fields: dict[str, Any], error: type[GradcamError] | None
) -> None:
    if error is None:
        assert CALLER.check_job(job(**fields)).output == ACME.output
        return
    with pytest.raises(error) as caught:
        CALLER.check_job(job(**fields))
    assert "planted" not in str(caught.value)


def test_a_tenant_sees_no_details_that_name_the_places_of_others(document: StatusDocument) -> None:
    seen = CALLER.visible(document)
    assert seen.error
    assert seen.error.detail == seen.error.public_message == StorageUnavailable.public_message
    assert (seen.error.code, seen.error.retryable) == ("storage_unavailable", True)
    assert "planted" not in seen.to_json()
    one_user = Caller(None, frozenset(), "", None)
    assert one_user.visible(document) is document


@pytest.fixture
def document() -> StatusDocument:
    now = datetime.now(UTC)
    error = StorageUnavailable("s3://planted/globex could not be written.")
    return StatusDocument(
        id="0" * 26,
        status="failed",
        max_attempts=3,
        created_at=now,
        queued_at=now,
        updated_at=now,
        worker=WorkerRef(id="planted-host:7", device="cpu"),
        error=Problem.of(error, stage="upload", attempt=1),
    )


def counted(access: Access, caller: Caller, **jobs: Any) -> str:
    """Count a request, or jobs; return the error's code."""
    try:
        run(access.admit_jobs(caller, **jobs) if jobs else access.admit(caller))
    except (RateLimited, QuotaExceeded) as error:
        return error.code if error.retry_after_s > 0 else "no time"
    return ""


def limited(**limits: Any) -> Caller:
    policy = TenantPolicy.make(name="acme", output="s3://results/acme", **limits)
    return Caller(policy, frozenset(), "gck_0", None)


def test_a_tenant_makes_so_many_requests_at_once_and_then_so_many_per_second(
    access: Access, server: RedisServer
) -> None:
    slow = limited(rate=0.01, burst=3)
    assert [counted(access, slow) for _ in range(5)] == ["", "", "", "rate_limited", "rate_limited"]
    other = slow.policy and Caller(slow.policy.model_copy(update={"name": "globex"}), frozenset(), "", None)
    assert other
    assert counted(access, other) == "", "each tenant has its own"
    with pytest.raises(RateLimited, match=r"0\.01 per second, and 3 at once") as caught:
        run(access.admit(slow))
    assert 0 < caught.value.retry_after_s <= 100, "a refused request costs nothing"
    fast = limited(rate=100_000, burst=1)
    server.redis.delete(f"{server.prefix}rate:acme")
    assert {counted(access, fast) for _ in range(20)} == {""}
    assert counted(access, Caller(None, frozenset(), "", None)) == ""


def test_a_tenant_submits_so_many_jobs_a_day_and_a_repeated_request_is_free(access: Access) -> None:
    caller = limited(jobs_per_day=4)
    assert counted(access, caller, jobs=2) == ""
    assert counted(access, caller, jobs=3) == "quota_exceeded", "which counts nothing"
    assert counted(access, caller, jobs=1, idempotency_key="k") == ""
    assert counted(access, caller, jobs=1, idempotency_key="k") == ""
    assert counted(access, caller, jobs=1) == ""
    assert counted(access, caller, jobs=1, idempotency_key="\udcff") == "quota_exceeded"
    assert counted(access, caller, jobs=1, idempotency_key="k") == "", "its job is found after a lost answer"
    assert counted(access, caller) == "", "the other requests go on"
    with pytest.raises(QuotaExceeded, match="has submitted its 4 jobs") as caught:
        run(access.admit_jobs(caller))
    assert caught.value.retry_after_s <= 86_400


def test_a_tenant_holds_so_many_streams_at_a_time(access: Access) -> None:
    caller = limited(streams=2)

    async def hold() -> None:
        async with access.stream(caller), access.stream(caller):
            with pytest.raises(RateLimited, match="2 requests open"):
                await access.stream(caller).__aenter__()
        async with access.stream(caller), access.stream(Caller(None, frozenset(), "", None)):
            pass

    asyncio.run(hold())
    assert not access._streams["acme"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "Acme"},
        {"name": "a/b"},
        {"name": "acme\n"},
        {"share": 0},
        {"share": float("nan")},
        {"inputs": ["photos"]},
        {"output": ""},
        {"output": "s3://results/../globex"},
        {"output": "https://results/acme"},
        {"uploads": "s3://user:planted@uploads/acme"},
        {"webhook_hosts": ["*"]},
        {"scopes": ["everything"]},
        {"rate": 0},
        {"jobs_per_day": -1},
        {"limit": 7},
    ],
)
def test_what_is_no_policy_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidPolicy, match="no policy of a tenant") as caught:
        TenantPolicy.make(**{"name": "acme", "output": "s3://results/acme", **changes})
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "s3://results/acme"},
        {"output": "s3://results/acme/globex"},
        {"output": "s3://results"},
        {"output": "s3://uploads/acme/x"},
        {"uploads": "s3://results/acme"},
        {"inputs": ["s3://uploads"]},
        {"inputs": ["s3://results/acme/2031"]},
        {"inputs": ["*"]},
    ],
)
def test_no_tenant_reaches_into_the_places_of_another(server: RedisServer, changes: dict[str, Any]) -> None:
    tenants = Tenants(server)
    tenants.store(ACME)
    tenants.store(ACME)
    other = {"name": "globex", "output": "s3://results/globex", "uploads": "s3://uploads/globex"}
    with pytest.raises(InvalidPolicy, match="own"):
        tenants.store(TenantPolicy.make(**{**other, **changes}))
    shared = ["data:", *ACME.inputs]
    tenants.store(TenantPolicy.make(**{**other, "inputs": shared}))
    assert [one.name for one in tenants.find_all()] == ["acme", "globex"]
    with pytest.raises(InvalidPolicy, match="own"):
        tenants.store(ACME.model_copy(update={"inputs": ("s3://uploads/globex",)}))


def test_a_policy_of_a_later_version_is_not_half_applied(server: RedisServer, access: Access) -> None:
    text = ACME.to_json().replace("{", '{"networks": ["vgg16"], ', 1)
    server.redis.hset(f"{server.prefix}tenants", "acme", text)
    key, record = ApiKey.make("acme")
    ApiKeys(server).store(record)
    with pytest.raises(InvalidPolicy, match="cannot be read by this version: networks: unknown field"):
        bearer(access, key)
    server.redis.hdel(f"{server.prefix}tenants", "acme")
    with pytest.raises(UnknownTenant, match="no tenant 'x'"):
        Tenants(server).get("x")


def test_which_names_are_this_machine() -> None:
    for host in ("localhost", "localhost:80", "127.0.0.1", "[::1]", "[::1]:80", "::1"):
        assert is_this_machine(host), host
    for host in ("localhost.:80", "0.0.0.0:80", "::", "2001:db8::1", "::ffff:10.0.0.1", "gateway"):
        assert not is_this_machine(host), host
