"""Suggests names that are similar to a misspelled one."""

import re
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher

MIN_SCORE = 0.76  # of 1: `catt` and `cat` have .86, `catt` and `crate` .67, `vgg61` and `vgg16` .8
PREFIX_SCORE = 0.95  # at least, for a name that begins with the wanted text
WORD_PENALTY = 0.01  # for similarity to one of a name's words instead of all of it
SHARED_WORD_SCORE, MIN_SHARED_WORD = (
    0.77,
    4,
)  # at least, for a name that shares a word of that many characters


def nearest(
    wanted: str, names: Iterable[str], limit: int = 3, preferred: Callable[[str], bool] = lambda _: False
) -> list[str]:
    """Return the names that are similar to `wanted`, the most similar first.

    The whole name, or one of its words, is compared. Case is ignored.

    Args:
        wanted: The misspelled name.
        names: The names that exist.
        limit: The maximal number of names to return.
        preferred: Whether a name comes before others with the same score.
    """
    wanted = wanted.casefold()
    wanted_words = {word for word in _words(wanted) if len(word) >= MIN_SHARED_WORD}
    matcher: SequenceMatcher[str] = SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    scores: dict[str, float] = {}

    def similarity(text: str) -> float:
        if text not in scores:
            matcher.set_seq1(text)
            possible = matcher.real_quick_ratio() > MIN_SCORE and matcher.quick_ratio() > MIN_SCORE
            scores[text] = matcher.ratio() if possible else 0.0
        return scores[text]

    matches = []
    for index, name in enumerate(names):
        text = name.casefold()
        words = _words(text)
        score = max([similarity(text), *(similarity(word) - WORD_PENALTY for word in words)])
        if len(wanted) > 1 and text.startswith(wanted):
            score = max(score, PREFIX_SCORE)
        if wanted_words & {*words}:
            score = max(score, SHARED_WORD_SCORE)
        if score > MIN_SCORE:
            matches.append((-score, not preferred(name), index, name))
    return [name for *_, name in sorted(matches)[:limit]]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)
