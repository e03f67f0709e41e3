"""A step's ragged mix of prefill chunks and decodes, flattened into arrays that attention and sampler read."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inference.engine.errors import InvalidPart
from scheduling.core.sequence import Sequence, StepPart

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class StepBatch:
    """`T` tokens of `S` parts laid end to end."""

    token_ids: Int64
    """[T]"""
    positions: Int64
    """[T], each token's position in its own sequence."""
    slots: Int64
    """[T], where its key and value go: `block * block_size + offset`."""
    query_starts: Int32
    """[S + 1], the first token of each part, and T."""
    context_lens: Int32
    """[S], tokens of the sequence in the cache once this step's are written."""
    block_tables: Int32
    """[S, longest table], rows padded with 0."""
    sample_rows: Int64
    """[N], the tokens whose logits are wanted: the last of each part that samples, and before it those of a draft."""
    sample_parts: list[int]
    """The parts that sample, in order."""
    part_of: Int32
    """[T], the part each token belongs to."""


def check_part(part: StepPart, *, vocab_size: int, max_model_len: int, num_blocks: int, block_size: int) -> None:
    """Raise InvalidPart with a sentence where this part cannot be computed."""
    sequence, end = part.sequence, part.sequence.num_computed + part.num_tokens
    known = len(sequence.tokens) + len(part.draft)
    if part.num_tokens < 1 + len(part.draft) or end > known:
        raise InvalidPart(f"The part covers tokens {sequence.num_computed} to {end} of {known}.")
    if (part.samples or part.draft) and end != known:
        raise InvalidPart(f"The part samples at token {end} of {known}, before the sequence's end.")
    if end > max_model_len:
        raise InvalidPart(f"The sequence has {end} tokens; this model takes at most {max_model_len}.")
    if len(sequence.block_table) * block_size < end:
        raise InvalidPart(f"{len(sequence.block_table)} KV blocks of {block_size} tokens do not hold {end} tokens.")
    if min(sequence.block_table) < 0 or max(sequence.block_table) >= num_blocks:
        raise InvalidPart(f"The block table names a block outside the {num_blocks} of the KV cache.")
    tokens = [*sequence.tokens[sequence.num_computed : end], *part.draft]
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        bad = next(t for t in tokens if not 0 <= t < vocab_size)
        raise InvalidPart(f"Token id {bad} is outside the vocabulary of {vocab_size}.")


def foresee_batch(sequences: Seq[Sequence], block_size: int) -> StepBatch:
    """The decode step that follows when each of these has got one more token; `token_ids` are left open.

    Their blocks have room for that token, whose key and value the step writes.
    """
    return _decode_batch(sequences, [len(s.tokens) for s in sequences], [0] * len(sequences), block_size)


def _decode_batch(sequences: Seq[Sequence], positions: list[int], token_ids: list[int], block_size: int) -> StepBatch:
    """One token of each sequence."""
    num_parts = len(sequences)
    tables = _tables([s.block_table for s in sequences])
    at, owner = np.array(positions, np.int64), np.arange(num_parts + 1, dtype=np.int32)
    blocks, offsets = np.divmod(at, block_size)
    return StepBatch(
        token_ids=np.array(token_ids, np.int64),
        positions=at,
        slots=tables[owner[:-1], blocks].astype(np.int64) * block_size + offsets,
        query_starts=owner,
        context_lens=at.astype(np.int32) + 1,
        block_tables=tables,
        sample_rows=np.arange(num_parts, dtype=np.int64),
        sample_parts=list(range(num_parts)),
        part_of=owner[:-1],
    )


def _tables(rows: list[list[int]]) -> Int32:
    tables = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tables[i, : len(row)] = row
    return tables


def build_batch(parts: Seq[StepPart], block_size: int) -> StepBatch:
    """Flatten checked parts, in their order."""
    if all(part.num_tokens == 1 and part.samples for part in parts):  # most steps, and the shortest ones
        decodes = [part.sequence for part in parts]
        return _decode_batch(decodes, [s.num_computed for s in decodes], [s.tokens[-1] for s in decodes], block_size)
    num_parts = len(parts)
    lengths = np.empty(num_parts, np.int32)
    starts = np.empty(num_parts, np.int32)
    tables = _tables([part.sequence.block_table for part in parts])
    flat: list[int] = []
    for i, part in enumerate(parts):
        sequence, start = part.sequence, part.sequence.num_computed
        lengths[i], starts[i] = part.num_tokens, start
        flat.extend(sequence.tokens[start : start + part.num_tokens])
        flat.extend(part.draft)
    query_starts = np.zeros(num_parts + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    owner = np.repeat(np.arange(num_parts, dtype=np.int32), lengths)
    positions = np.arange(len(flat), dtype=np.int64) - np.repeat(query_starts[:-1] - starts, lengths)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    sample_parts = [i for i, part in enumerate(parts) if part.samples]
    wanted = np.array([1 + len(parts[i].draft) for i in sample_parts], np.int64)
    ends = query_starts[1:][sample_parts].astype(np.int64)
    sample_rows = np.repeat(ends - np.cumsum(wanted), wanted) + np.arange(wanted.sum())
    return StepBatch(
        token_ids=np.array(flat, np.int64),
        positions=positions,
        slots=slots,
        query_starts=query_starts,
        context_lens=starts + lengths,
        block_tables=tables,
        sample_rows=sample_rows,
        sample_parts=sample_parts,
        part_of=owner,
    )
