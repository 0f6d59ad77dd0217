"""Text: untrusted text and URLs made safe to show, comma-separated lists, similar names, log events.

It imports nothing else of this package.
"""
