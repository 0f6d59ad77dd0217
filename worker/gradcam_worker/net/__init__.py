"""HTTP to addresses that the operator allows (protection against SSRF), and the signing of webhooks.

Start with `http.HttpClient`; `ip_policy` decides which addresses may be connected to.
"""
