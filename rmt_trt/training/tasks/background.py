"""A text of the user's as noise: sentences drawn at random from a part of a file of any size.

The file is read once in chunks, split into sentences and tokenised; the ids stand in a temporary file without a name,
which is memory-mapped. So the text is never in memory as a whole, and the disk gets its space back with the process.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np

from rmt_trt.errors import ContractError, FormatError
from rmt_trt.files import checked_path, sha256
from rmt_trt.training.tasks.draws import Draws
from rmt_trt.training.tasks.running_text import RunningText

CHUNK = 1 << 20  # bytes read at a time
LONGEST_TEXT = 4096  # characters without the end of a sentence that are taken as one
LONGEST = 128  # tokens of a sentence; a longer one counts as several
TOGETHER = 4096  # sentences tokenised at a time
MOST_SENTENCES = (1 << 32) - 1  # one random number of 32 bits chooses a sentence

# White space behind a full stop, a question or an exclamation mark, and at most two closing quotes or brackets.
_CLOSING = "['\")\\]\u2019\u201d\xbb]"
_BORDER = re.compile(rf"(?:(?<=[.?!])|(?<=[.?!]{_CLOSING})|(?<=[.?!]{_CLOSING}{{2}}))\s")


@dataclass(frozen=True, eq=False)
class Background:
    """The sentences of a part of a text, tokenised.

    name     the file's name, without its folder; sha256 of the whole file
    part     (start, stop) as shares of the file's bytes
    words    the tokenizer
    ids      (tokens,) int32, all sentences one after the other, read only
    borders  (sentences + 1,) int64: sentence i is ids[borders[i] : borders[i + 1]]
    """

    name: str
    sha256: str
    part: tuple[float, float]
    words: RunningText
    ids: np.ndarray
    borders: np.ndarray

    @classmethod
    def open(cls, path: Path | str, tokenizer_json: str, start: float = 0.0, stop: float = 1.0) -> Background:
        """Reads the part from `start` to `stop`, shares of the file's bytes, each moved to the next sentence's begin.

        So parts that meet share no sentence. Errors: FormatError, for a file or a tokenizer that cannot be read, no
        UTF-8, no sentence or special tokens in it; ContractError, for a part that is none.
        """
        path = checked_path(path)
        if not 0 <= start < stop <= 1:
            raise ContractError(
                f"the part of the text is {start}:{stop}; expected shares in order, such as 0:0.9 or 0.9:1"
            )
        words = RunningText(tokenizer_json)
        try:
            if not path.is_file():
                raise FormatError(f"{path} is no regular file that is there; expected a text in UTF-8")
            digest = sha256(path)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                texts = _texts(file, path, _border(file, start, size), _border(file, stop, size))
                ids, borders = _tokenised(_sentences(texts), words, path)
        except OSError as err:
            raise FormatError(f"{path} cannot be read ({err.strerror}); expected a text in UTF-8") from err
        if len(borders) < 2:
            what = f"the part {start}:{stop} of {path}" if (start, stop) != (0, 1) else str(path)
            raise FormatError(f"{what} holds no sentence; take a larger part or another text")
        return cls(path.name, digest, (float(start), float(stop)), words, ids, borders)

    @property
    def sentences(self) -> int:
        """How many there are to be drawn."""
        return len(self.borders) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all sentences together."""
        return len(self.ids)

    @property
    def full_stop(self) -> int:
        """The id of a full stop."""
        return self.words.full_stop

    @property
    def sentence_length(self) -> float:
        """Tokens of a sentence, on average."""
        return self.tokens / self.sentences

    def draw(self, draws: Draws, count: int) -> np.ndarray:
        """The ids (n,) int64 of `count` random sentences, one after the other."""
        return self.draw_sentences(draws, count)[0]

    def draw_sentences(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, and where each of them ends (count,) int64."""
        which = draws.below(self.sentences, count).astype(np.intp)
        begins = self.borders[which]
        lengths = self.borders[which + 1] - begins
        ends = np.cumsum(lengths)
        places = np.repeat(begins - ends + lengths, lengths)
        places += np.arange(len(places))
        return self.ids[places].astype(np.int64), ends

    def text_of(self, parts: Iterable[np.ndarray]) -> Iterator[str]:
        """Parts of ids, each of whole sentences -> parts of readable text."""
        begun = False
        for part in parts:
            text = self.words.decode(part).strip()
            yield f" {text}" if begun else text
            begun = True


def _border(file: IO[bytes], share: float, size: int) -> int:
    """The byte at which the sentence that goes on at this share of the file ends."""
    place = int(share * size)
    if place in (0, size):
        return place
    file.seek(place)
    window = file.read(4 * LONGEST_TEXT + 4)
    inside = len(window) - len(window.lstrip(bytes(range(0x80, 0xC0))))  # the rest of a character
    text = window[inside:].decode("utf-8", "ignore")
    end = _sentence_end(text, 0)
    return place + inside + len(text[:end].encode()) if end else size


def _texts(file: IO[bytes], path: Path, begin: int, end: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig" if begin == 0 else "utf-8")()
    file.seek(begin)
    place = begin
    try:
        while chunk := file.read(min(CHUNK, end - place)):
            if b"\0" in chunk:
                raise FormatError(
                    f"{path} is no text in UTF-8: byte {place + chunk.index(0)} is zero, as in UTF-16 or in what is no text; "
                    f"convert it to UTF-8"
                )
            yield decoder.decode(chunk)
            place += len(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as err:
        raise FormatError(f"{path} is not UTF-8 text ({err.reason} near byte {place}); convert it to UTF-8") from err


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences with white space collapsed; the same however the text comes in."""
    held = ""
    for text in texts:
        held += text
        start = 0
        while stop := _sentence_end(held, start):
            yield " ".join(held[start:stop].split())
            start = stop
        held = held[start:]
    yield " ".join(held.split())


def _sentence_end(text: str, start: int) -> int:
    """Where the sentence that begins at `start` ends; 0 where more text is needed to tell."""
    limit = start + LONGEST_TEXT
    if border := _BORDER.search(text, start, limit):
        return border.end()
    if len(text) < limit:
        return 0
    head = text[start:limit].rstrip().rsplit(None, 1)
    return start + len(text[start:limit].rstrip()) - len(head[1]) if len(head) == 2 else limit


def _tokenised(sentences: Iterator[str], words: RunningText, path: Path) -> tuple[np.ndarray, np.ndarray]:
    special = np.array(sorted(words.special), np.int32)
    wanted = (sentence for sentence in sentences if sentence)
    with _Kept(path, np.int32) as ids_kept, _Kept(path, np.int64) as borders_kept:
        borders_kept.add(np.zeros(1, np.int64))
        while some := list(islice(wanted, TOGETHER)):
            encoded = words.encode(some)
            ids = np.fromiter(chain.from_iterable(encoded), np.int32)
            if np.isin(ids, special).any():
                raise _special_error(some, encoded, words, path)
            lengths = [min(LONGEST, len(one) - i) for one in encoded for i in range(0, len(one), LONGEST)]
            borders_kept.add(ids_kept.count + np.cumsum(np.array(lengths, np.int64)))
            ids_kept.add(ids)
        if borders_kept.count > MOST_SENTENCES:
            raise FormatError(f"{path} holds more than {MOST_SENTENCES} sentences; take a part of it")
        return ids_kept.mapped(), borders_kept.mapped()


class _Kept:
    """An array that grows in a temporary file without a name, and can be mapped in the end."""

    def __init__(self, path: Path, dtype: type[np.generic]) -> None:
        self.count = 0
        self._path, self._dtype = path, dtype
        with self._said():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said already
            self._file.close()

    def add(self, values: np.ndarray) -> None:
        with self._said():
            self._file.write(values.astype(self._dtype).tobytes())
            self._file.flush()
        self.count += len(values)

    def mapped(self) -> np.ndarray:
        """All values, read only; they stay when the file is closed."""
        if not self.count:
            return np.zeros(0, self._dtype)
        with self._said():
            return np.asarray(np.memmap(self._file, self._dtype, "r", shape=(self.count,)))

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise FormatError(
                f"the tokens of {self._path} cannot be kept in a temporary file: {err.strerror}. Set TMPDIR to a folder with room"
            ) from err


def _special_error(sentences: list[str], encoded: list[list[int]], words: RunningText, path: Path) -> FormatError:
    found = (
        (sentence, token)
        for sentence, ids in zip(sentences, encoded, strict=True)
        for token in words.special.intersection(ids)
    )
    sentence, token = next(found)
    return FormatError(
        f"{path} holds the tokenizer's special token {words.name_of(token)!r} in {sentence[:80]!r}; take it out, models "
        "read it as a border"
    )
