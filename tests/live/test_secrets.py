"""Secrets in every place that can hold one, jobs that end in every way, and a look at all that is left."""

import base64
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.cli.main import main
from gradcam_worker.errors import GradcamError, public_message
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import FINAL
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

NETWORK = "efficientnet_lite0"
WAIT_S = 120
FORGED = "2026-01-01 00:00:00,000 CRITICAL gradcam: forged"
HOSTILE = [
    f"zz\n{FORGED}",
    f"zz\r\x1b[2K\x1b[1A{FORGED}",
    "zz</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "zz\u202egpj.exe\u2066\u200b\x9b31m\0",
    "zz{{7*7}} ${jndi:ldap://x} %(message)s %s {0} [red]x[/]",
    "=zz|' /C calc'!A1",
    "zz" + "x" * 200,
]

PLANTED = {
    "redis password": "planted-redis-8d1f",
    "webhook secret": base64.b64encode(b"planted-webhook-secret-5b0a-77c1").decode(),
    "database password": "planted-database-41c9",
    "signature of a presigned URL": "planted5ignature77e2",
    "password in a URL": "planted-password-93aa",
    "token of a webhook": "planted-token-2f6e",
    "secret in place of its name": "whsec_plantedinplaceofitsname0000",
    "secret in a field that there is not": "planted-field-b7d0",
    "secret in a message that is none": "planted-garbage-60ce",
}
# Where a planted secret may be, and why; nowhere else, and any other nowhere at all.
ALLOWED = {
    # What failed can be run again, for which its job is kept as it came, and as long.
    ("signature of a presigned URL", "redis job:<id> job"),
    ("token of a webhook", "redis job:<id> job"),
    ("pixels of a data URI", "redis job:<id> job"),
    # Whom to tell, beside the job, as long as that.
    ("token of a webhook", "redis job:<id> webhooks"),
    # What a receiver has not taken is told it again, and was parked with its address.
    ("token of a webhook", "redis events:<recipient>"),
    ("token of a webhook", "redis gone"),
    ("token of a webhook", "redis later"),
    # The first bytes of an item that is no message, for the operator to see where it came from.
    ("secret in a message that is none", "redis unreadable"),
}


@dataclass
class Planted:
    """A stage on which everything that was planted has been used."""

    stage: Any
    secrets: dict[str, str]
    ids: dict[str, str]  # what was wrong -> job id
    hostile: dict[str, str]
    told: list[str]  # what was said to whoever submitted


def connect(settings: Settings) -> Any:  # whose commands have two types each
    return redis.Redis.from_url(settings.broker_url)


def guarded(stage: Any, redis_servers: dict[int, str]) -> Any:
    """The stage, with a password before its Redis, and secrets in all settings that take one."""
    url = stage.settings.broker_url
    redis.Redis.from_url(url).config_set("requirepass", PLANTED["redis password"])
    with_password = url.replace("://", f"://:{PLANTED['redis password']}@")
    redis_servers[urlsplit(url).port or 0] = with_password
    changes = {
        "broker_url": with_password,
        "webhook_secrets": f"app1=whsec_{PLANTED['webhook secret']}",
        # Nobody listens there: it is out of reach, and says so.
        "status_sql_url": f"postgresql://gradcam:{PLANTED['database password']}@127.0.0.1:1/status",
        "output_prefixes": "s3://missing/place",
    }
    plain = {
        name.removeprefix("GRADCAM_").lower(): text for name, text in stage.settings.to_environment().items()
    }
    return replace(stage, settings=Settings.model_validate(plain | changes))


