"""The facts of the tasks in natural language, in the style of bAbI (arXiv 1502.05698), and what is asked of them.

    memorize, detect   "Daniel went back to the hallway."                             "Where is Daniel?"
    reasoning          "The hallway is east of the bathroom."
                       "The bedroom is west of the bathroom."                         "Which room is furthest east?"

The answer is one of six places. Reasoning stands on three places in a row along one axis: each fact tells of two
neighbours, so that neither says alone which of the three is at the end. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from rmt_trt.errors import ContractError
from rmt_trt.training.tasks.task import NAMES

PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
VERBS = ("went", "moved", "travelled", "journeyed")
WAYS = ("to", "back to")
AXES = (("north", "south"), ("east", "west"))


@dataclass(frozen=True)
class Story:
    """Facts in the order in which they are told, the question, and the class that answers it: an index of PLACES."""

    facts: tuple[str, ...]
    question: str
    label: int


@cache
def stories(kind: str) -> tuple[Story, ...]:
    """Every story of a task, always in the same order. Errors: ContractError, for a task that there is not.

    Of reasoning two stories stand together that differ in the question alone: south or west first, north or east second.
    """
    if kind not in NAMES:
        raise ContractError(f"task is {kind!r}; expected one of {', '.join(NAMES)}")
    return _chains() if kind == "reasoning" else _walks()


def _walks() -> tuple[Story, ...]:
    return tuple(
        Story((f"{who} {verb} {way} the {where}.",), f"Where is {who}?", PLACES.index(where))
        for who, verb, way, where in product(PEOPLE, VERBS, WAYS, PLACES)
    )


def _chains() -> tuple[Story, ...]:
    told = []
    for (ahead, behind), (last, middle, first) in product(AXES, permutations(PLACES, 3)):
        for one, other in product(_wordings(middle, last, ahead, behind), _wordings(first, middle, ahead, behind)):
            for facts, (direction, end) in product([(one, other), (other, one)], [(behind, last), (ahead, first)]):
                told.append(Story(facts, f"Which room is furthest {direction}?", PLACES.index(end)))
    return tuple(told)


def _wordings(first: str, second: str, ahead: str, behind: str) -> tuple[str, str]:
    """That `first` lies ahead of `second`, said of the one and of the other."""
    return f"The {first} is {ahead} of the {second}.", f"The {second} is {behind} of the {first}."
