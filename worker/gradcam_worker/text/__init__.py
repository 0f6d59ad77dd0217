"""Text from strangers made fit to show: visible text, URLs without their users, lists with commas, similar names.

It imports nothing of ours but `errors`.
"""
