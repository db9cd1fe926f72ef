"""Tokens in, from whatever a caller has: checked in pieces, special ids dropped, read in order at constant memory.

A document is an array or memmap, a list of ints, anything that speaks DLPack or `__array__`, or an iterator of ints
or of 1-D pieces. A batch is a list of documents or a 2-D array whose rows may end in padding (ids below 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rmt_trt.contract import StepSpec
from rmt_trt.errors import ContractError, TokenError

PIECE = 1 << 16  # tokens that are checked at a time: 512 KiB as int64


def split_batch(tokens: Any) -> tuple[list[Any], bool]:
    """(documents, whether a batch came). Errors: TokenError, for an empty list or an array of rank 0 or above 2."""
    tokens = as_array(tokens)
    if isinstance(tokens, np.ndarray):
        if tokens.ndim == 1:
            return [tokens], False
        if tokens.ndim == 2:
            return list(tokens), True
        raise TokenError(f"tokens have shape {tokens.shape}; expected 1-D (a document) or 2-D (a batch of rows)")
    if isinstance(tokens, (list, tuple)):
        if not tokens:
            raise TokenError("tokens are an empty list; expected at least one token, or a list of documents")
        if is_number(tokens[0]):
            return [tokens], False
        return list(tokens), True
    if isinstance(tokens, (Iterator, Iterable)) and not isinstance(tokens, (bytes, dict, set)):
        return [tokens], False
    raise TokenError(
        f"tokens are of type {type(tokens).__name__}; expected an integer array, a list, an iterator of ints or of "
        f"1-D pieces, or a list of documents"
    )


def as_array(tokens: Any) -> Any:
    """A numpy view of anything that speaks DLPack or `__array__`; everything else as it is."""
    if isinstance(tokens, (np.ndarray, str)):
        return tokens
    if isinstance(tokens, range):
        return np.arange(tokens.start, tokens.stop, tokens.step)
    try:
        if hasattr(tokens, "__dlpack__"):
            return np.from_dlpack(tokens)
        if hasattr(tokens, "__array__"):
            return np.asarray(tokens)
    except (BufferError, RuntimeError, TypeError, ValueError) as err:
        raise TokenError(f"tokens of type {type(tokens).__name__} cannot be read from this engine: {err}. "
                         f"Move them to the host first") from err
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
        self.tokens_read = 0
        self._ids = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)
        if isinstance(tokens, (list, tuple)):
            tokens = _from_list(tokens, where)
        self._array = tokens if isinstance(tokens, np.ndarray) else None
        if self._array is not None and self._array.ndim != 1:
            raise TokenError(f"{where}: tokens have shape {self._array.shape}; expected one dimension")
        if self._array is None and not isinstance(tokens, Iterable):
            raise TokenError(f"{where}: tokens are of type {type(tokens).__name__}; expected an array or an iterator")
        self._clean = self._kept(_array_pieces(self._array) if self._array is not None else _pieces(tokens, where))

    def count(self) -> int | None:
        """The length: counted over an array (checking every token on the way), stated for an iterator, or None."""
        if self._array is None:
            return self._stated
        length = sum(len(ids) for ids, _ in self._kept(_array_pieces(self._array)))
        if self._stated is not None and length != self._stated:
            raise TokenError(self._wrong_length(length))
        return length

    def read(self, size: int) -> np.ndarray:
        """The next `size` tokens, int64; fewer at the end of the document, none behind it."""
        while len(self._ids) < size:
            piece = next(self._clean, None)
            if piece is None:
                break
            self._ids = np.concatenate([self._ids, piece[0]]) if len(self._ids) else piece[0]
            self._ends = np.concatenate([self._ends, piece[1]]) if len(self._ends) else piece[1]
        ids, self._ids = self._ids[:size], self._ids[size:]
        if len(ids):
            self.tokens_read, self._ends = int(self._ends[len(ids) - 1]), self._ends[len(ids) :]
        self._given += len(ids)
        if self._stated is not None and (self._given > self._stated or (len(ids) < size and self._given < self._stated)):
            raise TokenError(self._wrong_length(self._given + len(self._ids)))
        return ids

    def skip(self, size: int) -> None:
        """Passes over tokens without keeping them."""
        while size > 0 and len(ids := self.read(min(size, PIECE))):
            size -= len(ids)

    def at_end(self) -> bool:
        """Whether nothing follows; may read one piece ahead."""
        while not len(self._ids):
            piece = next(self._clean, None)
            if piece is None:
                return True
            self._ids, self._ends = piece
        return False

    def _wrong_length(self, came: int) -> str:
        dropped = f" after dropping the ids {list(self._spec.dropped_ids)}" if self._spec.dropped_ids else ""
        return f"{self.where}: length={self._stated} was stated, but {came} tokens came{dropped}. State the right length"

    def _kept(self, pieces: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Checked pieces without dropped ids and padding, each with the position behind every kept token."""
        start, padded_at, dropped = 0, -1, np.array(self._spec.dropped_ids, np.int64)
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
            keep = ids >= 0
            if not keep.all() or padded_at >= 0:
                first_pad = start + int(np.argmin(keep)) if padded_at < 0 else padded_at
                later = np.flatnonzero(keep & (np.arange(start, start + len(ids)) > first_pad))
                if len(later):
                    raise TokenError(
                        f"{self.where}: token {first_pad} is padding (an id below 0), but token {start + later[0]} behind it is "
                        f"{ids[later[0]]}. Padding stands at the end of a row only: move it there, or leave it out"
                    )
                padded_at = first_pad
            if len(dropped):
                keep &= ~np.isin(ids, dropped)
            kept = np.flatnonzero(keep)
            yield ids[kept] if len(kept) < len(ids) else ids, kept + (start + 1)
            start += len(ids)


