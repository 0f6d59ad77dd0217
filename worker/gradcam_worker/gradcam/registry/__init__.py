"""The networks that jobs can use: those of the catalog, and an operator's, by a TOML file.

Begin at `registry.Registry`.
"""
