"""Draws small tasks on words, and computes the quality of any response to them, 0 to 100; nothing is judged.

    quality    100 · (1 − D / max(words of the response, words of the answer)), D the edit distance in words: 100 for
               the right answer alone, 0 for a text that shares no word with it
    edits      a response of which `corrupt` has spoiled e of n words has quality 100 · (1 − e / n)
    rating     the number that the instruction names: the quality, and 1, the lowest rating of p, in place of 0

The instruction p of the paper asks for a rating of 100; `instruction(rating)` asks for another one in the same words.
"""

import dataclasses
import random
import re
from collections.abc import Sequence

from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.errors import UsageError

_WORDS = """
    acorn alder anise apple aspen basil berry birch bloom cedar cherry clay clover coral cotton daisy dune elder fern
    fig garlic ginger grape hazel heron honey iris ivy jasmine kelp lark laurel lemon lilac lotus maple melon mint moss
    nettle oak olive onion orchid otter peach pebble pepper pine plum poppy quince raven reed robin rose sage salt shell
    thyme tulip violet walnut willow
"""
WORDS = tuple(_WORDS.split())
"""The words of lists, in alphabetical order, none twice."""
NUMBERS = ("one", "two", "three")
TASKS = ("copy", "reverse", "sort", "count", "lookup", "sort+reverse", "lookup+reverse")
LIST_WORDS = 4
"""The number of words in a task's list and in every right answer; constant, so that the model learns in minutes."""
TABLE_ENTRIES = 3
RATINGS = (1, 25, 50, 75, 100)
IN, ANSWER = "in", "answer:"
OTHER_WORDS = (IN, ANSWER, *NUMBERS, *(f"{kind}:" for kind in TASKS), *map(str, RATINGS))
"""Other words of prompts. Some wrong responses hold them, so that a model learns that they are wrong."""
OTHER_SHARE = 0.2
"""The share of them among the words that are put into spoiled responses."""
RATING_IN_P = re.compile(r"(?<=rating of) 100(?= out)|(?<=The term) 100(?= indicates)")
"""Finds the places where p names the rating; the other 100s in it name the end of the scale."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task with its right answer."""

    kind: str
    prompt: str
    answer: tuple[str, ...]


def draw_task(rng: random.Random, kinds: Sequence[str]) -> Task:
    """Draws a task of one of these kinds, a subset of `TASKS`, on random words."""
    kind = rng.choice(kinds)
    match kind:
        case "count":
            first, second = rng.sample(WORDS, 2)
            asked = [first, second, *rng.choices((first, second), k=LIST_WORDS - 2)]
            rng.shuffle(asked)
            answer = _counts(asked)
        case "lookup" | "lookup+reverse":
            keys, values = rng.sample(WORDS, TABLE_ENTRIES), rng.sample(WORDS, TABLE_ENTRIES)
            queries = rng.choices(keys, k=LIST_WORDS)
            table = dict(zip(keys, values, strict=True))
            asked = [word for pair in table.items() for word in pair] + [IN] + queries
            answer = [table[query] for query in queries]
        case _:
            asked = rng.sample(WORDS, LIST_WORDS)
            answer = sorted(asked) if kind.startswith("sort") else list(asked)
    if kind.endswith("reverse"):
        answer = answer[::-1]
    return Task(kind, f" {kind}: {' '.join(asked)} {ANSWER}", tuple(answer))


def _counts(words: Sequence[str]) -> list[str]:
    """Gives each word with the number of times that it occurs, in the order of first occurrence."""
    return [part for word in dict.fromkeys(words) for part in (word, NUMBERS[words.count(word) - 1])]


def quality(response: str, answer: Sequence[str]) -> float:
    """Computes the quality of a response to a task, 0 to 100, by the formula above. White space separates words."""
    words = response.split()
    most = max(len(words), len(answer))
    return 100.0 * (most - edit_distance(words, answer)) / most


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Counts the fewest insertions, deletions and replacements of words that turn one into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for place, word in enumerate(first, 1):
        diagonal, row[0] = row[0], place
        for other, known in enumerate(second, 1):
            diagonal, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, diagonal + (word != known))
    return row[-1]


def corrupt(answer: Sequence[str], edits: int, rng: random.Random) -> tuple[str, ...]:
    """Spoils `edits` words of an answer: cuts the last ones off and replaces others by words that are not in it.

    Half of the time nothing is cut off, and at least one word is left. The edit distance from the answer is exactly
    `edits`, as no word that is put in is in the answer.
    """
    foreign = {words: [word for word in words if word not in answer] for words in (WORDS, OTHER_WORDS)}
    cut = rng.randint(0, min(edits, len(answer) - 1)) if rng.random() < 0.5 else 0
    kept = list(answer[: len(answer) - cut])
    for place in rng.sample(range(len(kept)), edits - cut):
        kept[place] = rng.choice(foreign[OTHER_WORDS if rng.random() < OTHER_SHARE else WORDS])
    return tuple(kept)


def rating_of(quality: float) -> int:
    """Gives the rating that the instruction names for this quality; one of `RATINGS` if `corrupt` made the response."""
    return max(RATINGS[0], round(quality))


def instruction(rating: int) -> str:
    """Gives the paper's p with another of `RATINGS` in place of its 100; p itself, letter by letter, at 100."""
    if rating not in RATINGS:
        raise UsageError(f"rating {rating}: this world has the ratings {', '.join(map(str, RATINGS))}")
    return RATING_IN_P.sub(f" {rating}", PAPER_INSTRUCTION)


def instruction_parts() -> list[str]:
    """Gives the pieces of the instruction around the rating, in their order."""
    return RATING_IN_P.split(PAPER_INSTRUCTION)
