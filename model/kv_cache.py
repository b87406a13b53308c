"""The keys and values of what was read so far: one preallocated pair of tensors a layer, written by index.

Knows shapes and rotary frequencies; does not know which sequence sits in which slot.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig, RopeConfig
from model.rope import rope_frequencies


@dataclass(frozen=True)
class KVCache:
    """`keys[i]`, `values[i]`: [num_slots, num_key_value_heads, max_seq_len, head_dim] of layer i.

    `frequencies`: for each distinct rotary embedding of the model its inverse frequencies, float32 [rotary_dim / 2].
    They live here because LongRoPE chooses them by `max_seq_len`: fixed for the life of a cache, so that a prompt read
    in pieces gives what it gives read whole.
    """

    keys: list[Tensor]
    values: list[Tensor]
    frequencies: list[Tensor]
    max_seq_len: int

    @classmethod
    def create(
        cls, config: ModelConfig, num_slots: int, max_seq_len: int, device: torch.device | str, dtype: torch.dtype
    ) -> "KVCache":
        """An empty cache for `num_slots` sequences of at most `max_seq_len` tokens."""
        shape = (num_slots, config.num_key_value_heads, max_seq_len, config.head_dim)
        # Zeros, not empty: what is past a sequence's end is masked, but 0 * NaN would not be.
        keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        values = [torch.zeros(shape, device=device, dtype=dtype) for _ in config.layers]
        frequencies = [
            rope_frequencies(rope, config.head_dim, max_seq_len, config.max_position_embeddings)[0].to(device)
            for rope in distinct_ropes(config)
        ]
        return cls(keys, values, frequencies, max_seq_len)

    def copy(self, source: int, target: int, length: int, first: int = 0) -> None:
        """Slot `target` begins with the first `length` positions of slot `source`, of which it has `first` already."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, first:length] = tensor[source, :, first:length]

    def kept(self, slot: int, first: int, length: int) -> list[Tensor]:
        """What slot `slot` holds of positions `first` to `length`, for `put`."""
        return [tensor[slot, :, first:length].clone() for tensor in (*self.keys, *self.values)]

    def put(self, kept: list[Tensor], slots: list[int], first: int) -> None:
        """Each of the slots holds again, from position `first` on, what was kept."""
        for tensor, part in zip((*self.keys, *self.values), kept, strict=True):
            tensor[slots, :, first : first + part.shape[1]] = part

    def shorter(self, factor: int) -> "KVCache":
        """The same memory as `factor` times the slots, each of so much fewer positions; what it holds means nothing
        there.
        """
        slots, heads, length, size = self.keys[0].shape
        shape = (slots * factor, heads, length // factor, size)
        keys, values = (
            [tensor.view(-1)[: math.prod(shape)].view(shape) for tensor in tensors]
            for tensors in (self.keys, self.values)
        )
        return KVCache(keys, values, self.frequencies, length // factor)

    @property
    def num_slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values together."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def bytes_read(config: ModelConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that making one token reads, `context` positions being there with its own."""
    window = config.sliding_window
    seen = [
        context if layer.attention != "sliding" or window is None else min(context, window) for layer in config.layers
    ]
    return 2 * sum(seen) * config.num_key_value_heads * config.head_dim * dtype.itemsize


def distinct_ropes(config: ModelConfig) -> list[RopeConfig]:
    """The rotary embeddings of a model, each once, in the order of the layers that use them first."""
    return list(dict.fromkeys(layer.rope for layer in config.layers if layer.rope is not None))
