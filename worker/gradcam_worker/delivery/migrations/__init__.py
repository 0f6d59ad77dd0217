"""Migrations of the status database's schema: Alembic scripts, one for each change.

A change may only add: a nullable column or one with a default, or an index. So workers of the previous
version can write during an upgrade and after a rollback.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
VERSION_TABLE = "gradcam_schema"  # Alembic's default name may be in use by the owner of the database