def _array_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + PIECE] for start in range(0, len(array), PIECE))


def _pieces(tokens: Iterable[Any], where: str) -> Iterator[np.ndarray]:
    """Arrays out of an iterator of ints or of 1-D pieces; single ints are gathered, pieces are cut to PIECE."""
    source = iter(tokens)
    count = 0
    while True:
        try:
            first = as_array(next(source, None))
            if first is None:
                return
            if is_number(first):
                values = [first, *_numbers(source, 4095)]
                tail = values.pop() if not is_number(values[-1]) else None
                found = [_from_list(values, where), *([] if tail is None else [_piece(tail, where, count + len(values))])]
            else:
                found = [_piece(first, where, count)]
        except (TokenError, ContractError):
            raise
        except Exception as err:
            raise TokenError(
                f"{where}: the token iterator raised {type(err).__name__}: {err} (after {count} tokens or more). The run "
                f"stopped there; mend the source, and go on from a saved state if there is one"
            ) from err
        for piece in found:
            count += len(piece)
            yield from _array_pieces(piece)


def _numbers(source: Iterator[Any], most: int) -> Iterator[Any]:
    """Up to `most` items; the last one may be a piece instead of a number."""
    for item in itertools.islice(source, most):
        yield item
        if not is_number(item):
            return


def _piece(value: Any, where: str, start: int) -> np.ndarray:
    value = as_array(value)
    if isinstance(value, (list, tuple)):
        value = _from_list(value, where)
    if not isinstance(value, np.ndarray) or value.ndim > 1:
        shape = value.shape if isinstance(value, np.ndarray) else type(value).__name__
        raise TokenError(f"{where}: the iterator gave {shape} at token {start}; expected ints or 1-D integer pieces")
    return value.reshape(-1)


def _from_list(values: Sequence[Any], where: str) -> np.ndarray:
    try:
        array = np.asarray(values) if len(values) else np.empty(0, np.int64)
    except (ValueError, OverflowError) as err:
        raise TokenError(f"{where}: the list cannot be read as token ids ({err}); expected whole numbers") from err
    return array


def _as_ids(raw: np.ndarray, where: str, start: int) -> np.ndarray:
    """int64 ids out of an integer array, or out of floats that are all whole numbers."""
    if raw.dtype.kind in "iu":
        if raw.dtype == np.uint64 and len(raw) and int(raw.max()) > np.iinfo(np.int64).max:
            raise TokenError(f"{where}: a token near {start} is {int(raw.max())}; no vocabulary is that large")
        return raw.astype(np.int64)
    if raw.dtype.kind == "f":
        whole = np.isfinite(raw) & (raw == np.floor(raw)) & (np.abs(raw) < 2**53)
        if whole.all():
            return raw.astype(np.int64)
        bad = int(np.argmin(whole))
        raise TokenError(f"{where}: token {start + bad} is {raw[bad]}; token ids are whole numbers")
    raise TokenError(f"{where}: tokens have dtype {raw.dtype}; expected integers (for text, use a model with a tokenizer)")


def _stated(length: Any, where: str) -> int | None:
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
        raise TokenError(f"{where}: length={length!r}; expected the number of tokens, at least 1")
    return int(length)
