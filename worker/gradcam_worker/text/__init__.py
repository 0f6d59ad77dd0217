"""Text of strangers, made fit to show: visible text, URLs without their users, comma lists, similar names;
and log lines, `log_events`.

It imports nothing of ours.
"""