def jobs(stage: Any, server: Any, answer: Any, photo: bytes) -> dict[str, dict[str, Any]]:
    """By what is wrong with them: jobs that hold secrets, as a stranger may send them."""
    signed = f"?X-Amz-Credential=AKIA&X-Amz-Signature={PLANTED['signature of a presigned URL']}"
    user = f"user:{PLANTED['password in a URL']}@"
    token = f"?token={PLANTED['token of a webhook']}"

    def at(path: str, *said: Any, **more: Any) -> dict[str, Any]:
        return {"image": server.url(f"/secret/{path}{signed}", answer(*said, **more))}

    def hook(path: str, *said: Any, **more: Any) -> dict[str, Any]:
        headers = {"retry-after": "3600"}  # where there is anything to try again
        url = server.url(f"/hook/{path}{token}", answer(*said, headers=headers))
        return {**at("photo", 200, photo), "webhooks": [{"url": url, "secret_ref": "app1", **more}]}

    stage.put("good.jpg", photo)
    good = {"image": "s3://photos/good.jpg"}
    pixels = base64.b64encode(photo).decode()
    elsewhere = f"http://{user}169.254.169.254/a{signed}"
    location = {"location": f"http://{user}{server.host}/secret/again{signed}"}
    circle = {"location": f"/secret/circle{signed}"}
    return {
        "nothing": {**at("photo", 200, photo), "artifacts": [{"kind": "report"}, {"kind": "overlay"}]},
        "nothing, data": {"image": f"data:image/jpeg;base64,{pixels}", "artifacts": [{"kind": "report"}]},
        "nothing, told": hook("well", 204),
        "receiver is gone": hook("gone", 410),
        "receiver is broken": hook("broken", 503),
        "receiver refuses": hook("refuses", 403, events=["job.started", "job.succeeded"]),
        "403": at("forbidden", 403),
        "404": at("missing", 404),
        "500": {**at("broken", 500), "max_attempts": 2},
        "too slow": {**at("slow", 200, photo, before=lambda: time.sleep(2)), "timeout_s": 0.5},
        "a page": at("page", 200, b"<html>log in</html>"),
        "cut": at("cut", 200, photo[: len(photo) // 2]),
        "leads elsewhere": at("elsewhere", 302, headers={"location": elsewhere}),
        "leads to a password": at("location", 302, headers=location),
        "in a circle": at("circle", 302, headers=circle),
        "password": {"image": f"http://{user}{server.host}/a{signed}"},
        "password with a hash": {"image": f"http://user:{PLANTED['password in a URL']}#x@{server.host}/a"},
        "password behind a hash": {"image": f"http://user:80#{PLANTED['password in a URL']}@{server.host}/a"},
        "password with a slash": {"image": f"s3://user:{PLANTED['password in a URL']}/x@photos/a.jpg"},
        "output with a hash": {**good, "output": f"s3://user:{PLANTED['password in a URL']}#x@results/a"},
        "another host": {"image": elsewhere},
        "no such port": {"image": f"http://{user}{server.host}9999/a{signed}"},
        "no URL": {"image": f"http://[{user}{signed}"},
        "scheme": {"image": f"ftp://{user}h/a{signed}"},
        "no scheme": {"image": f"{user}h/a{signed}"},
        "s3 with a password": {"image": f"s3://{user}photos/a.jpg"},
        "data": {"image": f"data:image/jpeg;base64,{pixels[:400]}!"},
        "data of no image": {"image": f"data:text/plain,{pixels[:400]}"},
        "data that is large": {"image": f"data:image/jpeg;base64,{pixels * 4}"},
        "checksum": {"image": {"uri": at("photo", 200, photo)["image"], "sha256": "0" * 64}},
        "unknown class": {**at("photo", 200, photo), "target": {"classes": ["none of them"]}},
        "unknown layer": {**at("photo", 200, photo), "method": {"layer": "none"}},
        "unknown network": {**at("photo", 200, photo), "network": "vgg61"},
        "output": {**good, "output": f"s3://{user}elsewhere/x{signed}"},
        "output that is missing": {
            **at("photo", 200, photo),
            "output": "s3://missing/place",
            "max_attempts": 1,
        },
        "webhook elsewhere": {**good, "webhooks": [{"url": f"http://h/{token}"}]},
        "webhook with a password": {**good, "webhooks": [{"url": f"http://{user}{server.host}/{token}"}]},
        "no secret": {
            **good,
            "webhooks": [
                {"url": f"http://{server.host}/", "secret_ref": PLANTED["secret in place of its name"]}
            ],
        },
        "a long secret": {
            **good,
            "webhooks": [{"url": "x", "secret_ref": PLANTED["secret in place of its name"] * 20}],
        },
        "no webhook": {**good, "webhooks": [f"http://h/{token}"]},
        "a long webhook": {**good, "webhooks": [{"url": f"http://h/{token}" * 20}]},
        "no field": {**good, "api_key": PLANTED["secret in a field that there is not"]},
        "no image": {
            "image": {"uri": f"http://{user}h", "token": PLANTED["secret in a field that there is not"]}
        },
        "image of a wrong kind": {"image": [f"http://{user}h/{signed}"]},
        "late": {**at("photo", 200, photo), "expires_at": "2020-01-01T00:00:00Z"},
    }


def hostile_jobs(stage: Any, server: Any, answer: Any, photo: bytes) -> dict[str, dict[str, Any]]:
    """Jobs whose strings try to be more than strings, wherever a string can be."""
    good = {"image": "s3://photos/good.jpg"}
    made: dict[str, dict[str, Any]] = {}
    for number, text in enumerate(HOSTILE):
        made[f"{number} metadata"] = {**good, "metadata": {text: text}, "artifacts": [{"kind": "report"}]}
        made[f"{number} image"] = {"image": f"s3://photos/{text}"}
        made[f"{number} bucket"] = {"image": f"s3://{text}/a"}
        made[f"{number} host"] = {"image": f"http://{text}/a"}
        made[f"{number} path"] = {"image": f"http://{server.host}/{text}"}
        made[f"{number} data"] = {"image": f"data:{text},x"}
        made[f"{number} uri"] = {"image": text}
        made[f"{number} class"] = {**good, "target": {"classes": [text[:128]]}}
        made[f"{number} network"] = {**good, "network": text}
        made[f"{number} layer"] = {**good, "method": {"layer": text}}
        made[f"{number} output"] = {**good, "output": f"s3://results/cams/{text}"}
        made[f"{number} webhook"] = {**good, "webhooks": [{"url": f"http://{server.host}/{text}"}]}
        made[f"{number} secret"] = {
            **good,
            "webhooks": [{"url": f"http://{server.host}/", "secret_ref": text}],
        }
        made[f"{number} field"] = {**good, text: text}
        made[f"{number} priority"] = {**good, "priority": text}
    name = "zz<img src=x onerror=alert(1)>&\u202e'\".jpg"
    broken = server.url("/zz%0A2026", answer(500))
    stage.put(name, photo)
    made["report"] = {"image": f"s3://photos/{name}", "artifacts": [{"kind": "report"}, {"kind": "overlay"}]}
    made["retried"] = {"image": broken, "max_attempts": 2}
    return made


def garbage() -> Iterator[str]:
    """Items for a queue that are no messages: some have an id by which they can be answered."""
    secret = PLANTED["secret in a message that is none"]
    yield json.dumps({"image": f"http://u:{secret}@h/?{secret}"})
    yield secret
    yield json.dumps({"body": secret, "headers": {"id": new_id(), "task": secret}, "properties": {}})
    yield json.dumps({"body": secret, "headers": {"id": new_id(), secret: secret}, "content-type": secret})


@pytest.fixture(scope="module")
def planted(
    make_stage: Callable[..., Any],
    public_server: Any,
    photos: Path,
    tmp_path_factory: pytest.TempPathFactory,
    redis_servers: dict[int, str],
) -> Iterator[Planted]:
    """All jobs are final, and the worker is still there."""
    from tests.conftest import Answer

    stage = guarded(make_stage("secrets"), redis_servers)
    photo = (photos / "coffee.jpg").read_bytes()
    pixels = base64.b64encode(photo).decode()[64:112]
    secrets = {
        **PLANTED,
        "S3 secret": stage.settings.s3_secret_access_key.get_secret_value(),
        "webhook secret, decoded": base64.b64decode(PLANTED["webhook secret"]).decode(),
        "pixels of a data URI": pixels,
    }
    defaults = {"network": NETWORK, "target": {"top_n": 1}, "max_attempts": 1}
    app, told = broker.make_app(stage.settings), list[str]()
    ids: dict[str, str] = {}
    hostile: dict[str, str] = {}
    with stage.worker("secrets", tiny=True):
        for made, kind in ((jobs, ids), (hostile_jobs, hostile)):
            for what, fields in made(stage, public_server, Answer, photo).items():
                kind[what] = new_id()
                job = {**defaults, **fields}
                try:
                    Job.parse(job)
                except GradcamError as error:
                    told += [repr(error), str(error), str(error.__cause__)]
                app.send_task(publisher.EXPLAIN, args=[job], task_id=kind[what], queue=publisher.INTERACTIVE)
        queue = connect(stage.settings)
        for item in garbage():
            queue.lpush(f"{stage.settings.key_prefix}{publisher.INTERACTIVE}", item)
        signed = jobs(stage, public_server, Answer, photo)["404"]
        for path in ("a", "b"):  # the second has the key of another job
            try:
                image = signed["image"].replace("/secret/", f"/secret/{path}")
                stage.client.submit(**defaults, image=image, idempotency_key="k")
            except GradcamError as error:
                told += [repr(error), str(error)]
        left = {*ids.values(), *hostile.values()}
        end = time.monotonic() + WAIT_S
        while left:
            documents = stage.client.statuses(left)
            left -= {job_id for job_id, one in documents.items() if one.status in FINAL}
            missing = [what for what, job_id in {**ids, **hostile}.items() if job_id in left]
            assert time.monotonic() < end, missing
            time.sleep(0.2)
        while queue.exists(*(f"{stage.settings.key_prefix}{name}" for name in ("gone", "later"))) < 2:
            assert time.monotonic() < end, "not every webhook has answered"
            time.sleep(0.2)
        yield Planted(stage, secrets, ids, hostile, told)


def values_of(server: Any, name: bytes) -> list[tuple[bytes, bytes]]:
    """What a key holds: field (only a hash has them) and value."""
    match server.type(name):
        case b"string":
            values = [server.get(name)]
        case b"hash":
            return list(server.hgetall(name).items())
        case b"list":
            values = server.lrange(name, 0, -1)
        case b"set":
            values = server.smembers(name)
        case b"zset":
            values = server.zrange(name, 0, -1)
    return [(b"", value) for value in values]


def in_redis(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every key and value, by the kind of its key."""
    server = connect(settings)
    for name in server.scan_iter():
        key = name.decode(errors="replace").removeprefix(settings.key_prefix)
        kind = re.sub(r"^(job|idempotency|events|lane):.*", r"\1:<...>", key)
        kind = kind.replace("job:<...>", "job:<id>").replace("events:<...>", "events:<recipient>")
        yield f"redis {kind}", key
        for field, value in values_of(server, name):
            shown = f" {field.decode()}" if kind.startswith("job:") else ""
            yield f"redis {kind}{shown}", f"{field.decode(errors='replace')} {value.decode(errors='replace')}"


def processes() -> Iterator[str]:
    """How each process of this machine was called, which anyone may read."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:  # it has ended
            continue


def shown_by_commands(
    planted: Planted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """What an operator is shown."""
    for name, value in planted.stage.settings.to_environment().items():
        monkeypatch.setenv(name, value)
    for job_id in planted.ids.values():
        for more in ([], ["--json"]):
            main(["status", job_id, *more])
            shown = capsys.readouterr()
            yield "gradcam status", shown.out + shown.err
    main(["doctor"])
    shown = capsys.readouterr()
    assert "broker: redis://127.0.0.1" in shown.out
    yield "gradcam doctor", shown.out + shown.err


def all_that_is_left(planted: Planted, server: Any) -> Iterator[tuple[str, str]]:
    """Where -> what stands there."""
    stage = planted.stage
    for path in stage.logs.glob("*.log"):
        yield f"log {path.stem}", path.read_text(errors="replace")
    yield from in_redis(stage.settings)
    for path in (stage.logs / "buckets" / "results").rglob("*"):
        yield "bucket", str(path)
        if path.is_file():
            yield f"bucket {path.name}", path.read_text(errors="replace")
    for path, body in server.received:
        if path.startswith("/hook/"):
            yield "webhook", body.decode()
    yield "webhook headers", json.dumps([one for one in server.headers if "webhook-id" in one])
    for text in processes():
        yield "process", text
    for text in planted.told:
        yield "told", text
    yield "settings", repr(stage.settings)


def test_no_secret_is_left_anywhere_but_where_it_is_needed(
    planted: Planted,
    public_server: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    looked = set()
    left = [
        *all_that_is_left(planted, public_server),
        *shown_by_commands(planted, capsys, monkeypatch),
    ]
    for place, text in left:
        looked.add(place)
        for what, secret in planted.secrets.items():
            if secret in text:
                at = text.index(secret)
                found[what, place].append(text[max(at - 200, 0) : at + 50])
    assert {"log secrets", "redis job:<id> document", "bucket manifest.json", "webhook", "process"} <= looked
    leaks = [f"{where}: {texts[0]!r}" for where, texts in found.items() if where not in ALLOWED]
    assert not leaks, "\n".join(leaks)
    assert found.keys() == ALLOWED, "and there each of them is found"


def test_each_job_ended_as_it_should(planted: Planted) -> None:
    documents = planted.stage.client.statuses(planted.ids.values())
    ends = {
        what: (documents[job_id].error.code if documents[job_id].error else documents[job_id].status)
        for what, job_id in planted.ids.items()
    }
    assert {code for what, code in ends.items() if what.startswith(("nothing", "receiver"))} == {"succeeded"}
    assert ends["403"] == "image_forbidden"
    assert ends["500"] == "image_fetch_failed"
    assert ends["too slow"] == "timeout"
    assert ends["output that is missing"] in {"storage_unavailable", "output_not_allowed"}
    assert ends["no secret"] == "invalid_job"
    assert ends["checksum"] == "checksum_mismatch"
    assert len(set(ends.values())) > 10, "in every way"


def test_what_succeeded_has_left_nothing_of_its_job_in_the_ledger(planted: Planted) -> None:
    held = connect(planted.stage.settings).hgetall(
        f"{planted.stage.settings.key_prefix}job:{planted.ids['nothing, told']}"
    )
    assert (held[b"job"], held[b"webhooks"]) == (b"null", b"")


def test_no_line_of_the_log_was_written_by_a_job(planted: Planted) -> None:
    text = (planted.stage.logs / "secrets.log").read_text()
    lines = text.split("\n")
    stray = [line for line in lines if not line.isprintable() or line.startswith(FORGED[:10])]
    assert not stray
    own = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: |    "
    assert not [line for line in lines if "zz" in line and not re.match(own, line)]
    assert "message_handling_failed" not in text
    assert [line for line in lines if "zz" in line], "some of them were told of"


def test_hostile_strings_end_typed_and_act_on_no_terminal(
    planted: Planted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = planted.stage.client.statuses(planted.hostile.values())
    ends = {
        what: documents[job_id].error.code if documents[job_id].error else documents[job_id].status
        for what, job_id in planted.hostile.items()
    }
    assert "internal" not in ends.values(), ends
    assert {ends[what] for what in ends if what.endswith("metadata") or what == "report"} == {"succeeded"}
    for name, value in planted.stage.settings.to_environment().items():
        monkeypatch.setenv(name, value)
    for job_id in planted.hostile.values():
        main(["status", job_id])
        shown = capsys.readouterr()
        lines = (shown.out + shown.err).split("\n")
        assert not [line for line in lines if not line.isprintable() or line.startswith(FORGED[:10])]


def test_no_name_in_the_bucket_came_from_a_stranger_and_no_page_has_markup_of_theirs(
    planted: Planted,
) -> None:
    results = planted.stage.logs / "buckets" / "results"
    names = [str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()]
    assert names
    assert not [name for name in names if not re.fullmatch(r"[\w./-]+", name, re.ASCII) and "zz" not in name]
    (path,) = results.glob(f"cams/{planted.hostile['report']}/report.html")
    page = path.read_text()
    assert "onerror" in page, "the image is named"
    assert "<img src=x" not in page
    block = page.partition('id="data">')[2].partition("</script>")[0]
    assert not re.search(r"[<>&\u0080-\uffff]", block)
    assert "onerror" not in page.replace(block, "")


def test_what_end_users_are_told_names_nothing_of_the_service(planted: Planted) -> None:
    settings = planted.stage.settings
    names = ["GRADCAM", "photos", "results", "secret", "127.0.0.1", "169.254", "s3://", "http", "zz"]
    names += [*planted.secrets.values(), settings.s3_access_key_id]
    documents = planted.stage.client.statuses([*planted.ids.values(), *planted.hostile.values()])
    problems = [one.error for one in documents.values() if one.error]
    assert len({one.code for one in problems}) > 10
    for problem in problems:
        assert problem.public_message == public_message(problem.code)
        assert not [name for name in names if name in problem.public_message]
