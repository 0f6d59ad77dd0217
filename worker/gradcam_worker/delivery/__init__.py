"""How others are told: the dispatcher of the outbox, webhooks, a SQL database. Begin at `dispatcher`."""
