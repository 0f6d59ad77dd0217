"""The worker's own keys for S3, wherever boto3 finds them: environment, files, web identity, the machine.

Whatever goes wrong while they are looked for or renewed is `IdentityFailed`, and so never taken for what the
server says of a job's object. They are looked for again for as long as there are none.
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

CONNECT_S, READ_S = 3, 5  # that STS and its like have for an answer
AGAIN_S = 1.0  # before whoever gave no keys is asked again, however many jobs ask


class Identity(Credentials):  # type: ignore[misc]  # botocore ships no types
    """Keys as botocore asks for them: for each request."""

    def __init__(self, session: Any, region: str) -> None:
        """`region`: of the STS that is asked, where one is."""
        super().__init__("", "", method="gradcam")
        self._session, self._region = session, region
        self._found: Any = None
        self._failure: tuple[float, Exception] | None = None  # when, and why there were no keys
        self._door = threading.Lock()

    def load_credentials(self) -> "Identity":
        """What botocore's resolver does: find somebody who has keys."""
        return self

    def get_frozen_credentials(self) -> Any:
        """Keys that are good now. Raises IdentityFailed."""
        if self._found is not None and self._failure is None:
            return self._asked()
        with self._door:  # one at a time: whoever waits learns from it
            if self._failure and time.monotonic() - self._failure[0] < AGAIN_S:
                message = "there were no keys a moment ago"
                raise IdentityFailed(message) from self._failure[1]
            return self._asked()

    def _asked(self) -> Any:
        try:
            keys = self._held().get_frozen_credentials()
        except Exception as error:
            self._failure = time.monotonic(), error
            message = f"no keys: {type(error).__name__}"
            raise IdentityFailed(message) from error
        self._failure = None
        return keys

    def _held(self) -> Any:
        """Whoever has keys, once somebody has. Raises NoCredentialsError, and whatever the search does."""
        if self._found is None:
            places = create_credential_resolver(self._session, region_name=self._region)
            self._found = places.load_credentials()
        if self._found is None:
            raise NoCredentialsError
        return self._found


def session(region: str) -> Any:
    """A botocore session whose keys are an `Identity`."""
    made = Session()
    made.set_default_client_config(
        Config(connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"total_max_attempts": 1})
    )
    made.register_component("credential_provider", Identity(made, region))
    return made


def endpoint(session: Any) -> str:
    """The S3 server that the environment or a profile names (AWS_ENDPOINT_URL_S3); empty: Amazon."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return ""
    files = {"full_config": session.full_config, "scoped_config": session.get_scoped_config()}
    return ConfiguredEndpointProvider(client_name="s3", **files).provide() or ""
