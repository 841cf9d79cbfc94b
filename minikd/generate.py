"""Batched sampling with a KV cache: prompts of different lengths, several stop ids, finished rows leave.

References
    nucleus sampling                    arXiv:1904.09751
    MiniLLM, teacher-mixed sampling     arXiv:2306.08543, eq. (4)
"""
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd.data import Encoded
from minikd.decode_cuda import OneKernel, fits
from minikd.layout import head_logits, laid_out
from minikd.losses import log_mix, log_probs
from minikd.model import KVCache, Qwen2, StaticCache

LOOK = 16                                                       # steps that a GPU runs ahead of the host
BLOCK = 128                                                     # tokens of the vocabulary summed together in a draw


def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, **options) -> list[list[int]]:
    """Continues every prompt; returns the new tokens only, a stop token that ended the row included.

    temperature  0 is greedy
    top_k        keep the k likeliest tokens; 0 keeps all
    top_p        then keep the fewest tokens whose probability reaches p (nucleus)
    eos_ids      a row ends after any of these; one that reaches max_new_tokens ends without
    seed         of this call alone: the same call gives the same tokens, whatever ran before
    options      those of generate_with_log_probs
    Raises ValueError for an empty prompt (there is no state to sample the first token from), and for options without sense:
    a negative temperature or top_k, top_p of 0, no samples, no vocab, mix without a teacher.
    """
    return generate_with_log_probs(model, prompts, max_new_tokens, temperature, top_p, top_k, eos_ids, seed,
                                   **options)[0]


