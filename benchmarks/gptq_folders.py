"""Claim: minikd reads 4-bit folders that GPTQModel wrote, shuffled groups included, as GPTQModel itself does.

    PYTHON -m benchmarks.gptq_folders 2>/dev/null | tail -11    # PYTHON: with gptqmodel and optimum; 1 minute, one core

GPTQMODEL_CPU_WORKERS=4 is set here: without it GPTQModel does not quantise on two cores. GPTQModel quantises and saves a
random Qwen2 (hidden 256, 2 layers, bfloat16; some rows all positive, so that asymmetric zeros of 0 occur). The logits of
4 x 48 random ids are then computed from the folder: in float32 by minikd, and by transformers with weights that `dense` here
dequantises in numpy; in bfloat16 by minikd, by GPTQModel and by transformers' own loader (nan: their kernel refuses the group
size). Columns: the share of inputs that are not in the order of groups; the greatest difference and |ours - theirs| / |theirs|;
and how much our bfloat16 logits differ from our float32 ones.
"""
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine, make_parser, table
from minikd.checkpoint import load_model, save_model
from minikd.config import Qwen2Config
from minikd.model import Qwen2
from minikd.toy import make_tokenizer

CASES = {"sym, desc_act, g32": dict(desc_act=True, act_group_aware=False, group_size=32),
         "sym, desc_act, g64": dict(desc_act=True, act_group_aware=False, group_size=64),
         "sym, GAR (its default), g32": dict(group_size=32),
         "sym, GAR (its default), g128": dict(group_size=128),
         "sym, row": dict(group_size=-1, act_group_aware=False),
         "sym, static groups, g32": dict(desc_act=True, act_group_aware=False, static_groups=True, group_size=32),
         "asym v2, desc_act, g32": dict(desc_act=True, act_group_aware=False, group_size=32, sym=False,
                                        format="gptq_v2"),
         "asym v2, GAR, g32": dict(group_size=32, sym=False, format="gptq_v2"),
         "asym v1, GAR, g32": dict(group_size=32, sym=False)}


def make_folder(folder: Path):
    """A random model folder; no weight is at its initial value, so that a tensor that a loader skips would show."""
    make_tokenizer(folder)
    model = Qwen2(Qwen2Config(vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                              tie_word_embeddings=True, rope_theta=1e6))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            size = 0.5 if name.endswith("bias") else 0.4 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5
            weight.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else size * noise)
            if name.endswith("up_proj.weight"):
                weight[::5].abs_()
    save_model(model, folder, dtype=torch.bfloat16)


def dense(folder: Path) -> dict:
    """The folder's tensors in float32, each packed weight dequantised [O, I]. In format v1, GPTQModel stores words of zeros
    minus 0x11111111."""
    from safetensors.torch import load_file
    tensors = load_file(folder / "model.safetensors")
    less = 0 if json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "gptq_v2" else 1
    nibbles = 4 * np.arange(8, dtype=np.uint32)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        words, zeros, scales, g_idx = (tensors.pop(f"{name}.{part}").numpy()
                                       for part in ("qweight", "qzeros", "scales", "g_idx"))
        codes = (words.view(np.uint32)[:, None] >> nibbles[:, None] & 15).reshape(-1, words.shape[1])       # [I, O]
        zeros = zeros.view(np.uint32) + np.uint32(0x11111111 * less)
        zeros = (zeros[..., None] >> nibbles & 15).reshape(len(zeros), -1)                                  # [I/g, O]
        weight = scales.astype(np.float32)[g_idx] * (codes.astype(np.float32) - zeros.astype(np.float32)[g_idx])
        tensors[name + ".weight"] = torch.from_numpy(weight.T.copy())
    return {key: value.float() for key, value in tensors.items()}


@torch.no_grad()
def measure(source: Path, folder: Path, options: dict) -> dict:
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoConfig, AutoModelForCausalLM
    rows = torch.randint(400, (16, 256), generator=torch.Generator().manual_seed(0)).tolist()
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, damp_percent=0.01, **options), device="cpu")
    model.quantize([dict(input_ids=row, attention_mask=[1] * len(row)) for row in rows], batch_size=4)
    model.save(str(folder))
    ids = torch.randint(1024, (4, 48), generator=torch.Generator().manual_seed(1))
    ours = {dtype: load_model(folder, dtype=dtype)(ids).float() for dtype in (torch.float32, torch.bfloat16)}
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing = model.load_state_dict(dense(folder), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    found = {"dense": (model(ids).logits, torch.float32)}
    loaders = {"gptqmodel": lambda: GPTQModel.load(str(folder), device="cpu"),
               "transformers": lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)}
    for name, loader in loaders.items():
        try:
            found[name] = loader()(input_ids=ids).logits.float(), torch.bfloat16
        except RuntimeError:
            found[name] = torch.tensor(torch.nan), torch.bfloat16
    relative = lambda a, b: float((a - b).norm() / b.norm())
    layers = [layer for layer in load_model(folder).modules() if hasattr(layer, "g_idx")]
    moved = sum(int((layer.g_idx != torch.arange(layer.inputs) // layer.group_size).sum()) for layer in layers)
    return {name: relative(ours[dtype], theirs) for name, (theirs, dtype) in found.items()} | {
        "max": float((ours[torch.float32] - found["dense"][0]).abs().max()),
        "rounding": relative(ours[torch.bfloat16], ours[torch.float32]), "moved": moved / sum(layer.inputs for layer in layers)}


def main():
    make_parser(__doc__).parse_args()
    os.environ["GPTQMODEL_CPU_WORKERS"] = "4"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "dense")
        for i, (name, options) in enumerate(CASES.items()):
            row = measure(Path(folder) / "dense", Path(folder) / str(i), options)
            rows.append([name, f"{row['moved']:.0%}", f"{row['max']:.1e}", f"{row['dense']:.1e}", f"{row['gptqmodel']:.1%}",
                         f"{row['transformers']:.1%}", f"{row['rounding']:.1%}"])
    table(["", "moved", "numpy, max", "numpy", "GPTQModel", "transformers", "ours bfloat16/float32"], rows)
    print(machine("torch", "transformers", "gptqmodel", "optimum"))


if __name__ == "__main__":
    main()
