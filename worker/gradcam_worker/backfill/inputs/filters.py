"""Which files of a folder, a prefix or an inventory are left out, and how many they were."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

from gradcam_worker.errors import InvalidInput
from gradcam_worker.text.visible import counted

MARKERS = re.compile(  # files that say something about others; none is an image
    r"(?:^|/)(?:_SUCCESS|_(?:started|committed)_[^/]*|(?i:thumbs\.db|desktop\.ini)|[^/]*\.crc"
    r"|[^/]*_\$folder\$)$|(?:^|/)(?:_temporary|_delta_log)/"
)
HIDDEN = re.compile(r"(?:^|/)\.(?!\.?(?:/|$))")
OWN, MARKED, PATTERN, OUTDATED = "own", "marked", "pattern", "outdated"
_SENTENCES = {  # about a number of files
    OWN: "Skipped {} of the input that a backfill wrote, or below the output.",
    MARKED: "Skipped {}: hidden, or a marker such as _SUCCESS.",
    PATTERN: "Skipped {} by --include and --exclude.",
    OUTDATED: "Skipped {} of the inventory: not the latest version, or deleted.",
}


def _no_own_file(_: str) -> bool:
    return False


class NameFilter:
    """Leaves names out, and counts them."""

    def __init__(
        self,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        is_own_file: Callable[[str], bool] = _no_own_file,
    ) -> None:
        """Prepare the patterns, see `pattern`.

        Args:
            include: If there are any, one of them must match.
            exclude: None of these may match.
            is_own_file: Called with whole names, in order; true for what backfills wrote.
        """
        self._include, self._exclude = pattern(include), pattern(exclude, hidden=True)
        self._shows_hidden = any(HIDDEN.search(text) for text in include)
        self._is_own_file = is_own_file
        self.skipped: Counter[str] = Counter()

    def restart(self, is_own_file: Callable[[str], bool]) -> None:
        """Begin again with the first name, with a new filter of what backfills wrote."""
        self._is_own_file = is_own_file

    def skips(self, name: str, whole_name: str) -> bool:
        """Return whether a listed file is left out.

        Args:
            name: Its path from the input on.
            whole_name: Its key in the bucket, or its path on this machine.
        """
        reason = None
        if self._is_own_file(whole_name):
            reason = OWN
        elif MARKERS.search(name):
            reason = MARKED
        elif self.is_unwanted(name):
            return True
        elif HIDDEN.search(name) and not self._include:
            reason = MARKED
        if reason:
            self.skipped[reason] += 1
        return reason is not None

    def is_unwanted(self, name: str) -> bool:
        """Return whether the patterns leave a name out."""
        unwanted = (self._include is not None and not self._include.fullmatch(name)) or (
            self._exclude is not None and bool(self._exclude.fullmatch(name))
        )
        if unwanted:
            self.skipped[PATTERN] += 1
        return unwanted

    def skips_folder(self, name: str) -> bool:
        """Return whether nothing below a folder can be wanted, by its path from the input on."""
        if not self._shows_hidden and HIDDEN.search(name):
            self.skipped[MARKED] += 1
            return True
        return self._exclude is not None and bool(self._exclude.fullmatch(name))

    def notes(self) -> list[str]:
        """Return sentences about what was left out so far."""
        return [
            _SENTENCES[reason].format(counted(count, "file"))
            for reason, count in sorted(self.skipped.items())
        ]


def pattern(globs: Sequence[str], *, hidden: bool = False) -> re.Pattern[str] | None:
    """Translate patterns as shells have them into one regular expression of paths with slashes.

    One without a slash matches the name of a file, or of a folder on the way to it; one with a slash matches
    the path, or the first folders of it. `**` stands for any number of folders.

    Args:
        globs: The patterns.
        hidden: Whether `*`, `?` and `[` match the dot that a hidden name begins with.

    Returns:
        The expression, for `fullmatch`; None: there are no patterns. What a star skips before another star is
        never chosen again, by `(?>...)`: else a pattern may take years for a name that does not match.

    Raises:
        InvalidInput: One is no pattern.
    """
    choices = [_choice(glob, hidden=hidden) for glob in globs]
    return re.compile("|".join(choices), re.DOTALL) if choices else None


def _choice(glob: str, *, hidden: bool) -> str:
    """The expression of one pattern. Raises InvalidInput."""
    name = "[^/]+" if hidden else r"(?!\.)[^/]+"
    parts = glob.strip("/").split("/")
    runs = [""]  # of names between two stars for folders
    for part in parts[:-1]:
        if part == "**":
            runs.append("")
        else:
            runs[-1] += f"{_component(part, hidden=hidden)}/"
    first, *others = runs
    text = first if len(parts) > 1 or glob.startswith("/") else f"(?:{name}/)*"
    text += "".join(f"(?>(?:{name}/)*?{run})" for run in others[:-1] if run)
    text += f"(?:{name}/)*{others[-1]}" if others else ""
    text += (
        f"{name}(?:/{name})*" if parts[-1] == "**" else f"{_component(parts[-1], hidden=hidden)}(?:/{name})*"
    )
    try:
        re.compile(text)
    except re.error as error:
        message = f"{glob[:200]!r} is no pattern: {error.msg}; one is as '*.jpg', or '2031/**/[0-9]*.png'."
        raise InvalidInput(message) from error
    return text


def _component(glob: str, *, hidden: bool) -> str:
    """The expression of one name."""
    before = "" if hidden or glob[:1] not in {"*", "?", "["} else r"(?!\.)"
    runs, index = [""], 0  # between two stars
    while index < len(glob):
        letter, index = glob[index], index + 1
        end = glob.find("]", index + 1 + (glob[index : index + 1] == "!"))
        if letter == "*":
            runs.append("")
        elif letter == "?":
            runs[-1] += "[^/]"
        elif letter == "[" and end > 0:
            inside = glob[index:end].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            runs[-1] += f"[^/{inside[1:]}]" if inside.startswith("!") else f"(?!/)[{inside}]"
            index = end + 1
        else:
            runs[-1] += re.escape(letter)
    first, *others = runs
    skipped = "".join(f"(?>[^/]*?{run})" for run in others[:-1] if run)
    return f"{before}{first}{skipped}" + (f"[^/]*{others[-1]}" if others else "")
