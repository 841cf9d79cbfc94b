"""Batched sampling with a KV cache: prompts of different lengths, several stop ids, finished rows are dropped.

generate_plainly, with prefill, sample and invert below it, is the whole idea; all that follows is the same, faster and with more
options.

References
    nucleus sampling                    arXiv:1904.09751
    MiniLLM, teacher-mixed sampling     arXiv:2306.08543, eq. (4)
"""
import math
import operator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd.cache import KVCache, StaticCache
from minikd.data import Encoded, by_length
from minikd.decode_cuda import OneKernel, fits
from minikd.errors import InputError
from minikd.fused_cuda import GREEDY, can_draw, draw_on_gpu
from minikd.graphs import Replay, can_record
from minikd.layout import head_logits, laid_out, torch_products
from minikd.losses import log_mix, log_probs
from minikd.model import Qwen2

LOOK = 16                                                       # on a GPU, steps after which the host reads the tokens
BLOCK = 128                                                     # tokens of the vocabulary in one block of `invert`


@torch.inference_mode()
def generate_plainly(model: Qwen2, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                     top_k: int = 0, eos_ids=(), seed: int = 0) -> list[list[int]]:
    """What generate computes, to be read first: the same tokens (up to rounding), but finished rows go on costing time, and
    nothing is packed, recorded or fused.  prompts: at least one, none of them empty"""
    device = model.head.device
    u = torch.rand(max_new_tokens, len(prompts), generator=torch.Generator(device).manual_seed(seed), dtype=torch.float64,
                   device=device)                                               # [max_new_tokens, B]
    cache, states = prefill(model, prompts, max_new_tokens, samples=1)          # the state after each prompt [B, D]
    answers = [[] for _ in prompts]
    for t in range(max_new_tokens):
        if t:
            states = model.hidden(tokens[:, None], cache)[:, 0]                 # [B, D]; all earlier tokens are in the cache
        tokens, _ = sample(F.linear(states, model.head), temperature, top_p, top_k, u[t])               # [B]
        for answer, token in zip(answers, tokens.tolist()):
            if not answer or answer[-1] not in eos_ids:
                answer.append(token)
    return answers


