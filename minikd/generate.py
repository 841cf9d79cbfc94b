"""Batched sampling with a KV cache: prompts of different lengths, several stop ids, finished rows leave."""
from contextlib import contextmanager

import torch
from torch import Tensor

from minikd.losses import apply_head
from minikd.model import KVCache, Linear, Qwen2


@torch.inference_mode()
def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None) -> list[list[int]]:
    """Continues every prompt; returns the new tokens only, a stop token that ended the row included.

    temperature  0 is greedy
    top_k        keep the k likeliest tokens; 0 keeps all
    top_p        then keep the fewest tokens whose probability reaches p (nucleus, arXiv:1904.09751)
    eos_ids      a row ends after any of these; one that reaches max_new_tokens ends without
    seed         of this call alone: the same call gives the same tokens, whatever ran before
    Raises ValueError for an empty prompt: there is no state to sample the first token from.
    """
    if not all(prompts):
        raise ValueError("generate: a prompt is empty; give each at least one token")
    answers = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    device, stops = model.head.device, frozenset(eos_ids)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)              # [B]
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)   # [B, P]
    cache = KVCache(model.config, lengths, width + max_new_tokens - 1, model.head.dtype)
    with packed(model, rows=len(prompts), steps=max_new_tokens):
        states = model.hidden(ids, cache)                                                   # [B, P, D]
        states = states[torch.arange(len(ids), device=device), lengths - 1]                 # [B, D] each row's last
        alive = list(range(len(prompts)))                                                   # rows still being written
        for step in range(max_new_tokens):
            tokens = sample(head_logits(model, states), temperature, top_p, top_k, generator)   # [B]
            for row, token in zip(alive, tokens.tolist()):
                answers[row].append(token)
            going = [i for i, row in enumerate(alive) if answers[row][-1] not in stops]
            if not going or step == max_new_tokens - 1:
                return answers
            if len(going) < len(alive):                         # a finished row stops costing
                rows = torch.tensor(going, device=device)
                cache.keep(rows)
                tokens, alive = tokens[rows], [alive[i] for i in going]
            states = model.hidden(tokens[:, None], cache)[:, 0]                             # [B, D]


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator) -> Tensor:
    """One token a row, from logits [B, V] -> [B], in the order temperature, top-k, top-p."""
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]                      # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)                                                              # [B, V]
    if top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked                     # mass of the likelier tokens; 0 for the first
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill((before >= top_p) & (before > 0), 0.0))
    # Inverse CDF: one random number a row, where multinomial draws one a token of the vocabulary.
    cdf = probs.double().cumsum(-1)                             # float32 would lose the tail of 151,936 rows
    u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=torch.float64) * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True).clamp_(max=probs.shape[-1] - 1)[:, 0]     # right: never mass 0


def head_logits(model: Qwen2, states: Tensor) -> Tensor:
    """states [B, D] -> logits [B, V], through the packed head while there is one."""
    if model.packed_head is not None:
        return torch.ops.mkldnn._linear_pointwise(states, model.packed_head, None, "none", [], "")
    return apply_head(states, model.head)


@contextmanager
def packed(model: Qwen2, rows: int, steps: int):
    """Within the block, every weight has a second copy in the layout oneDNN multiplies few rows by fastest.

    bfloat16 on a CPU only: there a step reads every weight once, and the plain layout reaches about 60% of
    the memory's speed. Packing costs about as much as five steps, and a copy of the weights for as long.
    """
    weight = model.head
    worth = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and steps >= 16
    if not (worth and torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
        model.packed_head = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        yield
    finally:
        for layer in layers:
            layer.packed = None
        model.packed_head = None
