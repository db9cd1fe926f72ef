"""The words of the synthetic tasks: a small closed vocabulary, its tokenizer.json, and ids back to text.

Every class of words is one run of consecutive ids, so that a random word of a class is one multiplication. No word
stands in two classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
PAD_ID, UNK_ID, CLS_ID, SEP_ID = range(4)

_CLASSES = {
    "mark": ". ? ,",
    "fixed": (
        "where is the a an to back in on of and was were there had by with near behind under beside that then "
        "after before while no one some said it very not but for from into over"
    ),
    "name": "daniel john mary sandra",
    "place": "bathroom bedroom garden hallway kitchen office",
    "mover": "went moved travelled journeyed walked ran hurried rushed",
    "animal": (
        "cat dog horse fox owl crow hen goat sheep mouse rabbit duck goose wolf bear deer frog snail bee spider "
        "hedgehog sparrow otter badger squirrel donkey pigeon turtle lizard falcon"
    ),
    "thing": (
        "lamp chair table window door bottle basket letter book map clock mirror candle hammer ladder bucket rope "
        "blanket carpet pillow kettle plate spoon knife bowl cup jar box coin ring stone feather umbrella lantern "
        "bicycle wagon boat anchor compass telescope piano violin drum trumpet painting statue fountain bench "
        "fence gate bridge tower chimney roof wall path river lake forest meadow hill valley island beach field "
        "barn mill bakery library station market harbour village castle church school theatre museum newspaper "
        "notebook pencil ribbon button scarf jacket boot hat glove suitcase ticket parcel stamp photograph puzzle "
        "kite marble apple pear plum cherry lemon carrot onion pumpkin bread cheese honey soup tea cake"
    ),
    "quality": (
        "old new small large bright dark red blue green yellow white black grey brown golden silver wooden broken "
        "clean dusty empty full heavy light warm cold wet dry soft hard round square narrow wide tall short quiet "
        "noisy strange plain smooth rough shiny dull sharp clumsy gentle proud sleepy hungry famous forgotten "
        "hidden cheap precious ancient modern crooked steep shallow deep pale"
    ),
    "deed": (
        "found carried painted covered watched followed touched repaired dropped pushed pulled lifted cleaned "
        "opened closed counted noticed ignored admired described measured borrowed passed circled crossed guarded "
        "examined remembered sketched wrapped polished decorated chased liked feared avoided"
    ),
    "manner": (
        "slowly quickly quietly loudly gently carefully often rarely always never sometimes yesterday today "
        "meanwhile later again suddenly finally usually secretly happily calmly"
    ),
    "weather": "rain snow wind fog thunder sunshine hail frost mist storm",
}
CLASSES = {name: tuple(words.split()) for name, words in _CLASSES.items()}

WORDS: tuple[str, ...] = (*SPECIAL, *(word for words in CLASSES.values() for word in words))
ID = {word: index for index, word in enumerate(WORDS)}
VOCAB_SIZE = len(WORDS)
FIRST = {name: ID[words[0]] for name, words in CLASSES.items()}
SIZE = {name: len(words) for name, words in CLASSES.items()}

NAMES, PLACES = CLASSES["name"], CLASSES["place"]

# What reasoning needs besides, behind all others: so the ids of the older tasks stay what they are.
REASONING_WORDS: tuple[str, ...] = (*WORDS, "north", "south", "east", "west", "furthest", "room", "which")
REASONING_ID = {word: index for index, word in enumerate(REASONING_WORDS)}
FULL_STOP = ID["."]

# Noise. The verbs of the facts occur in it, names and places do not: a model that remembers for thousands of segments
# must not be misled once, and to tell the place of a fact from others takes much longer training.
TEMPLATES = (
    "the {quality} {thing} was {manner} {deed} by the {animal} .",
    "the {animal} {manner} {deed} the {quality} {thing} .",
    "a {quality} {animal} {mover} to the {thing} .",
    "the {animal} {mover} back to the {thing} .",
    "near the {thing} there was a {quality} {thing} .",
    "the {thing} beside the {thing} was {quality} and {quality} .",
    "{manner} , the {animal} {deed} a {thing} behind the {thing} .",
    "the {weather} was very {quality} near the {thing} .",
    "after the {weather} , the {thing} was not {quality} .",
    "no one {deed} the {thing} under the {quality} {thing} .",
    "some {animal} {deed} the {animal} beside the {thing} .",
    "the {thing} of the {animal} was {quality} .",
    "it was said that the {animal} had {deed} the {thing} .",
    "then the {weather} {mover} over the {thing} and into the {thing} .",
)


def encode(words: str) -> list[int]:
    """The ids of words that are divided by blanks, all of the vocabulary."""
    return [ID[word] for word in words.split()]


def tokenizer_json(ids: Mapping[str, int] = ID) -> str:
    """tokenizer.json (the tokenizers library's format): words and marks, lower case, no special tokens added."""
    special = [
        {
            "id": index,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, word in enumerate(SPECIAL)
    ]
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": dict(ids), "unk_token": "[UNK]"},
    }
    return json.dumps(value)


_INNER = np.array([word if word in CLASSES["mark"] else f" {word}" for word in REASONING_WORDS], dtype=object)
_FIRST = np.array(
    [word if word in CLASSES["mark"] else f" {word[:1].upper()}{word[1:]}" for word in REASONING_WORDS], dtype=object
)
_INNER[[ID[name] for name in NAMES]] = _FIRST[[ID[name] for name in NAMES]]


def text_of(pieces: Iterable[np.ndarray]) -> Iterator[str]:
    """Pieces of ids -> pieces of readable text: sentences begin with a capital, marks follow their word.

    The tokenizer of `tokenizer_json` turns the joined text into the same ids, special tokens apart.
    """
    last = FULL_STOP
    begun = False
    for piece in pieces:
        if not len(piece):
            continue
        before = np.concatenate([[last], piece[:-1]])
        starts = (before == FULL_STOP) | (before == ID["?"])
        text = "".join(np.where(starts, _FIRST[piece], _INNER[piece]))
        yield text if begun else text.removeprefix(" ")
        last, begun = int(piece[-1]), True