def prefill(model: Qwen2, prompts: list[list[int]], max_new_tokens: int, samples: int) -> tuple[KVCache, Tensor]:
    """Reads the prompts once -> a cache with room for the answers, `samples` rows per prompt, and the states [B, D] that
    the first new tokens are drawn from."""
    device, width = model.head.device, max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)              # [P]
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)     # [P, T]
    capacity = -(-(width + max(0, max_new_tokens - 1)) // 8) * 8    # the last token is never read; x 8, for masked attention
    cache = KVCache(model.config, lengths, capacity, model.head.dtype)
    states = model.hidden(ids, cache)[torch.arange(len(ids), device=device), lengths - 1]   # [P, D]
    if samples == 1:
        return cache, states
    rows = torch.arange(len(ids), device=device).repeat_interleave(samples)                 # [B]
    cache.keep(rows)
    return cache, states[rows]


def sample(logits: Tensor, temperature: float, top_p: float, top_k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """logits [B, V] -> a token per row [B] and its log-probability [B]; temperature, then top-k, then top-p apply.

    u  [B] float64, uniform in [0, 1): one random number per row; torch.multinomial would draw one per vocabulary entry
    """
    if temperature < GREEDY:
        top = logits.max(-1)                                    # argmax takes 4 x as long in bfloat16
        return top.indices, top.values - top.values             # 0; NaN where the largest logit is NaN or infinite
    if temperature != 1:                                        # at 1, no copy of [B, V] is needed
        logits = logits.float() / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]                      # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1, dtype=torch.float32)                                         # [B, V]
    if top_p < 1:
        ranked, order = probs.sort(descending=True)
        before = ranked.cumsum(-1) - ranked                     # mass of the likelier tokens; the first stays at any top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ranked.masked_fill((before >= top_p) & (before > 0), 0.0))
    tokens, total = invert(probs, u[:, None])                                               # [B, 1] each
    return tokens[:, 0], (probs.gather(1, tokens) / total).log()[:, 0]


def invert(probs: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling: the token [B, 1] at which the running sum of probs [B, V] passes u [B, 1] x their total; and
    that total [B, 1], which is below 1 after top-p.

    In one line: torch.searchsorted(probs.double().cumsum(-1), u * total, right=True). But a single running sum over 151,936
    probabilities, in float64 as float32 would lose the tail, takes two to ten times as long as their softmax; on a GPU one block
    of threads would walk each row. So this searches for the block of 128 tokens, and then within it.
    """
    fill = -probs.shape[1] % BLOCK
    blocks = (F.pad(probs, (0, fill)) if fill else probs).reshape(len(probs), -1, BLOCK)       # [B, V/128, 128]; F.pad copies
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(-1)       # [B, V/128] mass of each block and of all before it
    total = upto[:, -1:]                                                                    # [B, 1]
    goal = u * total                                                                        # [B, 1]
    at = torch.searchsorted(upto, goal, right=True).clamp_(max=upto.shape[1] - 1)           # right: skips blocks of mass 0
    inside = blocks.gather(1, at[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)    # [B, 128]
    before = F.pad(upto, (1, -1))                               # shifted by one block; upto less each mass would round below 0
    rest = goal - before.gather(1, at)                          # [B, 1] still to pass, within the block
    rest = rest.minimum(inside[:, -1:] * (1 - 2**-52))          # rounding must not take it past the block's last token
    tokens = at * BLOCK + torch.searchsorted(inside, rest, right=True)
    return tokens.clamp_(max=probs.shape[1] - 1), total         # NaNs, of a model that diverged, run past the end


def generate(model: Qwen2, prompts: list[list[int]], max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, **options) -> list[list[int]]:
    """Continues every prompt; returns the new tokens only, including the stop token if one ended the row.

    temperature  0 is greedy
    top_k        keep the k likeliest tokens, and any as likely as the last of them; 0 keeps all
    top_p        then keep the smallest set of likeliest tokens whose probabilities sum to p or more (nucleus)
    eos_ids      one id or several: a row ends after any of these, or at max_new_tokens without one
    seed         for this call only: the same call gives the same tokens, whatever ran before (in a 4-bit model on a CPU sums
                 may be rounded differently after other calls, as it keeps their layout)
    options      those of generate_with_log_probs
    The weights may move in memory (layout.laid_out), so do not use an alias made before, such as p.data. Until it returns, other
    threads may do nothing with the model but generate; they take turns.
    Raises ValueError for prompts that are empty or not lists of the model's ids, and for options out of their range
    (check_options); InputError (a ValueError) if the model's logits are not finite.
    """
    return generate_with_log_probs(model, prompts, max_new_tokens, temperature, top_p, top_k, eos_ids, seed, **options)[0]


@torch.inference_mode()
def generate_with_log_probs(model: Qwen2, prompts: list[list[int]], max_new_tokens: int, temperature: float,
                            top_p: float = 1.0, top_k: int = 0, eos_ids=(), seed: int | None = None, samples: int = 1,
                            teacher: Qwen2 | None = None, mix: float = 0.0, vocab: int | None = None,
                            no_repeat_ngram_size: int = 0, graphs: bool | None = None,
                            one_kernel: bool = True) -> tuple[list[list[int]], list[list[float]]]:
    """generate's new tokens, and the log-probability of each under the distribution it was drawn from, temperature and
    truncation included; 0 if greedy.

    samples  answers per prompt, next to each other in the result; they share the prompt's prefill
    teacher  with `mix`, MiniLLM's α: each token is drawn from (1 - mix) model + mix teacher, in probabilities, at temperature 1
    vocab    draw only ids below it: heads have rows past the tokenizer's ids, a teacher's sometimes more than a student's
    no_repeat_ngram_size  draw no token that completes an n-gram of this size for the second time in prompt and answer; 0 allows
             all. The host must know every token before the next step, so there are no graphs
    graphs   every step works on tensors at fixed addresses, so that a CUDA graph replays it; the host reads the tokens every
             LOOK steps, and drops finished rows when half have finished. Default: where can_record. True on a CPU runs such
             steps without a graph (for tests). In bfloat16 their sums are rounded differently: of tokens that are nearly as
             likely, another may be drawn
    one_kernel  with `graphs`: where decode_cuda.fits, one kernel computes the hidden states
    """
    check_options(temperature, top_p, top_k, samples, teacher, mix, vocab, no_repeat_ngram_size)
    models = [model, teacher] if mix else [model]
    prompts = read_prompts(prompts, min(len(each.head) for each in models))
    count = len(prompts) * samples                              # of answers
    if not prompts or max_new_tokens < 1:
        return [[] for _ in range(count)], [[] for _ in range(count)]
    stops = as_set(eos_ids)
    device = model.head.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed % 2**63)
    # Draws all random numbers now, one per token: so no answer depends on which others were dropped, and graphs draw none.
    u = torch.rand(max_new_tokens, count, generator=generator, dtype=torch.float64, device=device)
    graphs = (can_record(device) if graphs is None else graphs) and not no_repeat_ngram_size

    def logits_of(states, decoding):
        """The models' states [B, D] -> the logits [B, V] that the next tokens are drawn from."""
        logits = head_logits(model, states[0])[:, :vocab]                                   # [B, V]
        if mix:
            logq, logp = log_probs(logits, head_logits(teacher, states[1]), temperature=1.0)
            logits = log_mix(logp, logq, mix)                   # MiniLLM eq. (4), over the rows that both heads have
        if no_repeat_ngram_size:
            written = (prompts[i // samples] + decoding.answers[i] for i in decoding.alive)
            ban_repeats(logits, written, no_repeat_ngram_size)
        return logits

    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))     # packed weights support only their own dtype
        for each in models:
            stack.enter_context(laid_out(each, rows=count, steps=max_new_tokens))
        caches, states = zip(*(prefill(each, prompts, max_new_tokens, samples) for each in models))
        stack.enter_context(torch_products(model.head, count))
        if graphs:
            caches = [StaticCache(cache) for cache in caches]
        if graphs and one_kernel:
            models = [OneKernel(each, cache) if fits(each, count) else each for each, cache in zip(models, caches)]
        decoding = Decoding(models, caches, states, logits_of, (temperature, top_p, top_k), u)
        step = Replay(decoding.step, on=graphs and device.type == "cuda")
        look = LOOK if graphs else 1                            # steps between two reads
        for done in range(1, max_new_tokens):                   # tokens drawn so far, the first by Decoding()
            if done == 1 or done % look == 0:                   # at 1: all may have stopped at once
                going = decoding.read(done, stops)              # the rows that are not finished
                if not going:
                    break
                # A graph has a fixed number of rows: dropping some costs a new graph, so it waits until half have finished.
                rows = len(decoding.alive)
                most = rows // 2 if graphs else rows - 1
                if len(going) <= most:
                    decoding.keep(going)
                    step = Replay(decoding.step, step.on)
            step()
        decoding.read(max_new_tokens, stops)
    return decoding.answers, decoding.answer_logps


def as_set(eos_ids) -> frozenset[int]:
    """One id, several, or None; also of numpy or torch."""
    if eos_ids is None:
        return frozenset()
    eos_ids = eos_ids.tolist() if hasattr(eos_ids, "tolist") else eos_ids
    return frozenset(map(int, [eos_ids] if isinstance(eos_ids, int) else eos_ids))


def read_prompts(prompts, ids: int) -> list[list[int]]:
    """Lists, tuples or rows of a tensor as lists of ids.  Raises ValueError for anything else, such as one prompt alone, for an
    empty prompt, and for a token that is not among the first `ids`."""
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    except TypeError as error:
        raise ValueError(f"generate: prompts must be lists of ids, one list for each prompt ({error})") from error
    if not all(prompts):
        raise ValueError("generate: a prompt is empty; give each at least one token")
    strange = [token for prompt in prompts for token in prompt if not 0 <= token < ids]
    if strange:                                                 # on a GPU a failed lookup would make it unusable to this process
        raise ValueError(f"generate: {strange[0]} in a prompt is not an id of the model, which has {ids:,}; encode prompts with "
                         "its own tokenizer")
    return prompts


def check_options(temperature, top_p, top_k, samples, teacher, mix, vocab, no_repeat_ngram_size):
    """Raises ValueError for options out of their range, and for a mix without what it needs."""
    if (samples < 1 or not (temperature >= 0 and 0 < top_p <= 1) or min(top_k, no_repeat_ngram_size) < 0
            or vocab is not None and vocab < 1):
        raise ValueError("generate: samples and vocab must be at least 1, temperature, top_k and no_repeat_ngram_size at least "
                         "0, 0 < top_p <= 1")
    if mix and (teacher is None or temperature != 1 or not 0 < mix < 1):
        raise ValueError(f"generate: mix = {mix} needs a teacher, 0 < mix < 1 and temperature 1")


class Decoding:
    """The answers being written: on the device every row's newest token, the caches, and all that was drawn so far; on the
    host what `read` has copied."""

    def __init__(self, models, caches, states, logits_of, sampling: tuple[float, float, int], u: Tensor):
        """logits_of  (states, self) -> logits [B, V].   sampling  temperature, top_p, top_k.   u [max_new_tokens, B]"""
        self.models, self.caches, self.logits_of, self.sampling, self.u = models, caches, logits_of, sampling, u
        self.answers, self.answer_logps = ([[] for _ in range(u.shape[1])] for _ in range(2))
        self.alive = list(range(u.shape[1]))                                # which answer each row writes
        self.seen = 0                                                       # tokens of each row that `read` has copied
        self.at = torch.full_like(u[0], -1, dtype=torch.long)               # [B] index of the newest token in its answer: equal
                                                                            # in all rows, but the GPU's kernel wants one each
        self.tokens = torch.zeros_like(self.at)                                             # [B]
        self.drawn, self.logps = torch.zeros_like(u, dtype=torch.long), torch.zeros_like(u)     # [max_new_tokens, B]
        self.draw(states)

    def step(self):
        """The next token of every row. It reads and writes only tensors at fixed addresses, so that a graph can replay it."""
        self.draw([model.hidden(self.tokens[:, None], cache)[:, 0]                          # [B, D] of each model
                   for model, cache in zip(self.models, self.caches)])

    def draw(self, states):
        """A token per row from the models' states [B, D]: into `tokens`, and with its log-probability into the answers."""
        logits, (temperature, top_p, top_k) = self.logits_of(states, self), self.sampling   # [B, V]
        if (temperature < GREEDY or top_k == 0 and top_p == 1) and can_draw(logits):        # the rest by one kernel on a GPU
            return draw_on_gpu(logits, self.u, self.at, self.tokens, self.drawn, self.logps, temperature)   # in place, as below
        self.at += 1
        now = self.at[:1]                                           # the same for all rows
        tokens, logps = sample(logits, temperature, top_p, top_k, self.u.index_select(0, now)[0])       # [B], [B]
        self.tokens.copy_(tokens)
        self.drawn.index_copy_(0, now, tokens[None])
        self.logps.index_copy_(0, now, logps[None].double())

    def read(self, done: int, stops: frozenset) -> list[int]:
        """Appends to the answers the tokens drawn since the last call, up to `done` in all, but none after a stop token; returns
        the rows whose answers are not finished."""
        new = zip(self.alive, self.drawn[self.seen:done].T.tolist(), self.logps[self.seen:done].T.tolist())
        self.seen, going = done, []
        for row, (answer, tokens, logps) in enumerate(new):
            if self.answers[answer] and self.answers[answer][-1] in stops:  # finished before, but not dropped yet
                continue
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
            if math.isnan(sum(logps[:end])):
                whose = "model's" if len(self.models) == 1 else "model's or the teacher's"
                raise InputError(f"generate: the {whose} logits are not finite, so there is nothing to draw from; the weights "
                                 "are damaged, training diverged (lower --lr), or float16 overflows")
            self.answers[answer] += tokens[:end]
            self.answer_logps[answer] += logps[:end]
            if tokens[end - 1] not in stops:
                going.append(row)
        return going

    def keep(self, rows: list[int]):
        """Drops all rows but these."""
        self.alive = [self.alive[row] for row in rows]
        kept = torch.tensor(rows, device=self.u.device)                                     # [b]
        for cache in self.caches:
            cache.keep(kept)
        self.at, self.tokens = self.at[kept], self.tokens[kept]
        self.u, self.drawn, self.logps = (x.index_select(1, kept) for x in (self.u, self.drawn, self.logps))    # contiguous


def ban_repeats(logits: Tensor, histories, n: int):
    """Sets to -inf, in place, the logits [B, V] of tokens that would repeat an n-gram of the row's history, unless this would
    ban all tokens."""
    for row, history in zip(logits, histories):                                             # row: [V]
        last = history[len(history) - n + 1:]                   # the newest n - 1 tokens; below, what followed them earlier
        followed = (history[i + n - 1] for i in range(len(history) - n + 1) if history[i:i + n - 1] == last)
        banned = {token for token in followed if token < len(row)}
        if 0 < len(banned) < len(row):
            row[list(banned)] = -torch.inf


def respond(model: Qwen2, rows: list[Encoded], batch_size: int, max_new_tokens: int, eos_ids, temperature: float = 1.0,
            seed: int = 0, progress=None, **options) -> list[Encoded]:
    """The rows with their responses replaced by the model's own, in the same order; prompts of similar length are batched.

    progress  called after each batch with its number of rows
    options   those of generate_with_log_probs except samples
    A response that reached max_new_tokens without a stop token is `cut`; no stop token is added.
    """
    own, eos_ids = list(rows), as_set(eos_ids)
    with laid_out(model, rows=min(batch_size, len(rows)), steps=max_new_tokens):            # once for all batches
        for turn, at in enumerate(by_length([row.prompt for row in rows], batch_size)):
            responses = generate(model, [rows[i].prompt for i in at], max_new_tokens, temperature, eos_ids=eos_ids,
                                 seed=seed * 1_000_003 + turn * batch_size, **options)      # seeds differ up to a million rows
            for i, response in zip(at, responses, strict=True):             # one each: no `samples`
                own[i] = rows[i].answered(response, eos_ids)
            if progress:
                progress(len(at))
    return own
