"""Makes tests/golden/: tiny random Qwen2 folders, what transformers computes from them in float32, and whole training runs.

    python tests/make_golden.py         needs transformers; one minute; the tests themselves only read the result

For each case: a model's folder as transformers wrote it, and NAME.safetensors with
    ids [3, 12], logits [3, 12, V]            a full batch
    padded [3, 12], padded_logits, lengths    the same, right-padded rows of unequal lengths
    prompts, prompt_lengths, greedy [4, 64]   transformers' generate on a left-padded batch of unequal prompts
Biases are not zero, norms are not one and weights are large, so that any part left out would show. The seed of each
case is the first whose greedy choices all have a margin that rounding cannot overturn.

For each run of RUNS, training/NAME.safetensors: six optimizer steps on full logits, with AdamW by its formula
    ids [6, T], prompt_lengths, lengths [6]   right-padded rows, all of them in every step
    ce, kd, norm [6]                          of each step, before its update
    before, after [6, T, V]                   the student's logits

For each run of GRPO, training/NAME.safetensors: three steps of GRPO on given answers, two groups of three to a step
    ids [3, 6, T], prompt_lengths, lengths, cut, rewards [3, 6]     NaN: not judged; the first ROWS ids may be drawn
    old [3, 6, T - 1]                         log-probabilities of ids[:, :, 1:] when the step begins
    norm, kl, clipped [3]                     of each step's last update: gradient, mean k3, share of tokens past the clip
    after [6, T, V]                           the policy's logits of the first step's answers

training/minillm.safetensors: four steps of MiniLLM, two on each of two sets of given answers, with plain text
    ids [2, 6, T], prompt_lengths, lengths [2, 6], text [6, 9]
    ce, kd, norm [4]                          of each step, before its update; ce is -log q of the answers
    after [6, T, V]                           the student's logits of the first answers
"""
import json
import math
import platform
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

GOLDEN = Path(__file__).parent / "golden"
MARGIN = 2e-3                                       # least gap between the best and second logit of a greedy step
PROMPTS = (3, 11, 7, 1)                             # lengths
V = 211

CASES = {
    "gqa7-tied": dict(
        shape=dict(hidden_size=56, intermediate_size=96, num_attention_heads=7, num_key_value_heads=1,
                   rope_theta=1e6, tie_word_embeddings=True),
        dtype=torch.bfloat16, shards=None, transformers4=False),
    "gqa6-untied-sharded": dict(
        shape=dict(hidden_size=72, intermediate_size=80, num_attention_heads=12, num_key_value_heads=2,
                   rope_theta=1e6, tie_word_embeddings=False),
        dtype=torch.float16, shards="50KB", transformers4=True),
    "mha-head-dim": dict(
        shape=dict(hidden_size=64, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=12,
                   rope_theta=1e4, rms_norm_eps=1e-5, tie_word_embeddings=False),
        dtype=torch.float32, shards=None, transformers4=False),
}

STEPS, WARMUP, LR, DECAY, NORM = 6, 2, 4e-3, 0.1, 1.0   # after WARMUP a cosine to LR / 10; the gradient's norm is cut to NORM
BETAS, EPS = (0.9, 0.95), 1e-8
RUNS = {"sft": dict(student="gqa7-tied", teacher=None, kd_ratio=0.0, loss="sft"),
        "forward": dict(student="gqa7-tied", teacher="mha-head-dim", kd_ratio=0.3, loss="forward_kl"),
        "reverse": dict(student="gqa6-untied-sharded", teacher="mha-head-dim", kd_ratio=1.0, loss="reverse_kl")}

ROWS, NEW, RATE = 200, 8, 1e-4                      # of the V rows those with a token; tokens of an answer at most; no schedule
GRPO = {"grpo": dict(clip=0.2, beta=0.1, epochs=2),                                     # paper eq. (5) to (7)
        "dapo": dict(clip=0.2, clip_high=0.28, norm="token", mask_truncated=True, drop_flat=True, epochs=2),
        "dr-grpo": dict(clip=0.2, scale="none", norm="constant", beta=0.04, temperature=0.7),
        "gspo": dict(ratio="sequence", clip=0.1, beta=0.02, epochs=2)}


