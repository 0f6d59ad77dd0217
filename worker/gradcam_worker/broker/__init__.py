"""Messages on the queues of Redis: the Celery app, the publisher, the transport and the consumer.

Begin at `publisher`, which has the names of tasks and queues. A message is a
notification: the ledger is the truth.
"""
