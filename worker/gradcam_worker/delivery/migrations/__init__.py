"""How the status database becomes what this version writes: Alembic's scripts, one a change.

A change only ever adds (a column that may be null or has a default, an index), so that workers of the
version before go on writing while a new one is brought out, and after it was taken back.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
VERSION_TABLE = "gradcam_schema"  # Alembic's own name may be taken: the database may be somebody's own
