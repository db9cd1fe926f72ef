"""Tokens in, from whatever a caller has: checked in pieces, special ids dropped, read in order at constant memory.

A document is an array or memmap, a list of ints, anything that speaks DLPack or `__array__`, or an iterator of ints
or of 1-D pieces. A batch is a list of documents or a 2-D array whose rows may end in padding (ids below 0).
"""

from __future__ import annotations

import itertools
import mmap
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from rmt_trt.contract import MAX_VOCABULARY, StepSpec
from rmt_trt.errors import RMTError, TokenError
from rmt_trt.runtime import cuda

PIECE = 1 << 14  # tokens that are checked at a time: 128 KiB as int64
FIRST_PIECE = 1 << 11  # of an array; each takes twice as many, so that its first step does not wait for a long look
GATHER = 4096  # ints of an iterator that are taken at a time, at most
FEW = 16  # ids that a model drops
NOTHING = object()
# They can be iterated over, and what comes out of them is no text's tokens in order.
NO_TOKENS = (bytes, bytearray, memoryview, Mapping, Set)


def split_batch(tokens: Any) -> tuple[list[Any], bool]:
    """(documents, whether a batch came). Errors: TokenError, for no document, or an array of rank 0 or above 2."""
    tokens = as_array(tokens)
    if isinstance(tokens, np.ndarray):
        if tokens.ndim == 1:
            return [tokens], False
        if tokens.ndim == 2 and len(tokens):
            return list(tokens), True
        raise TokenError(
            f"tokens have shape {tokens.shape}; expected 1-D (a document) or 2-D (a batch of 1 row or more)"
        )
    if isinstance(tokens, (list, tuple)):
        if not tokens:
            raise TokenError("tokens are an empty list; expected at least one token, or a list of documents")
        if is_number(tokens[0]):
            return [tokens], False
        return list(tokens), True
    if isinstance(tokens, Iterable) and not isinstance(tokens, NO_TOKENS):
        return [tokens], False
    raise TokenError(
        f"tokens are of type {type(tokens).__name__}; expected an integer array, a list, an iterator of ints or of "
        f"1-D pieces, or a list of documents"
    )


def as_array(tokens: Any) -> Any:
    """A numpy view of anything that speaks DLPack or `__array__`; everything else as it is.

    What lies on a GPU is fetched once, as a whole.
    """
    if isinstance(tokens, np.ma.MaskedArray):
        raise TokenError("tokens are a masked array, whose masked values are no tokens. Pass tokens.compressed()")
    if isinstance(tokens, (np.ndarray, str)):
        return tokens
    try:
        if isinstance(tokens, range):
            tokens = tokens[: MAX_VOCABULARY + 1]  # a longer one leaves any vocabulary within these
            return np.arange(tokens.start, tokens.stop, tokens.step)
        if cuda.on_gpu(tokens):
            return cuda.to_host(tokens)
        if hasattr(tokens, "__dlpack__"):
            return np.from_dlpack(tokens)
        if hasattr(tokens, "__array__"):
            return np.asarray(tokens)
    except RMTError:
        raise
    except Exception as err:  # the caller's own code runs here
        raise TokenError(
            f"tokens of type {type(tokens).__name__} cannot be read as a numpy array ({err or type(err).__name__}). "
            f"Move them to the host and pass an integer array"
        ) from err
    return tokens


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.bool_))


