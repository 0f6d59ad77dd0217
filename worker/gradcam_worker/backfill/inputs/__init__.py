"""The list of images of a backfill: tables, text, folders, prefixes. Start with `open.open_input`."""
