"""The most frequent nouns of English captions, found by rules instead of a language model.

The last word of a noun phrase, its head, is a noun: "a small brown [dog] is", "two [men] on the
[beach]". An occurrence of a word counts as a head if one of the three words before it is a
determiner or a small number, and if a preposition, a form of "be" or "have", or the caption's end
follows. Plurals, known by their ending, count as their singular if it occurs in the captions too. A
word is a noun if all of these hold:

- at least a fifth of its occurrences are heads, unlike those of adjectives and most verbs;
- for words in -ing or -ed, at least seven tenths are heads ("building" passes, "running" does not);
- its -ing form is less than half as frequent ("jump" and "run" are verbs in captions);
- it is not in `NOT_THINGS`, words for a place, an amount or the picture itself.

Nouns are sorted by frequency. The rules err: "swing" is left out, for example, because "swinging"
is frequent. They need nothing but the captions, and give the same list everywhere.
"""

import collections
import itertools
import re
from collections.abc import Collection, Iterable, Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words("a an the his her their its two three four five several some many another")
FOLLOWERS = _words(
    "is are was has have in on at of with by near over through into onto from to down up along "
    "across behind beside while that who which as under around outside against for between during "
    "off out next towards toward above before after inside about past within . ; ! ?"
)
NOT_THINGS = _words(
    "air airborne area attempt away back background bit body bottom camera center closeup "
    "corner couple course day distance edge end female flip front goes group held high him left "
    "line lot midair middle nearby number object one open other outdoor outdoors pair part "
    "photo picture piece pile place ready right row set setting shot show side someone "
    "something spot step stunt them together top trick try turn upside view way"
)
IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "leaves": "leaf",
    "knives": "knife",
    "mice": "mouse",
    "sheep": "sheep",
}
# Plural ending, singular ending. The first pair that gives a known word is used.
ENDINGS = (("ies", "y"), ("es", ""), ("s", ""))
HEAD_SHARE, HEAD_SHARE_OF_FORMS, GERUND_SHARE = 0.2, 0.7, 0.5


def frequent_nouns(captions: Iterable[str], count: int) -> list[str]:
    """The singulars of the `count` most frequent nouns, the most frequent one first.

    Args:
      captions: English captions, in upper or lower case.
      count: number of nouns; fewer are returned if the captions have fewer.
    """
    words, heads = collections.Counter(), collections.Counter()
    for caption in captions:
        tokens = re.findall(r"[a-z][a-z'-]*|[.;!?]", caption.lower())
        words.update(tokens)
        heads.update(_heads([*tokens, "."]))
    singulars = {word: singular(word, words) for word in words}
    total, as_head = collections.Counter(), collections.Counter()
    for word, one in singulars.items():
        total[one] += words[word]
        as_head[one] += heads[word]
    nouns = [word for word in total if _is_noun(word, as_head[word] / total[word], total)]
    return sorted(nouns, key=lambda word: (-total[word], word))[:count]


def singular(word: str, known: Collection[str]) -> str:
    """A word's singular if a rule finds one in `known`, else the word itself.

    Irregular plurals (`IRREGULAR`) need not be in `known`.
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    for plural, ending in ENDINGS:
        stem = word.removesuffix(plural)
        # "glass", "grass" and "his" are not plurals.
        one = stem + ending
        if stem != word and len(one) > 2 and not word.endswith("ss") and one in known:
            return one
    return word


def _heads(tokens: list[str]) -> Iterator[str]:
    """The last words of noun phrases."""
    for place, (word, after) in enumerate(itertools.pairwise(tokens)):
        before = tokens[max(place - 3, 0) : place]
        if after in FOLLOWERS and word not in FOLLOWERS and DETERMINERS.intersection(before):
            yield word


def _is_noun(word: str, head_share: float, total: collections.Counter) -> bool:
    needed = HEAD_SHARE_OF_FORMS if word.endswith(("ing", "ed")) else HEAD_SHARE
    gerunds = {word + "ing", word.removesuffix("e") + "ing", word + word[-1] + "ing"}
    gerund = sum(total[form] for form in gerunds)
    return (
        head_share >= needed
        and gerund < GERUND_SHARE * total[word]
        and word not in NOT_THINGS
        and word not in DETERMINERS
    )
