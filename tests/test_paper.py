"""Every command of docs/paper.md and of the README that names a model runs to its end, in the order in which they stand, against
a simulated hub on this machine: tiny models under Qwen's names, a few records under each dataset's with its published fields."""
import gzip
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from conftest import files_in, tiny
from fake_hub import served, server
from minikd.checkpoint import read_quantization

ROOT = Path(__file__).parents[1]
SHORT = {       # what makes a run short; the last of two equal flags counts
    "train_kd": "--steps 2 --batch-size 2 --validation 3 --eval-every 2 --eval-examples 2 --max-new-tokens 3 --limit 12 "
                "--max-length 700 --max-prompt-length 500 --warmup 0 --grad-accum 1 --rollouts 4",
    "train_grpo": "--steps 1 --prompts 2 --group-size 2 --max-new-tokens 3 --eval-examples 2 --limit 8 --max-prompt-length 2000",
    "quantize": "--samples 4 --length 200 --eval-examples 2 --max-new-tokens 3",
    "eval_rouge": "--limit 2 --max-new-tokens 3 --max-length 700 --max-prompt-length 500"}
DOLLY = [{"instruction": f"What is {i} and {i}?", "context": "", "response": f"{2 * i}", "category": "qa"} for i in range(12)]
SPANISH = [{"instruction": f"¿Cuánto es {i} y {i}?", "context": "", "response": f"{2 * i}", "category": "qa", "id": i,
            "instruction_original_en": "", "context_original_en": "", "response_original_en": ""} for i in range(12)]
ALPACA = [{"prompt": "Below", "instruction": f"Say {i}.", "input": "", "output": [str(i)]} for i in range(12)]
BUGNET = [{"problem_id": f"p{i}", "language": "Python", "original_status": "Wrong Answer", "fail": f"print({i})",
           "pass": f"print({i + 1})", "change": "replace", "i1": 0, "i2": 1, "j1": 0, "j2": 1, "error": ["WA", "0", 0][i % 3],
           "stderr": None, "stdout": ["1", 1, 0.5, None][i % 4]} for i in range(12)]
PYTORRENT = [{"repo": "r", "path": "p.py", "language": "python", "func_name": f"f{i}", "docstring": f"Give {i}.", "summary": "",
              "original_string": f'def f{i}():\n    """Give {i}."""\n    return {i}', "code_tokens": [], "partition": "train"}
             for i in range(12)]
CODEFORCES = [{"id": f"{i}/A", "time_limit": 2.0, "memory_limit": 256.0, "title": f"Add {i}", "description": f"Add {i}.",
               "input_format": "A number.", "output_format": "Its sum.", "examples": [{"input": "1\n", "output": f"{i + 1}\n"}],
               "note": None, "editorial": None, "prompt": "Add", "generation": "<think>\n</think>\nx", "finish_reason": "stop",
               "messages": [{"role": "user", "content": f"Add {i}"},
                            {"role": "assistant", "content": "<think>\n</think>\nx"}]} for i in range(12)]
NUMINA = [{"problem": f"What is {i} + {i}?", "solution": f"It is $\\boxed{{{2 * i}}}$.",
           "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]} for i in range(12)]
GSM8K = [{"question": f"What is {i} + {i}?", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i}"} for i in range(12)]


def commands() -> list[tuple[str, list[str]]]:
    """(script, its flags) of every command in a block of the two pages that names a model."""
    found = []
    for page in "docs/paper.md", "README.md":
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                python, script, *flags = shlex.split(line, comments=True) + ["", ""]
                if python == "python" and {"--student", "--model"} & set(flags):
                    found.append((script.removesuffix(".py"), [flag for flag in flags if flag]))
    return found


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(records: list[dict]) -> bytes:
    import pyarrow.parquet
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def test_every_command_runs_as_it_stands(served, tokenizer, tmp_path, shell):
    pytest.importorskip("pyarrow")                              # some of the datasets are parquet files
    model = files_in(tiny(0, tokenizer, tmp_path / "tiny", hidden_size=128, intermediate_size=128))
    for name in "0.5B", "0.5B-Instruct", "1.5B-Instruct", "3B-Instruct":
        served.repositories["models", f"Qwen/Qwen2.5-{name}"] = {"a" * 40: model}
    for name, files in {
            "databricks/databricks-dolly-15k": {"databricks-dolly-15k.jsonl": lines(DOLLY)},
            "mrm8488/databricks-dolly-15k-curated-es": {"data/es-00000-of-00001-0.parquet": parquet(SPANISH)},
            "MiniLLM/dolly": {"raw.jsonl": lines(ALPACA), "valid.jsonl": lines(ALPACA), "valid.txt": b"x"},
            "MiniLLM/self-inst": {"valid.jsonl": lines(ALPACA), "valid.txt": b"x"},
            "MiniLLM/Vicuna": {"valid.jsonl": lines(ALPACA), "valid.txt": b"x"},
            "MiniLLM/sinst": {f"{part}/valid.jsonl": lines(ALPACA) for part in ("0_2", "11_")},
            "MiniLLM/uinst": {f"{part}/valid.jsonl": lines(ALPACA) for part in ("0_2", "11_")},
            "alexjercan/bugnet": {f"{part}.jsonl": lines(BUGNET) for part in ("C++_train", "Python_train", "Python_validation")},
            "open-r1/codeforces-cots": {f"{part}/train-0000{i}-of-00002.parquet": parquet(CODEFORCES)
                                        for part in ("solutions", "solutions_py") for i in (0, 1)},
            "AI-MO/NuminaMath-TIR": {f"data/{part}-00000-of-00001.parquet": parquet(NUMINA) for part in ("train", "test")},
            "openai/gsm8k": {f"main/{part}-00000-of-00001.parquet": parquet(GSM8K) for part in ("train", "test")},
    }.items():
        served.repositories["datasets", name] = {"b" * 40: {"README.md": b"", ".gitattributes": b""} | files}
    for part in "test", "train", "valid":
        Path("pytorrent/both", part).mkdir(parents=True)
        for i in 0, 1:
            Path("pytorrent/both", part, f"both_chk_{i}.jsonl.gz").write_bytes(gzip.compress(lines(PYTORRENT)))
    assert len(commands()) > 20
    for script, flags in commands():
        short = shlex.split(f"{SHORT[script]} --device cpu --dtype float32")
        status, _, err = shell(importlib.import_module(script), *flags, *short)
        assert status == 0, f"python {script}.py {shlex.join(flags)}: {err}"
    assert read_quantization(Path("runs/dolly/w4"))["bits"] == 4
