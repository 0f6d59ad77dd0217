"""Alembic's environment: runs the migrations in the connection and transaction of `SqlStatus.upgrade`."""

from alembic import context

from gradcam_worker.delivery.migrations import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