@torch.inference_mode()
def generate_with_log_probs(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 1.0,
                            top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, samples: int = 1,
                            teacher: Qwen2 | None = None, mix: float = 0.0, vocab: int | None = None,
                            graphs: bool | None = None, one_kernel: bool = False) -> tuple[list[list[int]], list[list[float]]]:
    """generate's new tokens, and the log-probability of each under the distribution it was drawn from, temperature and
    truncation included; 0 where greedy.

    samples  answers to each prompt, next to each other in the result; they share the prompt's prefill
    teacher  each token is drawn from (1 - mix) model + mix teacher, the probabilities mixed; temperature 1
    vocab    only ids below it: heads have rows past the tokenizer's ids, and a teacher may have more than a student
    graphs   a step touches fixed places on the device alone, and a CUDA graph replays it; the host looks at the tokens
             every LOOK steps, and rows that ended leave when half have. By default on CUDA. On a CPU the same step,
             without a graph.
    one_kernel  with `graphs`: where decode_cuda.fits, one kernel makes the hidden states. Not measured on a GPU so far, and
             therefore off.
    """
    if not all(prompts):
        raise ValueError("generate: a prompt is empty; give each at least one token")
    if samples < 1 or not (temperature >= 0 and top_p > 0) or top_k < 0 or vocab is not None and vocab < 1:
        raise ValueError("generate: samples and vocab are at least 1, temperature and top_k at least 0, top_p above 0")
    if mix and (teacher is None or temperature != 1 or not 0 < mix < 1):
        raise ValueError(f"generate: mix = {mix} needs a teacher, 0 < mix < 1 and temperature 1")
    answers, chances = ([[] for _ in range(len(prompts) * samples)] for _ in range(2))
    if not answers or max_new_tokens < 1:
        return answers, chances
    device, stops = model.head.device, frozenset(eos_ids)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed % 2**63)
    u = torch.rand(max_new_tokens, len(answers), generator=generator, dtype=torch.float64, device=device)
    graphs = device.type == "cuda" if graphs is None else graphs
    readers = [model, teacher] if mix else [model]

    def draw(states, u):
        """One token a row, from the readers' states [B, D] and a random number each [B]; and its log-probability."""
        logits = head_logits(model, states[0])[:, :vocab]                                   # [B, V]
        if mix:
            logits = mixture(logits, head_logits(teacher, states[1]), mix)
        return sample(logits, temperature, top_p, top_k, u)

    with ExitStack() as stack:
        for reader in readers:
            stack.enter_context(laid_out(reader, rows=len(answers), steps=max_new_tokens))
        caches, states = zip(*(prefill(reader, prompts, max_new_tokens, samples) for reader in readers))
        if graphs:
            caches = [StaticCache(cache) for cache in caches]
        if graphs and one_kernel:
            readers = [OneKernel(reader, cache) if fits(reader, len(answers)) else reader
                       for reader, cache in zip(readers, caches)]
        rows, alive, seen = Rows(readers, caches, states, draw, u), list(range(len(answers))), 0
        step = Replay(rows.step, graphs and device.type == "cuda")
        for done in range(1, max_new_tokens + 1):               # tokens that every row has
            if not graphs or done in (1, max_new_tokens) or done % LOOK == 0:
                fresh = zip(alive, rows.drawn[seen:done].T.tolist(), rows.chances[seen:done].T.tolist())
                going = [i for i, row in enumerate(fresh) if extend(answers, chances, stops, *row)]
                if not going or done == max_new_tokens:
                    break
                if len(going) <= (len(alive) // 2 if graphs else len(alive) - 1):
                    rows.keep(torch.tensor(going, device=device))           # finished rows stop costing
                    alive, step = [alive[i] for i in going], Replay(rows.step, step.on)
                seen = done
            step()
    return answers, chances


def prefill(reader: Qwen2, prompts: list[list[int]], max_new_tokens: int, samples: int) -> tuple[KVCache, Tensor]:
    """Reads the prompts once: a cache with room for the answers, `samples` rows a prompt, and the states [B, D] that
    the first new tokens are drawn from."""
    device, width = reader.head.device, max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)              # [P]
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)     # [P, T]
    capacity = -(-(width + max_new_tokens - 1) // 8) * 8                    # attention under a mask wants multiples of 8
    cache = KVCache(reader.config, lengths, capacity, reader.head.dtype)
    states = reader.hidden(ids, cache)[torch.arange(len(ids), device=device), lengths - 1]  # [P, D]
    if samples == 1:
        return cache, states
    rows = torch.arange(len(ids), device=device).repeat_interleave(samples)                 # [B]
    cache.keep(rows)
    return cache, states[rows]


class Rows:
    """The answers being written, on the device: every row's newest token, the caches, all that was drawn so far."""

    def __init__(self, readers, caches, states, draw, u: Tensor):
        """draw  (states, random numbers [B]) -> tokens [B], log-probabilities [B].   u [max_new_tokens, B]"""
        self.readers, self.caches, self.draw, self.u = readers, caches, draw, u
        self.at = torch.zeros(1, dtype=torch.long, device=u.device)         # how many steps were made
        self.drawn, self.chances = torch.zeros_like(u, dtype=torch.long), torch.zeros_like(u)   # [max_new_tokens, B]
        self.tokens, self.chances[0] = draw(states, u[0])                                   # [B]
        self.drawn[0] = self.tokens

    def step(self):
        """The next token of every row. It reads and writes fixed places alone, so that a graph can replay it."""
        self.at += 1
        states = [reader.hidden(self.tokens[:, None], cache)[:, 0] for reader, cache in zip(self.readers, self.caches)]
        tokens, chances = self.draw(states, self.u.index_select(0, self.at)[0])             # [B], [B]
        self.tokens.copy_(tokens)
        self.drawn.index_copy_(0, self.at, tokens[None])
        self.chances.index_copy_(0, self.at, chances[None].double())

    def keep(self, rows: Tensor):
        """Drops the rows that are finished; rows [B'] are the indices that stay."""
        for cache in self.caches:
            cache.keep(rows)
        self.tokens = self.tokens[rows]
        self.u, self.drawn, self.chances = self.u[:, rows], self.drawn[:, rows], self.chances[:, rows]


def extend(answers: list, chances: list, stops: frozenset, row: int, tokens: list, new: list) -> bool:
    """Adds what was drawn for a row, up to a stop token; whether the row goes on after it."""
    if answers[row] and answers[row][-1] in stops:
        return False
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    answers[row] += tokens[:end]
    chances[row] += new[:end]
    return tokens[end - 1] not in stops


class Replay:
    """Calls `step`: the first time as it is, then from a CUDA graph of it, which is one launch and no Python.

    The first call makes what may not be made under capture: cuBLAS's workspaces, kernels compiled at first use.
    """

    def __init__(self, step, on: bool):
        self.step, self.on, self.warm, self.graph = step, on, False, None

    def __call__(self):
        if not (self.on and self.warm):
            self.warm = True
            return self.step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):                  # records, without running
                self.step()
        self.graph.replay()


