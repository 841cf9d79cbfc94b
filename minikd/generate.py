"""Batched sampling with a KV cache: prompts of different lengths, several stop ids, finished rows leave.

References
    nucleus sampling                    arXiv:1904.09751
    MiniLLM, teacher-mixed sampling     arXiv:2306.08543, eq. (4)
"""
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from minikd.data import Encoded
from minikd.losses import apply_head, log_mix, log_probs
from minikd.model import KVCache, Linear, Qwen2


def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, **options) -> list[list[int]]:
    """Continues every prompt; returns the new tokens only, a stop token that ended the row included.

    temperature  0 is greedy
    top_k        keep the k likeliest tokens; 0 keeps all
    top_p        then keep the fewest tokens whose probability reaches p (nucleus)
    eos_ids      a row ends after any of these; one that reaches max_new_tokens ends without
    seed         of this call alone: the same call gives the same tokens, whatever ran before
    options      those of generate_with_log_probs
    Raises ValueError for an empty prompt: there is no state to sample the first token from.
    """
    return generate_with_log_probs(model, prompts, max_new_tokens, temperature, top_p, top_k, eos_ids, seed,
                                   **options)[0]


@torch.inference_mode()
def generate_with_log_probs(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 1.0,
                            top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, samples: int = 1,
                            teacher: Qwen2 | None = None, mix: float = 0.0,
                            vocab: int | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """generate's new tokens, and the log-probability of each under the distribution it was drawn from, temperature and
    truncation included; 0 where greedy.

    samples  answers to each prompt, next to each other in the result; they share the prompt's prefill
    teacher  each token is drawn from (1 - mix) model + mix teacher, the probabilities mixed; temperature 1
    vocab    only ids below it: heads have rows past the tokenizer's ids, and a teacher may have more than a student
    """
    if not all(prompts):
        raise ValueError("generate: a prompt is empty; give each at least one token")
    if mix and (teacher is None or temperature != 1 or not 0 < mix < 1):
        raise ValueError(f"generate: mix = {mix} needs a teacher, 0 < mix < 1 and temperature 1")
    answers, chances = ([[] for _ in range(len(prompts) * samples)] for _ in range(2))
    if not answers or max_new_tokens < 1:
        return answers, chances
    device, stops = model.head.device, frozenset(eos_ids)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed % 2**63)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)              # [B]
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)   # [B, P]
    readers = [model, teacher] if mix else [model]
    with ExitStack() as stack:
        for reader in readers:
            stack.enter_context(packed(reader, rows=len(answers), steps=max_new_tokens))
        caches = [KVCache(reader.config, lengths, width + max_new_tokens - 1, reader.head.dtype) for reader in readers]
        last = torch.arange(len(ids), device=device), lengths - 1                           # each prompt's last token
        states = [reader.hidden(ids, cache)[last] for reader, cache in zip(readers, caches)]    # [B, D] each
        alive = list(range(len(answers)))                                                   # rows still being written
        if samples > 1:                                         # G rows go on from each prompt's one prefill
            rows = torch.arange(len(ids), device=device).repeat_interleave(samples)         # [B G]
            states = [state[rows] for state in states]                                      # [B G, D]
            for cache in caches:
                cache.keep(rows)
        for step in range(max_new_tokens):
            logits = head_logits(model, states[0])[:, :vocab]                               # [B, V]
            if mix:
                logits = mixture(logits, head_logits(teacher, states[1]), mix)
            tokens, chosen = sample(logits, temperature, top_p, top_k, generator)           # [B], [B]
            for row, token, chance in zip(alive, tokens.tolist(), chosen.tolist()):
                answers[row].append(token)
                chances[row].append(chance)
            going = [i for i, row in enumerate(alive) if answers[row][-1] not in stops]
            if not going or step == max_new_tokens - 1:
                return answers, chances
            if len(going) < len(alive):                         # a finished row stops costing
                rows = torch.tensor(going, device=device)
                for cache in caches:
                    cache.keep(rows)
                tokens, alive = tokens[rows], [alive[i] for i in going]
            states = [reader.hidden(tokens[:, None], cache)[:, 0] for reader, cache in zip(readers, caches)]


def mixture(logits: Tensor, teacher_logits: Tensor, mix: float) -> Tensor:
    """log((1 - mix) q + mix p).  MiniLLM eq. (4).  [B, V], [B, V'] -> [B, rows that both have]"""
    logq, logp = log_probs(logits, teacher_logits, temperature=1.0)
    return log_mix(logp, logq, mix)


def respond(model: Qwen2, rows: list[Encoded], batch_size: int, max_new_tokens: int, eos_ids, temperature: float = 1.0,
            seed: int = 0, **options) -> list[Encoded]:
    """The rows with responses of the model's own, in their order; batches hold prompts of similar length.

    options  those of generate. A response that reached max_new_tokens is `cut`, and no end is invented for it.
    """
    order, own = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt)), list(rows)
    for start in range(0, len(order), batch_size):
        at = order[start:start + batch_size]
        responses = generate(model, [rows[i].prompt for i in at], max_new_tokens, temperature, eos_ids=eos_ids,
                             seed=seed * 1_000_003 + start, **options)
        for i, response in zip(at, responses):
            own[i] = Encoded(rows[i].prompt, response, response[-1] not in eos_ids, rows[i].index)
    return own


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, generator) -> tuple[Tensor, Tensor]:
    """One token a row, from logits [B, V], in the order temperature, top-k, top-p: tokens [B], log-probabilities [B]"""
    if temperature <= 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
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
    total = cdf[:, -1:]                                                                     # [B, 1] below 1 where cut
    u = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=torch.float64) * total
    tokens = torch.searchsorted(cdf, u, right=True).clamp_(max=probs.shape[-1] - 1)        # [B, 1]; right: never mass 0
    return tokens[:, 0], (probs.gather(1, tokens) / total).log()[:, 0]


def head_logits(model: Qwen2, states: Tensor) -> Tensor:
    """states [B, D] -> logits [B, V], through the packed head while there is one."""
    if model.packed_head is not None:
        return torch.ops.mkldnn._linear_pointwise(states, model.packed_head, None, "none", [], "")
    return apply_head(states, model.head)


@contextmanager
def packed(model: Qwen2, rows: int, steps: int):
    """Within the block, every weight has a second copy in the layout oneDNN multiplies few rows by fastest.

    On a CPU only, where a step reads every weight once: the plain layout reaches 60% of the memory's speed in bfloat16,
    and in float32, from a few rows on, a third. Packing costs about as much as five steps, and a copy of the weights
    for as long.
    """
    weight = model.head
    worth = (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
             or weight.dtype == torch.float32 and rows >= 4 and weight.numel() > 1 << 20)    # a toy's lies in cache
    if not (worth and steps >= 16 and weight.device.type == "cpu" and torch.backends.mkldnn.enabled):
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
