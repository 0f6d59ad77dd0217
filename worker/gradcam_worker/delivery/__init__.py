"""Delivery of status events to webhooks and to a SQL database, from the outbox. Begin at `dispatcher`."""
