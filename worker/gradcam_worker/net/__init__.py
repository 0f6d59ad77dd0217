"""HTTP to addresses that the operator allows, and the signing of webhooks.

Begin at `http.HttpClient`; `ip_policy` judges each address that is dialled.
"""