def mixture(logits: Tensor, teacher_logits: Tensor, mix: float) -> Tensor:
    """log((1 - mix) q + mix p).  MiniLLM eq. (4).  [B, V], [B, V'] -> [B, rows that both have]"""
    logq, logp = log_probs(logits, teacher_logits, temperature=1.0)
    return log_mix(logp, logq, mix)


def respond(model: Qwen2, rows: list[Encoded], batch_size: int, max_new_tokens: int, eos_ids, temperature: float = 1.0,
            seed: int = 0, progress=None, **options) -> list[Encoded]:
    """The rows with responses of the model's own, in their order; batches hold prompts of similar length.

    progress  called after each batch with its number of rows
    options   those of generate. A response that reached max_new_tokens is `cut`, and no end is invented for it.
    """
    order, own = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt)), list(rows)
    for start in range(0, len(order), batch_size):
        at = order[start:start + batch_size]
        responses = generate(model, [rows[i].prompt for i in at], max_new_tokens, temperature, eos_ids=eos_ids,
                             seed=seed * 1_000_003 + start, **options)
        for i, response in zip(at, responses):
            own[i] = Encoded(rows[i].prompt, response, response[-1] not in eos_ids, rows[i].index)
        if progress:
            progress(len(at))
    return own


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, from logits [B, V], in the order temperature, top-k, top-p: tokens [B], log-probabilities [B]

    u  [B] float64, uniform in [0, 1): one random number a row, where multinomial draws one a token of the vocabulary
    """
    if temperature < 1e-6:                                      # greedy; a division by so little would overflow
        return logits.max(-1).indices, torch.zeros(len(logits), device=logits.device)   # argmax of bfloat16: 4x slower
    if temperature != 1:                                        # at 1 a copy of [B, V] less
        logits = logits.float() / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]                      # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1, dtype=torch.float32)                                         # [B, V]
    if top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked                     # mass of the likelier tokens; 0 for the first
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill((before >= top_p) & (before > 0), 0.0))
    tokens, total = invert(probs, u[:, None])                                               # [B, 1] each
    return tokens[:, 0], (probs.gather(1, tokens) / total).log()[:, 0]


def invert(probs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the running sum of probs [B, V] passes u [B, 1] of the whole; and the whole, below 1 where cut.

    In two looks, for a block of tokens and within it: a running sum in float64 over 151,936 probabilities (float32 would
    lose the tail) takes twice as long as their softmax, and on a GPU a single block of threads walks along each row.
    """
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)         # [B, V/128, 128]
    mass = blocks.sum(-1, dtype=torch.float64)                                              # [B, V/128]
    upto = mass.cumsum(-1)
    total = upto[:, -1:]                                                                    # [B, 1]
    at = torch.searchsorted(upto, u * total, right=True).clamp_(max=mass.shape[1] - 1)      # right: never one of mass 0
    inside = blocks.gather(1, at[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)    # [B, 128]
    rest = u * total - (upto - mass).gather(1, at)                                          # [B, 1]
    rest = rest.minimum(inside[:, -1:] * (1 - 2**-52))          # never past the last of them, by rounding
    tokens = at * BLOCK + torch.searchsorted(inside, rest, right=True)
    return tokens.clamp_(max=probs.shape[1] - 1), total         # NaNs, of a model that diverged, pass everything
