"""An image's bytes from its URI, within what the operator allows. Begin at `fetch.UriFetcher`."""