def random_model(shape: dict, seed: int) -> Qwen2ForCausalLM:
    """A model no part of which is at its initial value.  Also what the live tests draw from."""
    shape = dict(shape)
    rope = {"rope_theta": shape.pop("rope_theta"), "rope_type": "default"}
    config = Qwen2Config(**{"vocab_size": V, "num_hidden_layers": 2, "max_position_embeddings": 256, **shape},
                         rope_parameters=rope, pad_token_id=0, eos_token_id=None, bos_token_id=None)
    model = Qwen2ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.5 * noise)
            elif "embed" in name or "lm_head" in name:
                weight.copy_(0.4 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    return model


def left_padded(prompts: list[list[int]]) -> dict:
    width = max(map(len, prompts))
    return {"input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])}


@torch.no_grad()
def greedy(model, prompts: list[list[int]], steps: int = 64) -> tuple[torch.Tensor, float]:
    """New tokens [B, steps], and the least margin by which one was chosen."""
    inputs = left_padded(prompts)
    out = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                         return_dict_in_generate=True, output_logits=True)
    best = torch.stack(out.logits).topk(2).values                       # [steps, B, 2]
    return out.sequences[:, inputs["input_ids"].shape[1]:], float((best[..., 0] - best[..., 1]).min())


def as_transformers4_wrote_it(config: dict) -> dict:
    """The config.json of Qwen2.5-0.5B, with this model's sizes."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    return {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 24,
            "model_type": "qwen2", "rope_theta": config["rope_parameters"]["rope_theta"], "sliding_window": 32768,
            "torch_dtype": config["dtype"], "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
            "use_sliding_window": False, **{key: config[key] for key in same}}


@torch.no_grad()
def make(name: str, shape: dict, dtype: torch.dtype, shards: str | None, transformers4: bool) -> dict:
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed + 1000)
        ids = torch.randint(1, V, (3, 12), generator=generator)
        prompts = [torch.randint(1, V, (n,), generator=generator).tolist() for n in PROMPTS]
        model = random_model(shape, seed).to(dtype).float()             # what the file will hold, exactly
        tokens, margin = greedy(model, prompts)
        if margin > MARGIN and all(len(set(row[32:].tolist())) > 8 for row in tokens):
            break
    else:
        raise SystemExit(f"{name}: no seed below 100 has margins above {MARGIN}")
    lengths = torch.tensor([12, 5, 9])
    mask = torch.arange(12) < lengths[:, None]
    padded = ids * mask
    folder = GOLDEN / name
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if transformers4:
        config = as_transformers4_wrote_it(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again, _ = greedy(model, prompts)
    assert torch.equal(again, tokens), name
    width = max(PROMPTS)
    save_file({"ids": ids, "logits": model(ids).logits, "padded": padded, "lengths": lengths,
               "padded_logits": model(padded, attention_mask=mask.long()).logits,
               "prompts": torch.tensor([p + [0] * (width - len(p)) for p in prompts]),
               "prompt_lengths": torch.tensor(PROMPTS), "greedy": tokens.contiguous()}, GOLDEN / f"{name}.safetensors")
    return {"seed": seed, "least_margin": margin, "dtype_on_disk": str(dtype)}


def distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities [..., V] -> [...]"""
    return (p.exp() * (p - q)).sum(-1)


def adamw(weight: torch.Tensor, m: torch.Tensor, v: torch.Tensor, lr: float, decay: float, t: int):
    """Loshchilov and Hutter (arXiv:1711.05101), Algorithm 2, in place; t counts from 1."""
    m.mul_(BETAS[0]).add_((1 - BETAS[0]) * weight.grad)
    v.mul_(BETAS[1]).add_((1 - BETAS[1]) * weight.grad ** 2)
    step = m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    weight.sub_(lr * step + lr * decay * weight)


def zero_moments(model) -> dict:
    return {weight: (torch.zeros_like(weight), torch.zeros_like(weight)) for weight in model.parameters()}


def update(moments: dict, lr: float, t: int) -> torch.Tensor:
    """Clips the gradient's norm to NORM and takes AdamW's step t. Returns the norm before clipping."""
    norm = torch.stack([weight.grad.square().sum() for weight in moments]).sum().sqrt()
    for weight, (m, v) in moments.items():
        weight.grad *= min(1, NORM / norm)
        adamw(weight, m, v, lr, DECAY if weight.dim() == 2 else 0.0, t)
    return norm


def train(name: str, student: str, teacher: str | None, kd_ratio: float, loss: str):
    generator = torch.Generator().manual_seed(7)
    prompt_lengths, lengths = torch.tensor([3, 1, 6, 2, 4, 5]), torch.tensor([9, 12, 7, 4, 11, 6])
    T = int(lengths.max())
    ids = torch.randint(1, V, (6, T), generator=generator)
    at = torch.arange(T)
    mask, scored = at < lengths[:, None], (at >= prompt_lengths[:, None]) & (at < lengths[:, None])     # [6, T]
    ids, n = ids * mask, int(scored.sum())
    load = lambda folder: Qwen2ForCausalLM.from_pretrained(GOLDEN / folder, dtype=torch.float32)
    logits_of = lambda model: model(ids, attention_mask=mask.long()).logits                             # [6, T, V]
    model, found = load(student), {"ce": [], "kd": [], "norm": []}
    with torch.no_grad():
        before, p = logits_of(model), teacher and logits_of(load(teacher)).log_softmax(-1)
    moments = zero_moments(model)
    for t in range(1, STEPS + 1):
        logq = logits_of(model).log_softmax(-1)
        ce = -logq[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][scored[:, 1:]].sum() / n                # position t - 1 scores t
        kd = torch.zeros(())
        if teacher:
            kd = (distance(p, logq) if loss == "forward_kl" else distance(logq, p))[:, :-1][scored[:, 1:]].sum() / n
        model.zero_grad()
        ((1 - kd_ratio) * ce + kd_ratio * kd).backward()
        with torch.no_grad():
            done = max(0, t - 1 - WARMUP) / (STEPS - WARMUP)
            norm = update(moments, LR * min(1, t / WARMUP) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2), t)
        for key, value in ("ce", ce), ("kd", kd), ("norm", norm):
            found[key].append(value.detach())
    with torch.no_grad():
        save_file({"ids": ids, "prompt_lengths": prompt_lengths, "lengths": lengths, "before": before, "after": logits_of(model),
                   **{key: torch.stack(values) for key, values in found.items()}}, GOLDEN / "training" / f"{name}.safetensors")


