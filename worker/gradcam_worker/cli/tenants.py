"""The commands about who may use the HTTP API: tenants, keys."""

from typing import Any, get_args

import click

from gradcam_worker.cli.options import json_option, parse_duration
from gradcam_worker.errors import UnknownTenant
from gradcam_worker.gateway.access.api_keys import MARK, ApiKey, ApiKeys, expiry
from gradcam_worker.gateway.access.tenants import SCOPES, TenantPolicy, Tenants
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Priority
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

LISTS = ("inputs", "webhook_hosts", "webhook_secrets", "priorities", "scopes")  # options that may be repeated


@click.group()
def tenants() -> None:
    """Say who may use the HTTP API, and for what."""


@tenants.command("set")
@click.argument("name")
@click.option(
    "--input",
    "inputs",
    metavar="PREFIX",
    multiple=True,
    help="Where images may come from: s3://bucket/folder, https://host/folder, data: or *; may be repeated. "
    "[its uploads alone]",
)
@click.option("--output", help="Where results are stored. [NAME below GRADCAM_OUTPUT]")
@click.option("--uploads", help="Where uploads are stored. [NAME below GRADCAM_UPLOADS]")
@click.option(
    "--webhook-host",
    "webhook_hosts",
    metavar="HOST",
    multiple=True,
    help="Receiver that jobs may name, written as in GRADCAM_WEBHOOK_HOSTS; may be repeated. [none]",
)
@click.option(
    "--webhook-secret",
    "webhook_secrets",
    metavar="NAME",
    multiple=True,
    help="Name of a secret that webhooks may be signed with; may be repeated. [none]",
)
@click.option(
    "--priority",
    "priorities",
    type=click.Choice(get_args(Priority)),
    multiple=True,
    help="Priority that jobs may have; may be repeated. [normal low bulk]",
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    help="What its keys may do at most; may be repeated. [read submit]",
)
@click.option("--share", type=float, help="Part of the workers, in relation to other tenants. [1]")
@click.option("--rate", type=float, help="Requests per second. [50]")
@click.option("--burst", type=int, help="Requests at once. [100]")
@click.option("--jobs-per-day", type=int, help="Jobs on one day (UTC); 0: no limit. [0]")
@click.option("--streams", type=int, help="Requests that wait or stream events, at a time. [50]")
def set_tenant(name: str, **given: Any) -> int:
    """Make the tenant NAME, or change it.

    Options that are not given leave a tenant as it is; an empty text removes a list. A gateway applies the
    change within 5 seconds.

    \b
    Example:
      gradcam tenants set acme --input s3://acme-photos --jobs-per-day 1000
      gradcam tenants set acme --share 2
    """
    settings = Settings.from_environment()
    known = Tenants(RedisLedger(settings).server)
    changes = {key: value for key, value in given.items() if value not in {None, ()}}
    changes |= {key: [item for item in changes[key] if item] for key in LISTS if key in changes}
    present = known.find(name)
    places = {"output": f"{settings.output.rstrip('/')}/{name}"}
    if settings.uploads:
        places["uploads"] = f"{settings.uploads.rstrip('/')}/{name}"
    before = present.model_dump() if present else {"name": name, **places}
    policy = TenantPolicy.make(**{**before, **changes})
    known.store(policy)
    console.err.print(f"Tenant {name} is {'changed' if present else 'made'}.", markup=False)
    if not present:
        console.err.print(f"`gradcam keys create {name}` makes a key for it.", markup=False)
    if not policy.uploads:
        note = "It can upload no image: GRADCAM_UPLOADS is not set here, and --uploads was not given."
        console.err.print(note, markup=False)
    allowed = [prefix for prefix in (settings.output, *settings.output_prefixes) if prefix]
    if not any(f"{policy.output}/".startswith(f"{prefix.rstrip('/')}/") for prefix in allowed):
        note = (
            f"Workers refuse its output {policy.output} unless GRADCAM_OUTPUT_PREFIXES allows it there: here"
        )
        console.err.print(f"{note} {' and '.join(allowed) or 'nothing'} would be allowed.", markup=False)
    console.print_json(policy.model_dump(mode="json"))
    return 0


