"""Sorted rows in columns: what waits, at 8 bytes a value where an object a row would take over a hundred."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, MutableSequence, Sequence
from typing import Any

Column = MutableSequence[Any]
CHUNK = 128
"""Rows of a chunk at most. A row is looked for by its id from a chunk's beginning, so chunks are small."""


class Chunk:
    """Some rows that follow each other, one column beside the other."""

    __slots__ = ("columns", "rows")

    def __init__(self, columns: Sequence[Column], rows: "Rows") -> None:
        self.columns = columns
        self.rows = rows


class Rows:
    """Rows in ascending order of their first two columns: a number and what decides between equals.

    Takes empty columns (`array("d")`, a list) for the first chunk; further chunks are made alike. To insert, find or
    delete a row costs O(log n) comparisons and the moving of one chunk's values.
    """

    __slots__ = ("bounds", "chunks", "size")

    def __init__(self, *columns: Column) -> None:
        self.chunks = [Chunk(columns, self)]
        self.bounds: list[tuple[float, Any]] = [(0.0, None)]
        """The least key that belongs to each chunk; that of the first is not read."""
        self.size = 0

    def insert(self, key: float, tie: Any) -> None:
        """Put a row of two columns in its place."""
        chunk = self.chunks[-1]
        keys, ties = chunk.columns
        at = len(keys)
        if at and key <= keys[-1]:
            chunk, at = self.locate(key, tie)
            keys, ties = chunk.columns
        keys.insert(at, key)
        ties.insert(at, tie)
        self.size += 1
        if len(keys) > CHUNK:
            self._split(chunk, at)

    def locate(self, key: float, tie: Any) -> tuple[Chunk, int]:
        """Where the row of this key is, or belongs."""
        chunks = self.chunks
        chunk = chunks[-1]
        keys = chunk.columns[0]
        if not keys or key > keys[-1]:
            return chunk, len(keys)
        if len(chunks) > 1:
            chunk = chunks[bisect_right(self.bounds, (key, tie), 1) - 1]
            keys = chunk.columns[0]
        ties, end = chunk.columns[1], bisect_right(keys, key)
        if not end or keys[end - 1] != key or ties[end - 1] < tie:
            return chunk, end
        if ties[end - 1] == tie:
            return chunk, end - 1
        return chunk, bisect_left(ties, tie, bisect_left(keys, key, 0, end), end)

    def first_from(self, key: float) -> tuple[Chunk, int] | None:
        """Where the first row is whose key is not below this one; None where all are."""
        chunks = self.chunks
        last = chunks[-1].columns[0]
        if not last or last[-1] < key:
            return None
        place = bisect_left(self.bounds, (key,), 1) - 1
        at = bisect_left(chunks[place].columns[0], key)
        return (chunks[place], at) if at < len(chunks[place].columns[0]) else (chunks[place + 1], 0)

    def delete(self, chunk: Chunk, at: int) -> None:
        """Take a row out."""
        columns = chunk.columns
        for column in columns:
            del column[at]
        self.size -= 1
        if not columns[0]:
            self._drop(chunk)

    def discard(self, key: float, tie: Any) -> None:
        """Take out the row of this key, which has to be there, of two columns."""
        chunks = self.chunks
        chunk = chunks[bisect_right(self.bounds, (key, tie), 1) - 1] if len(chunks) > 1 else chunks[0]
        keys, ties = chunk.columns
        at = bisect_left(keys, key)
        if ties[at] != tie:
            at = bisect_left(ties, tie, at, bisect_right(keys, key, at))
        del keys[at], ties[at]
        self.size -= 1
        if not keys:
            self._drop(chunk)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for chunk in self.chunks:
            yield from zip(*chunk.columns, strict=True)

    def __reversed__(self) -> Iterator[tuple[Any, ...]]:
        for chunk in reversed(self.chunks):
            yield from reversed(list(zip(*chunk.columns, strict=True)))

    def before(self, chunk: Chunk, at: int) -> int:
        """How many rows come before this one."""
        return at + sum(len(other.columns[0]) for other in self.chunks[: self.chunks.index(chunk)])

    def _drop(self, chunk: Chunk) -> None:
        """Forget an empty chunk, unless it is the only one."""
        if len(self.chunks) > 1:
            place = 0 if chunk is self.chunks[0] else self.chunks.index(chunk)
            del self.chunks[place], self.bounds[place]

    def _split(self, chunk: Chunk, at: int) -> Chunk:
        """Split a chunk into which a row was put at `at`; the new one."""
        # Where rows come in order, chunks stay full.
        columns, cut = chunk.columns, CHUNK if at == CHUNK and chunk is self.chunks[-1] else CHUNK // 2
        upper = Chunk([column[cut:] for column in columns], self)
        chunk.columns = [column[:cut] for column in columns]  # a slice has no slack, as what has grown has
        place = self.chunks.index(chunk) + 1
        self.chunks.insert(place, upper)
        self.bounds.insert(place, (upper.columns[0][0], upper.columns[1][0]))
        return upper
