"""The KV cache: keys and values of the tokens already read, so that a new token costs one position instead of all."""
from typing import NamedTuple

import torch
from torch import Tensor

from minikd.attend_cuda import make_parts
from minikd.config import Qwen2Config


class KVCache:
    """Per layer two tensors [B, K, S, E], allocated for the whole answer at the start; keys are held rotated (model.rotate).
    The first call of model.hidden with it reads the prompts, every later one a token per row.

    A slot is a column of the cache, the same for all rows; `valid` [B, S] says which slots hold a token of the row, or will.
    Prompts are right-padded, so a short one leaves a gap before the first new token: of the prompts a b and c d e f, with the
    new tokens x and y,

        slot      0 1 2 3 4
        row 0     a b . . x         x is in slot 4, but at position 2
        row 1     c d e f y         `used` counts slots, `lengths` positions; `valid` hides the dots
    """

    def __init__(self, config: Qwen2Config, lengths: Tensor, capacity: int, dtype: torch.dtype):
        B, prompt, device = len(lengths), int(lengths.max()), lengths.device
        self.config = config
        shape = (B, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.used, self.widest = 0, prompt                                      # slots filled so far; columns of the prompts
        self.lengths = lengths                                                  # [B] the next token's position
        self.valid = torch.arange(capacity, device=device) < lengths[:, None]   # [B, S]
        self.valid[:, prompt:] = True                                           # new tokens follow the longest prompt
        self.gapless = bool((lengths == prompt).all())                          # then decoding needs no mask at all

    def check(self, T: int):
        """Raises ValueError where the next T tokens of every row cannot be read."""
        capacity = self.valid.shape[1]
        if self.used and T != 1:
            raise ValueError(f"{T} tokens at once after the prompts; read one token of each row at a time")
        if not self.used and T != self.widest:
            raise ValueError(f"prompts of {T} columns for a cache of {self.widest}; make it with the lengths of these prompts")
        if self.used + T > capacity:
            raise ValueError(f"the cache has {capacity} slots, and {self.used} are used; make it with a larger capacity")

    def layer(self, i: int) -> "Slots":
        """Layer i's slots, for the tokens about to be read; call `advance` after the last layer."""
        mask = None if self.gapless else self.valid[:, None, None, :self.used + 1]
        return Slots(self.keys[i], self.values[i], self.used, mask)

    def advance(self, T: int):
        """Call it after the last layer: once for the prompts' T slots, then for each new token (T = 1)."""
        if self.used:                                                           # not for the prompts: `lengths` began with them
            self.lengths = self.lengths + 1
        self.used += T

    def keep(self, rows: Tensor):
        """Keeps the rows with indices rows [b], in that order; an index may repeat."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.lengths, self.valid = self.lengths[rows], self.valid[rows]


class Slots(NamedTuple):
    """One layer's part of a cache."""
    keys: Tensor                                                                # [B, K, S, E]
    values: Tensor                                                              # [B, K, S, E]
    used: int | Tensor                                                          # slots filled so far; StaticCache: a tensor [1]
    mask: Tensor | None                 # for decoding steps: [B, 1, 1, s], True where the token may look; None: everywhere.
                                        # StaticCache: [B, 1, 1, S], 0 or -inf, added to the scores
    parts: Tensor | None = None         # scratch memory of the GPU's attention kernel (attend_cuda.py), where it can run

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [B, K, T, E]; returns all that attention reads: the s slots that are filled now, [B, K, s, E] (of a
        StaticCache all S)."""
        if isinstance(self.used, Tensor):
            return self.keys.index_copy_(2, self.used, k), self.values.index_copy_(2, self.used, v)
        end = self.used + k.shape[2]
        self.keys[:, :, self.used:end] = k
        self.values[:, :, self.used:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class StaticCache(KVCache):
    """The cache of a step that a CUDA graph replays: all that changes between steps is in device tensors at fixed addresses.

    Attention then always reads all S slots: `bias`, added to the scores, is -inf at gaps and at slots that are not written yet.
    """

    def __init__(self, cache: KVCache):
        """Takes over the tensors of a cache that has read its prompts."""
        self.config, self.keys, self.values, self.used = cache.config, cache.keys, cache.values, cache.used
        for slots in self.keys + self.values:
            slots[:, :, cache.used:] = 0                                        # free memory may be NaN, and so 0 x its value
        self.valid, self.lengths = cache.valid, cache.lengths.clone()           # changed in place from here on
        self.slot = torch.full((1,), cache.used, device=cache.valid.device)     # [1] where the next token goes
        seen = torch.arange(self.valid.shape[1], device=self.valid.device) <= self.slot     # [S] the next token's slot, too
        # [B, S] added to the scores: -inf where a row may not look. Built once, not from a bool mask in every layer.
        self.bias = torch.where(self.valid & seen, 0.0, -torch.inf).to(self.keys[0].dtype)
        self.parts = make_parts(self.keys[0], self.config.num_attention_heads)

    def layer(self, i: int) -> Slots:
        return Slots(self.keys[i], self.values[i], used=self.slot, mask=self.bias[:, None, None], parts=self.parts)

    def advance(self, T: int):
        self.lengths += 1
        self.slot += 1
        self.bias.index_fill_(1, self.slot.clamp(max=self.bias.shape[1] - 1), 0)    # shows the next slot; the last has none

    def keep(self, rows: Tensor):
        super().keep(rows)
        self.bias, self.parts = self.bias[rows], make_parts(self.keys[0], self.config.num_attention_heads)
