"""All of minikd in its plainest form: read this first.

The decoder, sampling, distillation, MiniLLM, GRPO, GPTQ and ROUGE-L, on nothing but torch's tensor operations and a
dictionary of weights. The other files compute the same: fast, in little memory, on files as people have them, and with errors
that say what to mend. tests/test_plain.py holds all of it to its counterparts there, which the docstrings name in parentheses.

    B sequences   T tokens   V vocabulary   D hidden size   H query heads   K key/value heads   E size of one head
    N scored tokens   n tokens of one answer   P prompts   G answers to each   O, I outputs and inputs of a weight, g inputs of
    a group   logq, logp log-probabilities of the student q and the teacher p; in GRPO logp is the policy's

"Paper" is Knowledge Distillation for Large Language Models (arXiv:2603.13765); MiniLLM is 2306.08543, GPTQ 2210.17323.

A step of each:
    KD        requires_grad_() on the student's weights; logits() of both models, the teacher's under torch.no_grad();
              kd_loss().backward(); an optimizer's step
    MiniLLM   the same along answers that the student gave by generate(), with minillm_loss
    GRPO      G answers to each prompt; their rewards [P, G]; group_advantages(); the mean of grpo_loss() over the answers
"""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# ---- the model


def load(folder) -> tuple[dict[str, Tensor], dict]:
    """A Hugging Face folder -> its weights by name, and config.json (checkpoint.load_model)."""
    weights = {}
    for shard in Path(folder).glob("*.safetensors"):
        weights |= load_file(shard)
    config = json.loads((Path(folder) / "config.json").read_text())
    config |= config.get("rope_parameters") or {}                                           # where transformers 5 puts rope_theta
    return {name: weight.float() for name, weight in weights.items()}, config


def logits(weights: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """The Qwen2 decoder: of each token of ids [B, T], what comes next, [B, T, V]; padding only on the right (model.Qwen2)."""
    eps, embedding = config["rms_norm_eps"], weights["model.embed_tokens.weight"]           # [V, D]
    x = embedding[ids]                                                                      # [B, T, D]
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        w = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        x = x + attention(w, config, rms_norm(x, w["input_layernorm.weight"], eps))
        x = x + mlp(w, rms_norm(x, w["post_attention_layernorm.weight"], eps))
    head = weights.get("lm_head.weight", embedding)                                         # tied: the embedding's matrix
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T                          # [B, T, V]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times a learned weight.  [..., D] -> [..., D]  (model.RMSNorm)"""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def attention(w: dict[str, Tensor], config: dict, x: Tensor) -> Tensor:
    """Each token looks at itself and the tokens before it; H / K query heads share a key and a value. Only q, k and v have a
    bias.  [B, T, D] -> [B, T, D]  (model.Attention)"""
    (B, T, _), H, K = x.shape, config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (x @ w[f"self_attn.{name}_proj.weight"].T + w[f"self_attn.{name}_proj.bias"] for name in "qkv")
    q, k, v = (y.view(B, T, heads, -1).transpose(1, 2) for y, heads in ((q, H), (k, K), (v, K)))        # [B, heads, T, E]
    q, k = rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"])
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)           # [B, H, T, E]
    scores = q @ k.mT / q.shape[-1] ** 0.5                                                  # [B, H, T, T]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)                                      # [T, T], True above the diagonal
    y = scores.masked_fill(later, -torch.inf).softmax(-1) @ v                               # [B, H, T, E]
    return y.transpose(1, 2).reshape(B, T, -1) @ w["self_attn.o_proj.weight"].T             # [B, T, D]


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE: the pair (x_i, x_{i+E/2}) of position t turns by the angle t theta^(-2i/E), so that a product of a query and a key
    depends on how far apart they are.  [B, heads, T, E] -> the same  (model.rotate)"""
    T, E = x.shape[-2:]
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(0, E, 2) / E)                # [T, E/2]
    a, b = x.chunk(2, dim=-1)                                                               # [B, heads, T, E/2] each
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def mlp(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """SwiGLU: down(silu(gate) up), silu(z) = z sigmoid(z).  [B, T, D] -> [B, T, D]  (model.MLP)"""
    gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T


def generate(weights: dict[str, Tensor], config: dict, prompt: list[int], max_new_tokens: int, eos_ids=(),
             temperature: float = 0.0, generator: torch.Generator | None = None) -> list[int]:
    """An answer, token by token; each time the likeliest token if the temperature is 0 (generate.generate, which keeps the keys
    and values of all tokens, so that a step need not read everything again)."""
    answer = []
    while len(answer) < max_new_tokens and (not answer or answer[-1] not in eos_ids):
        last = logits(weights, config, torch.tensor([prompt + answer]))[0, -1]              # [V]
        if temperature == 0:
            answer.append(int(last.argmax()))
        else:
            answer.append(int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)))
    return answer


# ---- distillation


def log_probs(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token of ids [B, T] that mask [B, T] marks, the answers' tokens, the log-probabilities of the whole vocabulary
    [N, V], and its id [N]. The logits [B, T, V] at t-1 score the token at t (head.scored_positions makes this shift)."""
    scored = mask[:, 1:]
    return logits[:, :-1][scored].log_softmax(-1), ids[:, 1:][scored]


