"""The list of images of a backfill: tables, text, folders, prefixes. Begin at `open.open_input`."""
