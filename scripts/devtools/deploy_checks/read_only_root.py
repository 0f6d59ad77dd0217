"""Starts a program as a hardened container does: as any user of group 0, without rights, on a read-only root.

That takes root and util-linux; elsewhere the program is started as it is, and `reason` says so.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

ANY_USER = 1_000_730_000  # nobody's here: such are those that OpenShift gives to a namespace
PROGRAMS = ("unshare", "mount", "setpriv")
# A mount of its own stays writable when the root is not.
_SCRIPT = """
user=$1; shift
while [ "$1" != -- ]; do mount --bind "$1" "$1"; shift; done
mount -o remount,bind,ro /
exec setpriv --reuid "$user" --regid 0 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def reason() -> str:
    """Why this machine cannot; nothing where it can."""
    if os.getuid():
        return "it takes root"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    return f"{', '.join(missing)}: not installed" if missing else ""


def command(words: Sequence[str], writable: Sequence[Path], user: int = ANY_USER) -> list[str]:
    """How a program is started so.

    Args:
        words: Its command line.
        writable: Folders that it may write to; there must be some.
        user: Who it runs as.
    """
    if reason():
        return [*words]
    script = ["/bin/sh", "-ec", _SCRIPT, "sh", str(user), *map(str, writable), "--", *words]
    return ["unshare", "--mount", "--", *script]
