"""HTTP to addresses that the operator allows, and the signing of webhooks.

Start with `http.HttpClient`; `ip_policy` decides which addresses may be connected to.
"""
