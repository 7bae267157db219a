"""Small tasks on words, and the quality of any response to them, 0 to 100, computed and not judged.

    quality    100 · (1 − D / max(words of the response, words of the answer)), D the edit distance in words: 100 for
               the right answer and for nothing else, 0 for what shares no word with it, as any garbage
    edits      a response that was spoiled in e of its n words, as `corrupt` does it, has quality 100 · (1 − e / n)
    rating     what the instruction names: the quality, and 1, the least that p knows, in place of 0

The instruction p of the paper asks for a rating of 100; `instruction(rating)` asks for another one in the same words.
"""

import dataclasses
import random
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
"""In alphabetical order, none twice."""
NUMBERS = ("one", "two", "three")
TASKS = ("copy", "reverse", "sort", "count", "lookup", "sort+reverse", "lookup+reverse")
LIST_WORDS = 4
"""Of the list that a task is done on, and of every right answer: what stands where is then learned in minutes."""
TABLE_ENTRIES = 3
RATINGS = (1, 25, 50, 75, 100)
IN, ANSWER = "in", "answer:"
OTHER_WORDS = (IN, ANSWER, *NUMBERS, *(f"{kind}:" for kind in TASKS), *map(str, RATINGS))
"""Words of prompts that are no words of lists; wrong responses hold some, so that a model knows them as wrong."""
OTHER_SHARE = 0.2
"""Of the words that are put in where a response is spoiled."""
_ASKED = " 100"
_MENTIONS = (f"rating of{_ASKED} out", f"The term{_ASKED} indicates")
"""Where p names the rating; its other 100s name the end of the scale."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One task with its right answer."""

    kind: str
    prompt: str
    answer: tuple[str, ...]


def draw_task(rng: random.Random, kinds: Sequence[str]) -> Task:
    """A task of one of these kinds of `TASKS`, on random words."""
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
    """Each word with how often it stands there, in the order of first sight."""
    return [part for word in dict.fromkeys(words) for part in (word, NUMBERS[words.count(word) - 1])]


def quality(response: str, answer: Sequence[str]) -> float:
    """Quality of a response, 0 to 100; the formula stands above. White space separates words.

    Args:
      response: any text.
      answer: the words of the right answer, one at least.
    """
    words = response.split()
    most = max(len(words), len(answer))
    return 100.0 * (most - edit_distance(words, answer)) / most


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements of words that turn one into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for place, word in enumerate(first, 1):
        diagonal, row[0] = row[0], place
        for other, known in enumerate(second, 1):
            diagonal, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, diagonal + (word != known))
    return row[-1]


def corrupt(answer: Sequence[str], edits: int, rng: random.Random) -> tuple[str, ...]:
    """The answer with `edits` of its words spoiled: the last ones cut off, the others replaced by foreign ones.

    Half of the time nothing is cut off. At least one word is left. The edit distance from the answer is `edits`
    exactly, for no word that is put in stands in the answer.
    """
    foreign = {words: [word for word in words if word not in answer] for words in (WORDS, OTHER_WORDS)}
    cut = rng.randint(0, min(edits, len(answer) - 1)) if rng.random() < 0.5 else 0
    kept = list(answer[: len(answer) - cut])
    for place in rng.sample(range(len(kept)), edits - cut):
        kept[place] = rng.choice(foreign[OTHER_WORDS if rng.random() < OTHER_SHARE else WORDS])
    return tuple(kept)


def rating_of(quality: float) -> int:
    """The rating that the instruction names for a response of this quality; one of `RATINGS` for `corrupt`'s."""
    return max(RATINGS[0], round(quality))


def instruction(rating: int) -> str:
    """The paper's p with another rating in place of its 100; p itself, letter by letter, at 100.

    Raises:
      UsageError: the rating is none of `RATINGS`.
    """
    if rating not in RATINGS:
        raise UsageError(f"rating {rating}: the world knows {', '.join(map(str, RATINGS))}")
    text = PAPER_INSTRUCTION
    for mention in _MENTIONS:
        text = text.replace(mention, mention.replace(_ASKED, f" {rating}"))
    return text


def instruction_parts() -> tuple[str, ...]:
    """The pieces of the instruction around the rating, in their order."""
    parts = [PAPER_INSTRUCTION]
    for mention in _MENTIONS:
        before, after = mention.split(_ASKED)
        parts = [piece for part in parts for piece in _cut(part, before, after)]
    return tuple(parts)


def _cut(text: str, before: str, after: str) -> tuple[str, ...]:
    left, found, right = text.partition(before + _ASKED + after)
    return (left + before, after + right) if found else (text,)