def advantages(rewards: torch.Tensor, scale: str) -> torch.Tensor:
    """Paper eq. (5) for one group: 0 for what was not judged, and for all if all judged rewards are equal.  [3] -> [3]"""
    judged = rewards[~rewards.isnan()]
    if len(set(judged.tolist())) < 2:
        return torch.zeros(3)
    return ((rewards - judged.mean()) / (judged.std() + 1e-4 if scale == "std" else 1)).nan_to_num(0.0)


def answers(generator) -> dict[str, torch.Tensor]:
    """Two prompts, three answers to each."""
    draw = lambda low, high, *size: torch.randint(low, high, size, generator=generator)
    starts = draw(1, 6, 2).repeat_interleave(3)                                                         # [6]
    lengths, at = starts + draw(1, NEW + 1, 6), torch.arange(5 + NEW)
    ids = torch.where(at < starts[:, None], draw(1, ROWS, 2, 5 + NEW).repeat_interleave(3, 0), draw(1, ROWS, 6, 5 + NEW))
    return {"ids": ids * (at < lengths[:, None]), "prompt_lengths": starts, "lengths": lengths, "cut": draw(0, 3, 6) == 0,
            "rewards": draw(0, 4, 6).float()}


def masked(given: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [6, T], its mask, and where the log-probabilities of ids[:, 1:] are an answer's [6, T - 1]"""
    at = torch.arange(given["ids"].shape[1])
    mask = at < given["lengths"][:, None]
    return given["ids"], mask.long(), (mask & (at >= given["prompt_lengths"][:, None]))[:, 1:]


def reinforce(name: str, clip: float, clip_high: float | None = None, beta: float = 0.0, scale: str = "std",
              norm: str = "sequence", ratio: str = "token", epochs: int = 1, temperature: float = 1.0,
              mask_truncated: bool = False, drop_flat: bool = False):
    generator, found, t = torch.Generator().manual_seed(1), [], 0
    load = lambda: Qwen2ForCausalLM.from_pretrained(GOLDEN / "gqa7-tied", dtype=torch.float32)
    policy, reference = load(), load()
    moments = zero_moments(policy)
    for step in range(3):
        given = answers(generator)
        if step == 1:
            given["rewards"] = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, math.nan])
        ids, mask, scored = masked(given)

        def log_probs(model):
            logits = model(ids, attention_mask=mask).logits[:, :-1, :ROWS] / temperature
            return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]                          # [6, T - 1]

        with torch.no_grad():
            old, ref = log_probs(policy), log_probs(reference)
        A = torch.cat([advantages(rewards, scale) for rewards in given["rewards"].view(2, 3)])          # [6]
        counted = [i for i in range(6) if not (mask_truncated and given["cut"][i])
                   and not (drop_flat and (A.view(2, 3)[i // 3] == 0).all())]
        tokens = int(scored[counted].sum())
        for _ in range(epochs):
            logp, loss, kl, clipped, t = log_probs(policy), 0.0, 0.0, 0, t + 1
            for i in counted:
                now, then, there = (x[i][scored[i]] for x in (logp, old, ref))                          # [n]
                r = (now - then).exp() if ratio == "token" else (now - then).mean().exp().expand(len(now))
                bounded = r.clamp(1 - clip, 1 + (clip_high or clip))
                k3 = (there - now).exp() - (there - now) - 1
                share = {"sequence": len(counted) * len(now), "token": tokens, "constant": len(counted) * NEW}[norm]
                loss = loss - (torch.minimum(r * A[i], bounded * A[i]) - beta * k3).sum() / share
                kl, clipped = kl + k3.detach().sum(), clipped + int((A[i] * (r - bounded) > 0).sum())
            policy.zero_grad()
            loss.backward()
            with torch.no_grad():
                size = update(moments, RATE, t)
        found.append({**given, "old": old, "norm": size, "kl": kl / tokens, "clipped": torch.tensor(clipped / tokens)})
    ids, mask, _ = masked(found[0])
    with torch.no_grad():
        logits = policy(ids, attention_mask=mask).logits
    save_file({key: torch.stack([line[key] for line in found]) for key in found[0]} | {"after": logits},
              GOLDEN / "training" / f"{name}.safetensors")


def minillm(mix: float = 0.2, clip: float = 0.2, lm_coef: float = 0.5):
    """MiniLLM (arXiv:2306.08543), eq. (3), (6), (7): each token's exact step, and its R_{t+1} by a clipped ratio."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (Qwen2ForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
                        for name in ("gqa7-tied", "mha-head-dim"))
    moments, found, sets, t = zero_moments(student), {"ce": [], "kd": [], "norm": []}, [answers(generator) for _ in range(2)], 0
    text = torch.randint(1, V, (6, 9), generator=generator)
    for given in sets:
        ids, mask, scored = masked(given)
        n, picked = int(scored.sum()), lambda logs: logs.gather(-1, ids[:, 1:, None])[..., 0]           # [6, T - 1]
        logs = lambda model: model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)             # [6, T - 1, V]
        with torch.no_grad():
            p = logs(teacher)
            old, there = picked(logs(student)), picked(p)
        to_go = []                                                                                      # eq. (6), by T - t
        for i in range(6):
            r = (there - old)[i][scored[i]].clamp(-50, 50).tolist()
            to_go += [sum(r[j + 1:]) / max(1, len(r) - j - 1) for j in range(len(r))]
        A = torch.tensor(to_go)
        A = (A - A.mean()) / (A.var(correction=0) + 1e-8).sqrt()
        A = A * (old.exp() / ((1 - mix) * old.exp() + mix * there.exp()))[scored]                       # w_t of eq. (7)
        for _ in range(2):
            logq, t = logs(student), t + 1
            r = (picked(logq) - old).exp()[scored]
            policy = -torch.minimum(r * A, r.clamp(1 - clip, 1 + clip) * A).sum() / n
            kd = distance(logq, p)[scored].sum() / n
            lm = -student(text).logits[:, :-1].log_softmax(-1).gather(-1, text[:, 1:, None]).mean()
            student.zero_grad()
            (policy + kd + lm_coef * lm).backward()
            with torch.no_grad():
                norm = update(moments, RATE, t)
            for key, value in ("ce", -picked(logq)[scored].mean()), ("kd", kd), ("norm", norm):
                found[key].append(value.detach())
    ids, mask, _ = masked(sets[0])
    with torch.no_grad():
        save_file({key: torch.stack([given[key] for given in sets]) for key in ("ids", "prompt_lengths", "lengths")}
                  | {key: torch.stack(values) for key, values in found.items()}
                  | {"text": text, "after": student(ids, attention_mask=mask).logits}, GOLDEN / "training" / "minillm.safetensors")


def main():
    torch.set_num_threads(1)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    (GOLDEN / "training").mkdir(parents=True)
    cases = {name: make(name, **case) for name, case in CASES.items()}
    for name, run in RUNS.items():
        train(name, **run)
    for name, run in GRPO.items():
        reinforce(name, **run)
    minillm()
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__,
                 "python": platform.python_version(), "cases": cases}
    (GOLDEN / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    print(json.dumps(made_with, indent=2), f"{size:,} bytes", sep="\n")


if __name__ == "__main__":
    main()