def cross_entropy(logq: Tensor, targets: Tensor) -> Tensor:
    """-log q of the right token.  [N, V], [N] -> [N] nats"""
    return -logq[torch.arange(len(targets)), targets]


def forward_kl(logq: Tensor, logp: Tensor) -> Tensor:
    """KL(p || q), paper eq. (4): large where the teacher would say what the student would not.  [N, V] twice -> [N] nats
    (losses.forward_kl)"""
    return (logp.exp() * (logp - logq)).sum(-1)


def reverse_kl(logq: Tensor, logp: Tensor) -> Tensor:
    """KL(q || p): large where the student would say what the teacher would not.  [N, V] twice -> [N] nats
    (losses.reverse_kl)"""
    return (logq.exp() * (logq - logp)).sum(-1)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, mask: Tensor, kd_ratio: float = 0.5) -> Tensor:
    """(1 - r) CE + r KL(p || q), paper eq. (3), the mean over the answers' tokens; with r = 0 this is fine-tuning (SFT)
    (head.head_loss, which never holds all logits)."""
    logq, targets = log_probs(student_logits, ids, mask)
    logp, _ = log_probs(teacher_logits, ids, mask)
    return ((1 - kd_ratio) * cross_entropy(logq, targets) + kd_ratio * forward_kl(logq, logp)).mean()


def minillm_loss(logq: Tensor, logp: Tensor, tokens: Tensor) -> Tensor:
    """A loss whose gradient, on average over answers that the student samples, is that of KL(q || p) over whole answers,
    MiniLLM eq. (2), (3). (Its value is not that KL.)  logq, logp [n, V] along one answer, whose tokens are [n] -> a number

    Token t counts in two ways: by the divergence at t itself, which is computed exactly, and by what comes after it. If that was
    likelier for the teacher than for the student, the token becomes more probable. This is the bare gradient: training also
    divides R by its number of terms, whitens and clips it, and samples from a mixture with the teacher (minillm.collect).
    """
    at = torch.arange(len(tokens))
    reward = (logp - logq)[at, tokens].detach()                                             # [n] r_t = log p - log q
    to_go = reward.flip(0).cumsum(0).flip(0) - reward                                       # [n] R_{t+1} = Σ_{i>t} r_i
    return reverse_kl(logq, logp).sum() - (logq[at, tokens] * to_go).sum()


# ---- GRPO


def group_advantages(rewards: Tensor) -> Tensor:
    """Paper eq. (5): how much better an answer is than the others to the same prompt.  [P, G] -> [P, G]
    (grpo.group_advantages)"""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: float, clip: float = 0.2,
              beta: float = 0.04) -> Tensor:
    """Paper eq. (6), (7), of one answer; a step's loss is the mean over its answers (grpo.policy_loss, token_weights).

    logp, old_logp, ref_logp  log-probabilities of its tokens [n] under the policy, under the one that sampled them, and under
                              the one at the start; the last two are constants
    """
    ratio = (logp - old_logp).exp()                                                         # 1 until the policy has moved
    # The minimum has no gradient once the ratio is past the clip on the side that the advantage asks for.
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    d = ref_logp - logp
    return (beta * (d.exp() - d - 1) - gain).mean()                                         # k3, an estimate of KL(π || π_ref)


# ---- four bits


def gptq(weight: Tensor, hessian: Tensor, group_size: int, damp: float = 0.01) -> tuple[Tensor, Tensor]:
    """Codes from 0 to 15 [O, I] and scales [O, I/g]: weight ~ scale (code - 8)  (gptq.quantize_matrix with
    act_order=False; by default it takes the inputs in another order)

    hessian  [I, I], twice the mean of x x^T over inputs x that the layer really gets
    The columns are rounded one after the other; those not rounded yet then move so that the outputs change least. (A group
    of zeros gives NaN here; quant.find_grid sets its scale to 1.)
    """
    W, (O, I) = weight.clone(), weight.shape
    H = hessian + damp * hessian.diagonal().mean() * torch.eye(I)
    codes, scales = torch.empty(O, I), torch.empty(O, I // group_size)
    for j in range(I):
        group = j // group_size
        if j % group_size == 0:             # 15 steps from -max to max: code 8 is 0, and max itself is cut to code 15, 7 steps
            scales[:, group] = (W[:, j:j + group_size].abs().amax(1) * 2 / 15).half().float()          # stored in float16
        codes[:, j] = ((W[:, j] / scales[:, group]).round() + 8).clamp(0, 15)               # [O] paper eq. (8)
        error = W[:, j] - scales[:, group] * (codes[:, j] - 8)                              # [O] paper eq. (9)
        inverse = torch.linalg.inv(H[j:, j:])                                               # [I-j, I-j]
        W[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]     # GPTQ eq. (2): column j becomes its rounding, later ones move
    return codes, scales


# ---- ROUGE-L


def rouge_l(prediction: list[str], reference: list[str]) -> float:
    """F1 of the longest sequence of words that both have in this order; not both are empty (rouge.rouge_l)."""
    longest = [[0] * (len(reference) + 1) for _ in range(len(prediction) + 1)]              # [i][j]: of the first i and j words
    for i, word in enumerate(prediction):
        for j, other in enumerate(reference):
            longest[i + 1][j + 1] = longest[i][j] + 1 if word == other else max(longest[i][j + 1], longest[i + 1][j])
    return 2 * longest[-1][-1] / (len(prediction) + len(reference))                         # F1
