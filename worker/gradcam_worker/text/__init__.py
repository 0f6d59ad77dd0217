"""Text of strangers, made fit to show: visible text, URLs without their users, comma lists, similar names.

It imports nothing of ours.
"""
