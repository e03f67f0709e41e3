"""Reuse of keys and values between sequences that begin alike: full KV blocks found by a hash chain over their tokens.

As RadixAttention (Zheng et al., SGLang, NeurIPS 2024, section 3) in what it saves, by hashes of blocks instead of a
tree. Full blocks alone are shared and a sequence's last token is always computed, so no shared block is ever written.
"""

from array import array
from hashlib import blake2b

from scheduling.core.blocks import BlockAllocator
from scheduling.core.sequence import Sequence

DIGEST_BYTES = 16
NO_BLOCK = bytes(DIGEST_BYTES)
"""What the first block of a chain follows."""


class PrefixCache:
    """Finds and publishes the blocks of sequences in an allocator.

    A block's name is a keyed hash (BLAKE2b) of its tokens and of the name of the block before it, so that equal names
    mean equal tokens from the first on; nobody without `key` can make two contents collide. With `per_tenant` chains
    begin with the tenant, and how fast an answer comes tells one tenant nothing of another's prompts.
    """

    def __init__(self, allocator: BlockAllocator, *, key: bytes, per_tenant: bool = False) -> None:
        """`key`: up to 64 random bytes, drawn anew by every engine process."""
        self._allocator = allocator
        self._key = key
        self._per_tenant = per_tenant
        self.num_tokens = 0
        """Tokens of admitted sequences that could have been found, and those that were; each sequence counts once."""
        self.num_hit_tokens = 0

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks that hold a sequence's first tokens, without its last token's; holds none of them yet."""
        found: list[int] = []
        for index in range((len(sequence.tokens) - 1) // self._allocator.block_size):
            block = self._allocator.find(self._name(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def count(self, sequence: Sequence, num_found: int) -> None:
        """Note a first admission that found so many blocks; what is found after a preemption saves nothing new."""
        block_size = self._allocator.block_size
        sequence.num_cached = num_found * block_size
        self.num_hit_tokens += sequence.num_cached
        self.num_tokens += (len(sequence.tokens) - 1) // block_size * block_size

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that a step has filled."""
        num_full = min(sequence.num_computed, len(sequence.tokens)) // self._allocator.block_size
        for index in range(sequence.num_published, num_full):
            self._allocator.publish(sequence.block_table[index], self._name(sequence, index))
            sequence.num_published = index + 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence is preempted, and lets go of its blocks now; what it filled is published by then."""

    def retract(self, sequence: Sequence) -> None:
        """After a sequence has failed: let nobody find what it computed."""
        self._allocator.retract(sequence.block_table)

    def _name(self, sequence: Sequence, index: int) -> bytes:
        names = sequence.block_hashes
        size = self._allocator.block_size
        while len(names) <= index:
            start = len(names) * size
            before = names[-1] if names else self._root(sequence)
            tokens = array("i", sequence.tokens[start : start + size]).tobytes()
            names.append(blake2b(before + tokens, digest_size=DIGEST_BYTES, key=self._key).digest())
        return names[index]

    def _root(self, sequence: Sequence) -> bytes:
        if not self._per_tenant:
            return NO_BLOCK
        return blake2b(sequence.tenant.encode(), digest_size=DIGEST_BYTES, key=self._key).digest()
