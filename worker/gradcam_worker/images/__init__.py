"""An image's bytes and pixels from its URI, within what the operator allows.

Begin at `prepare.fetch_image`; `fetch.UriFetcher` reads the bytes.
"""
