"""Which of the names that there are somebody may have meant."""

import re
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher

NEAR = 0.76  # of 1: `catt` and `cat` are .86, `catt` and `crate` .67, `vgg61` and `vgg16` .8
BEGINS = 0.95  # what a name counts that begins with what was said
PART = 0.01  # what one of its words counts less than a whole name does
HAS_WORD, LONG_WORD = 0.77, 4  # what a name counts that shares a word of so many letters


def nearest(
    said: str, names: Iterable[str], most: int = 3, preferred: Callable[[str], bool] = lambda _: False
) -> list[str]:
    """At most so many of `names`, the most similar first; those that are `preferred` before their equals.

    A name is as similar as it is as a whole, or as one of its words is. Case is not looked at.
    """
    said = said.casefold()
    words = {one for one in _words(said) if len(one) >= LONG_WORD}
    matcher: SequenceMatcher[str] = SequenceMatcher(autojunk=False)
    matcher.set_seq2(said)
    known: dict[str, float] = {}

    def likeness(text: str) -> float:
        if text not in known:
            matcher.set_seq1(text)
            near = matcher.real_quick_ratio() > NEAR and matcher.quick_ratio() > NEAR
            known[text] = matcher.ratio() if near else 0.0
        return known[text]

    found = []
    for place, name in enumerate(names):
        text = name.casefold()
        parts = _words(text)
        score = max([likeness(text), *(likeness(one) - PART for one in parts)])
        if len(said) > 1 and text.startswith(said):
            score = max(score, BEGINS)
        if words & {*parts}:
            score = max(score, HAS_WORD)
        if score > NEAR:
            found.append((-score, not preferred(name), place, name))
    return [name for *_, name in sorted(found)[:most]]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text)
