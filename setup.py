"""pip install -e .            what the scripts and the tests need
   pip install -e ".[plots]"   and pictures of the curves
   pip install -e ".[tests]"   and pytest on all cores
   pip install -e ".[reference]"   and the peers that tests and benchmarks compare with
"""
from setuptools import setup

setup(
    name="minikd",
    version="0.1.0",
    description="Knowledge distillation, GRPO and GPTQ for Qwen2 language models, from scratch in plain PyTorch",
    packages=["minikd"],
    package_data={"minikd": ["common.cu", "w4_matmul.cu", "loss.cu", "decode.cu", "attend.cu", "fused.cu", "adamw.cu"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",           # the oldest that passes all tests; brings jinja2, for chat templates
        "numpy",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",     # brings tqdm, the progress bar
        "huggingface_hub>=0.24",    # hub names; cutting into shards: tokenizers would also take one that cannot
        "pytest",
    ],
    extras_require={
        "plots": ["matplotlib"],
        "tests": ["pytest-xdist"],
        "reference": ["transformers>=5", "trl>=1.7.1", "rouge_score"],
    },
)