@tenants.command("list")
@click.option("--days", type=click.IntRange(1, 366), default=7, show_default=True, help="Days of usage.")
@json_option()
def list_tenants(*, days: int, as_json: bool) -> int:
    """List the tenants, and what each has used: jobs that ended, and their seconds on the device.

    \b
    Example:
      gradcam tenants list --days 30
    """
    ledger = RedisLedger(Settings.from_environment())
    usage = {policy: ledger.read_usage(policy.name, days) for policy in Tenants(ledger.server).find_all()}
    if as_json:
        console.print_json(
            [
                {
                    **policy.model_dump(mode="json"),
                    "usage": [
                        {"day": str(day.day), "jobs": day.jobs, "device_s": day.device_s} for day in used
                    ],
                }
                for policy, used in usage.items()
            ]
        )
    else:
        console.show_tenants(usage, days)
    return 0


@tenants.command("remove")
@click.argument("name")
def remove_tenant(name: str) -> int:
    """Remove the tenant NAME, and revoke its keys. Its jobs go on, and its results stay.

    \b
    Example:
      gradcam tenants remove acme
    """
    server = RedisLedger(Settings.from_environment()).server
    known, api_keys = Tenants(server), ApiKeys(server)
    records = [record for record in api_keys.find_all() if record.tenant == name and not record.revoked_at]
    for record in records:
        api_keys.revoke(record)
    if not known.remove(name):
        message = f"There is no tenant {name!r}."
        raise UnknownTenant(message)
    console.err.print(f"Tenant {name} is removed, {counted(len(records), 'key')} revoked.", markup=False)
    return 0


@click.group()
def keys() -> None:
    """Make and revoke the API keys of tenants."""


@keys.command()
@click.argument("tenant")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    help="What the key may do; may be repeated. [all that its tenant may do]",
)
@click.option(
    "--expires",
    "expires_s",
    callback=parse_duration,
    metavar="12h|90d",
    help="How long the key is valid. [until it is revoked]",
)
@click.option("--note", default="", help="What the key is for.")
@json_option()
def create(tenant: str, scopes: tuple[Any, ...], expires_s: float | None, note: str, *, as_json: bool) -> int:
    """Make an API key of TENANT, and print it. It is shown only now: only a hash is stored.

    \b
    Example:
      gradcam keys create acme --expires 90d --note "web shop"
      gradcam keys create acme --scope read
    """
    server = RedisLedger(Settings.from_environment()).server
    policy = Tenants(server).get(tenant)
    if beyond := [scope for scope in scopes if scope not in policy.scopes]:
        allowed = ", ".join(policy.scopes)
        message = f"tenant {tenant} may have {allowed}: `gradcam tenants set {tenant}` allows {beyond[0]}"
        raise click.BadParameter(message, param_hint="--scope")
    key, record = ApiKey.make(
        tenant, scopes=scopes or policy.scopes, expires_at=expiry(expires_s), note=note[:256]
    )
    ApiKeys(server).store(record)
    if as_json:
        console.print_json({"key": key, **_facts(record)})
    else:
        console.err.print("Keep it secret. It is not shown again.")
        click.echo(key)
    return 0


@keys.command("list")
@click.argument("tenant", required=False)
@json_option()
def list_keys(tenant: str | None, *, as_json: bool) -> int:
    """List the API keys, without their secrets: of TENANT, or all.

    \b
    Example:
      gradcam keys list acme
    """
    server = RedisLedger(Settings.from_environment()).server
    if tenant:
        Tenants(server).get(tenant)
    records = [record for record in ApiKeys(server).find_all() if tenant in {None, record.tenant}]
    if as_json:
        console.print_json([_facts(record) for record in records])
    else:
        console.show_api_keys(records)
    return 0


@keys.command()
@click.argument("prefixes", nargs=-1, required=True, metavar="PREFIX...")
def revoke(prefixes: tuple[str, ...]) -> int:
    """Revoke API keys. Gateways refuse them within 5 seconds.

    PREFIX is what `gradcam keys list` shows. A whole key is taken, too. Exit code 1 if a key is not known.

    \b
    Example:
      gradcam keys revoke gck_4f0s1kq8zt2m
    """
    api_keys = ApiKeys(RedisLedger(Settings.from_environment()).server)
    unknown = 0
    for given in prefixes:
        prefix = given.removeprefix(f"{MARK}_").partition("_")[0]
        record = api_keys.find(prefix)
        unknown += record is None
        if record:
            api_keys.revoke(record)
        done = f"is revoked, of tenant {record.tenant}" if record else "is not known"
        console.err.print(f"Key {MARK}_{prefix[:64]} {done}.", markup=False)
    return 1 if unknown else 0


def _facts(record: ApiKey) -> dict[str, Any]:
    """A key as JSON, without salt and hash."""
    facts = record.model_dump(mode="json", exclude={"salt", "digest"})
    return facts | {"prefix": f"{MARK}_{record.prefix}", "valid": record.problem(utc_now()) is None}
