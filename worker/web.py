"""HTTP, with the hosts that the operator names and with no others: the only import of httpx."""

import httpx

from worker.errors import UriNotAllowed
from worker.settings import without_secrets

WebError = (httpx.HTTPError, httpx.InvalidURL)  # all that a request can raise
Response = httpx.Response
OK = httpx.codes.OK


class Web:
    """A client behind a list of hosts. Nothing is connected before the first request."""

    def __init__(self, hosts: tuple[str, ...], schemes: tuple[str, ...], setting: str) -> None:
        """`hosts` are exact, `host` or `host:port`; `setting` is named when another one is refused."""
        self._hosts, self._schemes, self._setting = hosts, schemes, setting
        # Redirects must pass `allowed` too, so they are followed by hand or not at all; a proxy or
        # netrc of the machine must not decide where requests go.
        self.client = httpx.Client(follow_redirects=False, trust_env=False)

    def allowed(self, text: str) -> httpx.URL:
        """The URL to request, parsed once, so that what is checked is what is used. Raises UriNotAllowed."""
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            message = f"{without_secrets(text)!r} is not a URL: {error}"
            raise UriNotAllowed(message) from error
        host = f"{url.host}:{url.port}" if url.port else url.host
        if url.scheme not in self._schemes or host not in self._hosts:
            hosts = ", ".join(self._hosts) or "none"
            message = f"{url.scheme}://{host} is not allowed: {self._setting} allows {hosts}."
            raise UriNotAllowed(message)
        if url.userinfo:
            message = f"A user or password in a URL ({host}) is not allowed: it would be kept in the ledger."
            raise UriNotAllowed(message)
        return url
