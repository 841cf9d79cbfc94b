"""The KV cache: decoding with it equals a forward pass over the whole rows."""
import math

import pytest
import torch

from conftest import random_ids, random_model
from minikd.cache import KVCache, StaticCache


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 7, 1], [1, 1, 1]], ids=str)
def test_cached_decoding_equals_the_full_forward(lengths):
    model, new = random_model(), 5
    rows = [random_ids(n + new, seed=n).tolist() for n in lengths]
    cache = KVCache(model.config, torch.tensor(lengths), max(lengths) + new, torch.float32)
    with torch.no_grad():
        states = model.hidden(padded([row[:n] for row, n in zip(rows, lengths)]), cache)
        steps = [torch.stack([states[b, n - 1] for b, n in enumerate(lengths)])]
        for i in range(new - 1):
            tokens = torch.tensor([[row[n + i]] for row, n in zip(rows, lengths)])
            steps.append(model.hidden(tokens, cache)[:, 0])
        for b, n in enumerate(lengths):
            full = model.hidden(torch.tensor([rows[b]]))[0, n - 1:n - 1 + new]
            torch.testing.assert_close(torch.stack(steps)[:, b], full, atol=2e-5, rtol=0)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_leave_the_cache_change_nothing_for_those_that_stay(static):
    model, lengths = random_model(), torch.tensor([4, 2, 5])
    ids, next_ids = random_ids(3, 5), random_ids(3, 3, seed=1)
    stay = torch.tensor([2, 1])
    with torch.no_grad():
        all_rows, fewer = (KVCache(model.config, lengths, 8, torch.float32) for _ in range(2))
        for cache in (all_rows, fewer):
            model.hidden(ids, cache)
        fewer = StaticCache(fewer) if static else fewer
        for cache in (all_rows, fewer):
            model.hidden(next_ids[:, :1], cache)
        fewer.keep(stay)
        for i in 1, 2:                                      # the last slot too
            want = model.hidden(next_ids[:, i:i + 1], all_rows)[stay]
            torch.testing.assert_close(model.hidden(next_ids[stay, i:i + 1], fewer), want, atol=1e-5, rtol=0)


def test_what_memory_held_before_does_not_reach_a_static_cache():
    model = random_model()
    with torch.inference_mode():
        cache = KVCache(model.config, torch.tensor([2, 1]), 8, torch.float32)
        for slots in cache.keys + cache.values:
            slots.fill_(math.nan)
        model.hidden(torch.tensor([[5, 6], [7, 0]]), cache)
        assert model.hidden(torch.tensor([[1], [2]]), StaticCache(cache)).isfinite().all()


def test_what_a_cache_cannot_hold_is_refused():
    """Written past its end, keys would be lost without a word."""
    model = random_model()
    cache = KVCache(model.config, torch.tensor([3, 2]), 4, torch.float32)
    with torch.no_grad():
        with pytest.raises(ValueError, match="prompts of 5 columns for a cache of 3"):
            model.hidden(random_ids(2, 5), cache)
        model.hidden(random_ids(2, 3), cache)
        with pytest.raises(ValueError, match="2 tokens at once after the prompts"):
            model.hidden(random_ids(2, 2), cache)
        model.hidden(random_ids(2, 1), cache)
        with pytest.raises(ValueError, match="has 4 slots, and 4 are used; make it with a larger capacity"):
            model.hidden(random_ids(2, 1), cache)
        with pytest.raises(ValueError, match="has 2 slots, and 0 are used"):
            model.hidden(random_ids(2, 3), KVCache(model.config, torch.tensor([3, 2]), 2, torch.float32))
