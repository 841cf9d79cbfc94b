"""attend.cu from Python: where it can run, and torch.ops.minikd.attend."""
import torch
from torch import Tensor

from minikd.cuda import available, launch

HEADS, FEWEST, SHARED = 8, 512, 133_648         # attend.cu's: most query heads per key head; a block's fewest slots; its bytes


def make_parts(keys: Tensor, heads: int) -> Tensor | None:
    """Room for the kernel's partial results [B K, splits, HEADS (E + 2) + 1], 0 at first, for a cache of layers like `keys`
    [B, K, S, E]: of each query head E sums, the greatest score and the mass; then a counter. Where one block per row and key head
    would leave multiprocessors idle, several split its slots.
    None if the kernel cannot run: not on a GPU, not in bfloat16, an unsupported head size, S no multiple of 8, more than HEADS
    query heads per key head, or too little shared memory, as on consumer GPUs and those before the A100.
    """
    B, K, S, E = keys.shape
    if not (keys.is_cuda and keys.dtype == torch.bfloat16 and E in (64, 128) and heads <= HEADS * K and S % 8 == 0
            and available(keys.device.index)):
        return None
    gpu = torch.cuda.get_device_properties(keys.device)
    if gpu.shared_memory_per_block_optin < SHARED:
        return None
    splits = max(1, min(gpu.multi_processor_count // (B * K), S // FEWEST))
    return torch.zeros(B * K, splits, HEADS * (E + 2) + 1, dtype=torch.float32, device=keys.device)


def step(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor, bias: Tensor,
         parts: Tensor) -> Tensor:
    """What model.Attention computes between qkv [B, 1, (H + 2K) E] and o_proj, for one new token per row; writes that token's
    key and value into the cache.  cos, sin [B, 1, 1, E], cache.StaticCache's slot [1] and bias [B, 1, 1, S] -> [B, 1, H E]"""
    B, K, S, E = keys.shape
    H = qkv.shape[-1] // E - 2 * K
    y = qkv.new_empty(B, 1, H * E)
    launch(f"attend_{E}", qkv.device, parts.shape[:2], 1024 // E * 32,       # threads: Shared<E>::THREADS
           qkv.contiguous(), cos, sin, bias, slot, keys, values, parts, y, H, K, S, shared=SHARED)
    return y


attend = torch.library.custom_op("minikd::attend", step, mutates_args=("keys", "values", "parts"), device_types="cuda")


@attend.register_fake                                           # y's shape and dtype, all that torch.compile's tracing needs
def _(qkv, cos, sin, keys, values, slot, bias, parts):
    return qkv.new_empty(qkv.shape[0], 1, qkv.shape[-1] - 2 * keys.shape[1] * keys.shape[3])
