"""The worker's own keys for S3, from where boto3 finds them: environment, files, web identity, the machine.

Every failure to find or renew them is `IdentityFailed`, so that it is not confused with the server's answer
about a job's object. Until keys are found, each request searches again, at most once in RETRY_AFTER_S.

Botocore renews keys of which it knows when they expire. Others, as those of a file that an agent rotates, it
reads once and keeps: here they are read again every REREAD_AFTER_S, and all keys when a server refuses them.
"""

import gzip
import json
import math
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.credentials import (
    Credentials,
    RefreshableCredentials,
    create_credential_resolver,
)
from botocore.exceptions import NoCredentialsError
from botocore.loaders import JSONFileLoader
from botocore.session import Session

from gradcam_worker.storage.s3_errors import IDENTITY_CODES, IdentityFailed

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 3, 5  # of STS and other sources of keys
RETRY_AFTER_S = 1.0  # after a failed search; jobs that need keys in between fail at once
REREAD_AFTER_S = 60.0  # agents write new keys minutes before the old ones expire
SERVICES = frozenset({"oidc", "portal.sso", "s3", "sts"})  # that are asked for objects or keys, by endpoint
REFUSED_AFTER_S = 5.0  # between two searches because of keys that were refused: STS is not to be flooded


class Identity(Credentials):  # type: ignore[misc]  # botocore ships no types
    """Credentials for botocore, which asks for keys before each request: they are found when needed."""

    def __init__(self, region: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`region` is that of the STS to use, if any; `clock` tells seconds."""
        super().__init__("", "", method="gradcam")
        self._region, self._clock = region, clock
        self._source: Any = None
        self._found_s, self._are_refused, self._refused_s = 0.0, False, float("-inf")
        self._failure: tuple[float, Exception] | None = None  # when, and the error, of a failed search
        self._lock = threading.Lock()

    def load_credentials(self) -> "Identity":
        """Stand in for botocore's credential resolver."""
        return self

    def get_frozen_credentials(self) -> Any:
        """Return keys that are valid now. Raises IdentityFailed."""
        if self._failure is None and not self._must_search():
            return self._find_keys()
        with self._lock:  # one search at a time, whose result those that wait share
            failure = self._failure  # another thread may have found keys meanwhile
            if failure and self._clock() - failure[0] < RETRY_AFTER_S:
                message = "there were no keys a moment ago"
                raise IdentityFailed(message) from failure[1]
            return self._find_keys()

    def lifetime_s(self) -> float:
        """Return for how long the present keys are valid; inf if nobody says. Raises IdentityFailed."""
        self.get_frozen_credentials()
        ends: datetime | None = getattr(self._source, "_expiry_time", None)
        return (ends - datetime.now(UTC)).total_seconds() if ends else math.inf

    def after_call(self, parsed: Any, **_: Any) -> None:
        """Hear each answer of a server, as a handler of botocore's events."""
        if parsed.get("Error", {}).get("Code") in IDENTITY_CODES:
            now_s = self._clock()
            if now_s - self._refused_s >= REFUSED_AFTER_S:
                self._are_refused, self._refused_s = True, now_s

    def _must_search(self) -> bool:
        """Whether there are no keys, or there may be others."""
        if self._source is None or self._are_refused:
            return True
        is_renewed = isinstance(self._source, RefreshableCredentials)
        return not is_renewed and self._clock() - self._found_s >= REREAD_AFTER_S

    def _find_keys(self) -> Any:
        try:
            if self._must_search():
                self._search()
            keys = _trimmed(self._source.get_frozen_credentials())
        except Exception as error:
            self._failure = self._clock(), error
            message = f"no keys: {type(error).__name__}"
            raise IdentityFailed(message) from error
        self._failure = None
        return keys

    def _search(self) -> None:
        """Find keys, or other ones. Raises NoCredentialsError, and errors of the search.

        Keys that nobody refused are kept unless the same source has others: its file may be written just now.
        """
        had = None if self._are_refused else self._source
        self._are_refused = False
        try:
            found = _load_credentials(self._region)
        except Exception:
            if had is None:
                raise
            found = had
        if had is None or found.method == had.method:
            self._source = found
        self._found_s = self._clock()


def _trimmed(keys: Any) -> Any:
    """Return keys without white space around them. Raises ValueError for what cannot be part of a request."""
    parts = {
        name: (getattr(keys, name) or "").strip() or None for name in ("access_key", "secret_key", "token")
    }
    for name, shown in (("access_key", "access key id"), ("token", "session token")):
        if not re.fullmatch(r"[!-~]*", parts[name] or ""):
            message = f"the {shown} has characters that no key has, a line break perhaps"
            raise ValueError(message)
    return keys._replace(**parts)


class ModelFiles(JSONFileLoader):  # type: ignore[misc]  # as above
    """Reads botocore's descriptions of services without what no program needs: 2 MB instead of 11.

    That is their documentation, and the endpoints of services that are not asked here. Objects become plain
    dictionaries, which are half as large as the ordered ones of botocore. Sessions share them.
    """

    def load_file(self, file_path: str) -> Any:
        """Return what a file holds; None: there is none. `file_path` has no suffix."""
        return _read_model_file(file_path)


@cache  # botocore reads a dozen files, the most of what a client costs
def _read_model_file(file_path: str) -> Any:
    for suffix, open_file in ((".json", open), (".json.gz", gzip.open)):
        path = Path(f"{file_path}{suffix}")
        if path.is_file():
            with open_file(path, "rb") as file:
                data = json.loads(file.read(), object_pairs_hook=_without_documentation)
            return _without_other_services(data) if Path(file_path).name == "endpoints" else data
    return None


def _without_documentation(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. A member of a service may be called documentation: then it is no text."""
    return {
        name: "" if name == "documentation" and isinstance(value, str) else value for name, value in pairs
    }


def _without_other_services(endpoints: dict[str, Any]) -> dict[str, Any]:
    """The endpoints of all regions, of `SERVICES` alone."""
    partitions = [
        {
            **partition,
            "services": {name: partition["services"][name] for name in SERVICES & {*partition["services"]}},
        }
        for partition in endpoints["partitions"]
    ]
    return {**endpoints, "partitions": partitions}


def _new_session() -> Session:
    """Return a botocore session: it has read no file yet."""
    session = Session()
    session.get_component("data_loader").file_loader = ModelFiles()
    session.set_default_client_config(
        Config(
            connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S, retries={"total_max_attempts": 1}
        )
    )
    return session


def _load_credentials(region: str) -> Any:
    """Ask all sources. Raises NoCredentialsError, and errors of the search."""
    found = create_credential_resolver(_new_session(), region_name=region).load_credentials()
    if found is None:
        raise NoCredentialsError
    return found


def create_session(region: str) -> Any:
    """Return a botocore session whose keys are an `Identity`."""
    session, identity = _new_session(), Identity(region)
    session.register_component("credential_provider", identity)
    session.register("after-call.s3", identity.after_call)
    return session


def configured_endpoint(session: Any) -> str:
    """Return the S3 server that the environment or a profile names (AWS_ENDPOINT_URL_S3); empty: Amazon's."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return ""
    files = {"full_config": session.full_config, "scoped_config": session.get_scoped_config()}
    return ConfiguredEndpointProvider(client_name="s3", **files).provide() or ""
