"""Claim: minikd's logits equal transformers' to 1e-4 in float32, and greedy decoding gives the same 64 tokens.

    python -m benchmarks.logits                 # about a minute on two cores; needs pip install -e '.[reference]'

Random Qwen2 models, no weight at its initial value, saved by transformers (in shards where the table says so) and loaded by
minikd. Logits are compared on a batch [4, 64] and on right-padded rows of unequal lengths; greedy tokens on unequal prompts,
which transformers pads on the left and minikd on the right. `margin` is the smallest gap between the best and the second
logit over all greedy steps: if it were below the difference, rounding could change a token.
"""
import os
import tempfile

import torch

from benchmarks.measure import QUIET, machine, make_parser, table

os.environ |= QUIET
from transformers import Qwen2Config, Qwen2ForCausalLM              # noqa: E402  (after it was told to be quiet)

from minikd.checkpoint import load_model                            # noqa: E402
from minikd.generate import generate                                # noqa: E402

V, STEPS, PROMPTS = 5000, 64, (3, 11, 28, 1)
CASES = {                                           # query heads, kv heads, hidden size, tied head, shards
    "GQA 7:1 tied": (14, 2, 896, True, None), "GQA 7:1 untied, sharded": (14, 2, 896, False, "20MB"),
    "GQA 6:1 tied, sharded": (12, 2, 768, True, "20MB"), "GQA 6:1 untied": (12, 2, 768, False, None),
    "1:1 tied": (8, 8, 512, True, None), "1:1 untied, sharded": (8, 8, 512, False, "20MB"),
}


def random_model(heads, kv_heads, hidden, tied, seed) -> Qwen2ForCausalLM:
    config = Qwen2Config(vocab_size=V, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
                         max_position_embeddings=512, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
                         pad_token_id=0, eos_token_id=None, bos_token_id=None)
    model, generator = Qwen2ForCausalLM(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            head = "embed" in name or "lm_head" in name
            if weight.dim() == 1:
                weight.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                weight.copy_((3 if head else 1.5) * noise / hidden ** 0.5)      # logits spread as a trained model's
    return model


def left_padded(prompts) -> dict:
    width = max(map(len, prompts))
    return {"input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])}


@torch.no_grad()
def compare(case, seed) -> list:
    theirs, generator = random_model(*case[:4], seed), torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder, **{"max_shard_size": case[4]} if case[4] else {})
        shards = sum(name.endswith(".safetensors") for name in os.listdir(folder))
        ours = load_model(folder)
    ids = torch.randint(1, V, (4, 64), generator=generator)
    lengths = torch.tensor([64, 5, 33, 17])
    inside = torch.arange(64) < lengths[:, None]
    full = (ours(ids) - theirs(ids).logits).abs().max()
    padded = (ours(ids * inside) - theirs(ids * inside, attention_mask=inside.long()).logits)[inside].abs().max()

    prompts = [torch.randint(1, V, (n,), generator=generator).tolist() for n in PROMPTS]
    out = theirs.generate(**left_padded(prompts), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
                          return_dict_in_generate=True, output_logits=True)
    best = torch.stack(out.logits).topk(2).values                               # [64, 4, 2]
    expected, answers = out.sequences[:, max(PROMPTS):].tolist(), generate(ours, prompts, max_new_tokens=STEPS)
    same = sum(a == b for answer, row in zip(answers, expected) for a, b in zip(answer, row))
    return [shards, f"{full:.1e}", f"{padded:.1e}", f"{theirs(ids).logits.abs().max():.1f}",
            f"{same}/{STEPS * len(PROMPTS)}", f"{(best[..., 0] - best[..., 1]).min():.1e}"]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    table(["", "files", "max |difference|", "unequal rows", "max |logit|", "greedy tokens equal", "margin"],
          [[name, *compare(case, args.seed)] for name, case in CASES.items()])
    print(machine("torch", "transformers"))


if __name__ == "__main__":
    main()
