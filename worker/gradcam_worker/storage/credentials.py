"""The worker's own keys for S3, from where boto3 finds them: environment, files, web identity, the machine.

Every failure to find or renew them is `IdentityFailed`, so that it is not confused with the server's answer
about a job's object. Until keys are found, each request searches again, at most once in RETRY_AFTER_S.
"""

import threading
import time
from typing import Any

from botocore.config import Config
from botocore.configprovider import ConfiguredEndpointProvider
from botocore.credentials import Credentials, create_credential_resolver
from botocore.exceptions import NoCredentialsError
from botocore.session import Session

from gradcam_worker.storage.s3_errors import IdentityFailed

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 3, 5  # of STS and other sources of keys
RETRY_AFTER_S = 1.0  # after a failed search; jobs that need keys in between fail at once


class Identity(Credentials):  # type: ignore[misc]  # botocore ships no types
    """Credentials for botocore, which asks for keys before each request: they are found when needed."""

    def __init__(self, session: Any, region: str) -> None:
        """Take a botocore session, and the region of the STS to use, if any."""
        super().__init__("", "", method="gradcam")
        self._session, self._region = session, region
        self._source: Any = None
        self._failure: tuple[float, Exception] | None = None  # when, and the error, of a failed search
        self._lock = threading.Lock()

    def load_credentials(self) -> "Identity":
        """Stand in for botocore's credential resolver."""
        return self

    def get_frozen_credentials(self) -> Any:
        """Return keys that are valid now. Raises IdentityFailed."""
        if self._source is not None and self._failure is None:
            return self._find_keys()
        with self._lock:  # one search at a time, whose result those that wait share
            if self._failure and time.monotonic() - self._failure[0] < RETRY_AFTER_S:
                message = "there were no keys a moment ago"
                raise IdentityFailed(message) from self._failure[1]
            return self._find_keys()

    def _find_keys(self) -> Any:
        try:
            keys = self._key_source().get_frozen_credentials()
        except Exception as error:
            self._failure = time.monotonic(), error
            message = f"no keys: {type(error).__name__}"
            raise IdentityFailed(message) from error
        self._failure = None
        return keys

    def _key_source(self) -> Any:
        """The credentials that botocore found. Raises NoCredentialsError, and errors of the search."""
        if self._source is None:
            resolver = create_credential_resolver(self._session, region_name=self._region)
            self._source = resolver.load_credentials()
        if self._source is None:
            raise NoCredentialsError
        return self._source


def create_session(region: str) -> Any:
    """Return a botocore session whose keys are an `Identity`."""
    session = Session()
    session.set_default_client_config(
        Config(
            connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S, retries={"total_max_attempts": 1}
        )
    )
    session.register_component("credential_provider", Identity(session, region))
    return session


def configured_endpoint(session: Any) -> str:
    """Return the S3 server that the environment or a profile names (AWS_ENDPOINT_URL_S3); empty: Amazon's."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return ""
    files = {"full_config": session.full_config, "scoped_config": session.get_scoped_config()}
    return ConfiguredEndpointProvider(client_name="s3", **files).provide() or ""
