"""An image from its URI to pixels that fit a network, within the limits that the operator sets.

`fetch` reads the bytes, and `prepare.fetch_image` is the entry point: it also decodes them and reserves
memory.
"""