class Document:
    """One document's tokens, special ids dropped, read in order. `where` names it in messages.

    length        tokens that it has in all, dropped ids and padding not counted; None for an iterator
    tokens_read   tokens taken from the caller's source for what `read` has given so far, dropped ids included
    """

    def __init__(self, tokens: Any, spec: StepSpec, where: str, stated_length: int | None = None) -> None:
        tokens = as_array(tokens)
        self.where = where
        self._spec = spec
        self._stated = _stated(stated_length, where)
        self._given = 0
        self._wanted = 1
        self.tokens_read = 0
        self._ids = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)
        if isinstance(tokens, (list, tuple)):
            tokens = _from_list(tokens, where)
        self._array = tokens if isinstance(tokens, np.ndarray) else None
        if self._array is not None and self._array.ndim != 1:
            raise TokenError(f"{where}: tokens have shape {self._array.shape}; expected one dimension")
        if self._array is None and (isinstance(tokens, NO_TOKENS) or not isinstance(tokens, Iterable)):
            raise TokenError(f"{where}: tokens are of type {type(tokens).__name__}; expected an array or an iterator")
        self._clean = self._kept(
            _array_pieces(self._array) if self._array is not None else _pieces(tokens, where, lambda: self._wanted)
        )

    def count(self) -> int | None:
        """The length: counted over an array (checking every token on the way), stated for an iterator, or None."""
        if self._array is None:
            return self._stated
        length = sum(len(ids) for ids, _ in self._kept(_array_pieces(self._array)))
        if self._stated is not None and length != self._stated:
            raise TokenError(self._wrong_length(length))
        return length

    def read(self, size: int) -> np.ndarray:
        """The next `size` tokens, int64; fewer at the end of the document, none behind it.

        Of an iterator of ints no more is taken than that, so that a document may still be in the making.
        """
        while len(self._ids) < size:
            self._wanted = size - len(self._ids)
            piece = next(self._clean, None)
            if piece is None:
                break
            self._ids = np.concatenate([self._ids, piece[0]]) if len(self._ids) else piece[0]
            self._ends = np.concatenate([self._ends, piece[1]]) if len(self._ends) else piece[1]
        ids, self._ids = self._ids[:size], self._ids[size:]
        if len(ids):
            self.tokens_read, self._ends = int(self._ends[len(ids) - 1]), self._ends[len(ids) :]
        self._given += len(ids)
        if self._stated is not None and (
            self._given > self._stated or (len(ids) < size and self._given < self._stated)
        ):
            raise TokenError(self._wrong_length(self._given + len(self._ids)))
        return ids

    def skip(self, size: int) -> None:
        """Passes over tokens without keeping them."""
        while size > 0 and len(ids := self.read(min(size, PIECE))):
            size -= len(ids)

    def at_end(self) -> bool:
        """Whether nothing follows; may read one piece ahead, of an iterator of ints one."""
        if self._array is not None and not self._given:  # a second look: a long batch holds no piece of each document
            return not any(len(ids) for ids, _ in self._kept(_array_pieces(self._array)))
        self._wanted = 1
        while not len(self._ids):
            piece = next(self._clean, None)
            if piece is None:
                return True
            self._ids, self._ends = piece
        return False

    def _wrong_length(self, came: int) -> str:
        dropped = f" after dropping the ids {list(self._spec.dropped_ids)}" if self._spec.dropped_ids else ""
        return (
            f"{self.where}: length={self._stated} was stated, but {came} tokens came{dropped}. State the right length"
        )

    def _kept(self, pieces: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Checked pieces without dropped ids and padding, each with the position behind every kept token."""
        start, padded_at, dropped = 0, -1, self._spec.dropped_ids
        for raw in pieces:
            ids = _as_ids(raw, self.where, start)
            if not len(ids):
                continue
            if int(ids.max()) >= self._spec.vocab_size:
                bad = int(np.argmax(ids >= self._spec.vocab_size))
                raise TokenError(
                    f"{self.where}: token {start + bad} is {ids[bad]}; the vocabulary has ids 0 to "
                    f"{self._spec.vocab_size - 1}. Was the text tokenised with this model's tokenizer?"
                )
            keep = _not_in(ids, dropped)
            if padded_at >= 0 or int(ids.min()) < 0:
                real = ids >= 0
                first_pad = start + int(np.argmin(real)) if padded_at < 0 else padded_at
                later = np.flatnonzero(real & (np.arange(start, start + len(ids)) > first_pad))
                if len(later):
                    raise TokenError(
                        f"{self.where}: token {first_pad} is padding (an id below 0), but token {start + later[0]} behind it is "
                        f"{ids[later[0]]}. Padding stands at the end of a row only: move it there, or leave it out"
                    )
                padded_at = first_pad
                keep &= real
            if keep.all():
                yield ids, np.arange(start + 1, start + 1 + len(ids))
            else:
                kept = np.flatnonzero(keep)
                yield ids[kept], kept + (start + 1)
            start += len(ids)


def _not_in(ids: np.ndarray, dropped: tuple[int, ...]) -> np.ndarray:
    """Which ids are kept: of the few that models drop, a comparison with each is the fastest way."""
    if len(dropped) > FEW:
        return np.isin(ids, dropped, invert=True)
    keep = np.ones(len(ids), np.bool_)
    for one in dropped:
        keep &= ids != one
    return keep


def _array_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    mapping, start, size = _file_mapping(array), 0, FIRST_PIECE
    while start < len(array):
        piece = array[start : start + size]
        yield piece
        if mapping is not None:
            _give_back(mapping, piece)
        start, size = start + size, min(PIECE, 2 * size)


def _file_mapping(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping of a contiguous memmap whose pages can be read again, or None. In one opened with mode "c" the
    caller's changes are in the pages alone."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    if owner is None or not array.flags.c_contiguous or getattr(owner, "mode", "c") == "c":
        return None
    mapping = getattr(owner, "_mmap", None)
    return mapping if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None


def _give_back(mapping: mmap.mmap, piece: np.ndarray) -> None:
    """Lets go of the pages in front of a piece's end: read pages count as this process's memory until then."""
    first = piece.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    start, stop = (place // mmap.PAGESIZE * mmap.PAGESIZE for place in (first, first + piece.nbytes))
    if stop > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _pieces(tokens: Iterable[Any], where: str, wanted: Callable[[], int]) -> Iterator[np.ndarray]:
    """Arrays out of an iterator of ints or of 1-D pieces; ints are gathered, as many as wanted, pieces cut to PIECE."""
    source, count = None, 0
    while True:
        most, numbers, other = min(wanted(), GATHER), [], NOTHING
        failure: Exception | None = None
        try:
            source = iter(tokens) if source is None else source
            for item in itertools.islice(source, most):
                if not is_number(item):
                    other = item
                    break
                numbers.append(item)
        except RMTError:
            raise
        except Exception as err:  # the caller's own code runs here
            failure = err
        if numbers:
            yield _from_list(numbers, where, count)
            count += len(numbers)
        if failure is not None:
            raise TokenError(
                f"{where}: the token iterator raised {type(failure).__name__}: {failure} after {count} tokens. The run "
                f"stopped there; mend the source, and go on from a saved state if there is one"
            ) from failure
        if other is not NOTHING:
            piece = _piece(other, where, count)
            yield from _array_pieces(piece)
            count += len(piece)
        elif len(numbers) < most:
            return


def _piece(value: Any, where: str, start: int) -> np.ndarray:
    came, value = value, as_array(value)
    if isinstance(value, (list, tuple)):
        value = _from_list(value, where, start)
    if not isinstance(value, np.ndarray) or value.ndim > 1:
        what = f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else reprlib.repr(came)
        raise TokenError(f"{where}: the iterator gave {what} at token {start}; expected ints or 1-D integer pieces")
    return value.reshape(-1)


def _from_list(values: Sequence[Any], where: str, start: int = 0) -> np.ndarray:
    """An array of numbers. A bool or anything else that is none is refused, where numpy would make an array of it."""
    if not len(values):
        return np.empty(0, np.int64)
    kinds = set(map(type, values))
    if any(kind is bool or not issubclass(kind, (int, float, np.integer, np.floating)) for kind in kinds):
        bad = next(i for i, v in enumerate(values) if isinstance(v, (bool, np.bool_)) or not is_number(v))
        raise TokenError(
            f"{where}: token {start + bad} is {reprlib.repr(values[bad])}, of type {type(values[bad]).__name__}; token ids "
            f"are whole numbers"
        )
    try:
        return np.array(values, np.int64) if kinds == {int} else np.asarray(values)
    except OverflowError as err:
        bad = next(i for i, v in enumerate(values) if abs(v) >> 62)
        raise TokenError(_too_large(where, start + bad, values[bad])) from err


def _too_large(where: str, position: int, value: Any) -> str:
    return f"{where}: token {position} is {reprlib.repr(int(value))}; no vocabulary is that large. Is it a token id?"


def _as_ids(raw: np.ndarray, where: str, start: int) -> np.ndarray:
    """int64 ids out of an integer array, or out of floats that are all whole numbers."""
    if raw.dtype.kind == "O":
        raw = _from_list(raw.tolist(), where, start)
    if raw.dtype.kind in "iu":
        if raw.dtype == np.uint64 and len(raw) and int(raw.max()) > np.iinfo(np.int64).max:
            raise TokenError(_too_large(where, start + int(raw.argmax()), raw.max()))
        return raw.astype(np.int64)
    if raw.dtype.kind == "f":
        values = raw.astype(np.float64)
        whole = np.isfinite(values) & (values == np.floor(values)) & (np.abs(values) < 2**53)
        if whole.all():
            return values.astype(np.int64)
        bad = int(np.argmin(whole))
        raise TokenError(f"{where}: token {start + bad} is {raw[bad]}; token ids are whole numbers")
    raise TokenError(f"{where}: tokens have dtype {raw.dtype}; expected integers. For text pass a str")


def _stated(length: Any, where: str) -> int | None:
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
        raise TokenError(f"{where}: length={length!r}; expected the number of tokens, at least 1")
    return int(length)
