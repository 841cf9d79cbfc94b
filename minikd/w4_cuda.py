"""w4_matmul.cu: built at first use, kept on disk, launched, and registered as torch.ops.minikd.w4_matmul.

NVRTC compiles it through its plain C interface (torch's CUDA wheels bring the library, nvcc or not), and the driver loads
and launches it: no torch headers, no compiler of C++, nothing of torch's that is private.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd.files import atomic_path

SOURCE = Path(__file__).with_name("w4_matmul.cu")
KERNELS = ("w4_naive", "w4_matvec_1", "w4_matvec_2", "w4_matvec_4", "w4_mma_8", "w4_mma_8_few", "w4_mma_16", "w4_mma_16_few",
           "w4_mma_32", "w4_mma_64", "w4_dequantise")
# Most rows that each is used for; from counted instructions, not measured: tensor cores need fewer from one row on.
MATVEC_ROWS, MMA_ROWS = 0, 64
FEW_TILES = 264                         # below two blocks for each of an H100's 132 multiprocessors


class Unavailable(RuntimeError):
    """Why the kernel cannot be had here, in one line."""


# ---- the layout

def repack(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes uint8 [O, I], scales and zeros [O, I/g] -> what the kernel reads, as w4_matmul.cu draws it.

    words int32 [O/16, I/128, 2, 32, 4], scales float16 [I/g, O'], zeros uint8 [I/g, O'] or None where all are 8;
    O and I are padded to 16 and 128, O' is O padded, with codes of 8 and scales of 0.
    """
    (O, I), size = codes.shape, codes.shape[1] // scales.shape[1]
    rows, columns = -(-O // 16) * 16, -(-I // 128) * 128
    whole = codes.new_full((rows, columns), 8)
    whole[:O, :I] = codes
    # [tile of outputs, half, g, tile of inputs, j, t, 8 inputs]
    parts = whole.view(rows // 16, 2, 8, columns // 128, 4, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].int()
    words = functools.reduce(torch.bitwise_or, (parts[..., i] << 4 * i for i in range(8)))  # the 8th sets the sign bit
    words = words.permute(0, 3, 1, 2, 5, 4).reshape(rows // 16, columns // 128, 2, 32, 4).contiguous()
    wide = scales.new_zeros(rows, scales.shape[1])
    wide[:O] = scales
    if (zeros == 8).all():
        return words, wide.T.half().contiguous(), None
    offsets = zeros.new_full(wide.shape, 8)
    offsets[:O] = zeros
    return words, wide.T.half().contiguous(), offsets.T.to(torch.uint8).contiguous()


def fits(group_size: int) -> bool:
    """Whether the kernel takes a layer of such groups; its shape may be any that can be packed."""
    return group_size in (32, 64) or group_size % 128 == 0


def plan(M: int, N: int) -> tuple[str, tuple[int, int], int]:
    """The kernel for x [M, K] and W [N, K]: its name, grid and threads a block; M <= MMA_ROWS."""
    tiles = -(-N // 16)
    if M <= MATVEC_ROWS:
        return f"w4_matvec_{1 if M == 1 else 2 if M == 2 else 4}", (tiles, 1), 256
    rows = 8 if M <= 8 else 16 if M <= 16 else 32 if M <= 32 else 64
    if rows <= 16 and tiles < FEW_TILES:
        return f"w4_mma_{rows}_few", (tiles, 1), 512
    return f"w4_mma_{rows}", (tiles, 1), 256


# ---- building

def cache_folder() -> Path:
    """$MINIKD_CACHE, or ~/.cache/minikd."""
    return Path(os.environ.get("MINIKD_CACHE") or Path.home() / ".cache" / "minikd")


def build(arch: str) -> bytes:
    """The machine code for arch ("sm_90"): from the cache, or compiled now by NVRTC, else by nvcc.

    Raises Unavailable where neither compiles it. Where the cache cannot be written it is compiled each time.
    """
    source = SOURCE.read_bytes()
    path = cache_folder() / f"w4_matmul-{hashlib.sha256(source).hexdigest()[:16]}-{arch}.cubin"
    if path.exists():
        return path.read_bytes()
    reasons = []
    for compiler in nvrtc, nvcc:
        try:
            code = compiler(source, arch)
        except Unavailable as error:
            reasons.append(str(error))
            continue
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as new:
                new.write_bytes(code)
        return code
    raise Unavailable("; ".join(reasons))


def find_nvrtc() -> ctypes.CDLL:
    """The library by the loader's path, or out of the wheels that torch depends on.  Raises Unavailable."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheels = [Path(folder) / "nvidia" for folder in sys.path]
    found = sorted(str(path) for folder in wheels for path in folder.glob(f"*/lib/libnvrtc.so.{major}*"))
    for name in [f"libnvrtc.so.{major}", *found]:
        with suppress(OSError):
            for builtins in Path(name).parent.glob("libnvrtc-builtins.so*") if "/" in name else ():
                ctypes.CDLL(str(builtins))                      # which it looks for by the loader's path alone
            return ctypes.CDLL(name)
    raise Unavailable(f"libnvrtc.so.{major} is not found: install nvidia-cuda-nvrtc, or nvcc")


def nvrtc(source: bytes, arch: str) -> bytes:
    """NVRTC, by its C interface: source -> cubin.  Raises Unavailable, with the compiler's first line."""
    library, program, size = find_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def text(length, content) -> bytes:
        getattr(library, length)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, content)(program, buffer)
        return buffer.raw

    if library.nvrtcCreateProgram(ctypes.byref(program), source, SOURCE.name.encode(), 0, None, None):
        raise Unavailable("NVRTC: no program could be made")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
        if library.nvrtcCompileProgram(program, 1, options):
            log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").strip(b"\0\n ").decode(errors="replace")
            raise Unavailable(f"NVRTC: {(log.splitlines() or ['no log'])[0]}")
        return text("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def nvcc(source: bytes, arch: str) -> bytes:
    """nvcc from the PATH: source -> cubin.  Raises Unavailable, with its first complaint."""
    tool = shutil.which("nvcc")
    if tool is None:
        raise Unavailable("nvcc is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        run = subprocess.run([tool, f"-arch={arch}", "-cubin", "-x", "cu", "-o", out, "-"], input=source,
                             capture_output=True)
        if run.returncode or not out.exists():
            raise Unavailable(f"nvcc: {(run.stderr.decode(errors='replace').strip().splitlines() or ['failed'])[0]}")
        return out.read_bytes()


# ---- loading and launching

@functools.cache
def functions(device: int) -> dict:
    """The kernels by name, loaded on a GPU.  Raises Unavailable."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise Unavailable(f"the GPU is of compute capability {major}.{minor}; bfloat16 products need 8.0")
    code = build(f"sm_{major}{minor}")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the driver cannot be loaded ({error})") from error
    torch.zeros(1, device=f"cuda:{device}")                     # makes torch's context, and makes it the current one
    module, found = ctypes.c_void_p(), {"driver": driver}
    with torch.cuda.device(device):
        error = driver.cuModuleLoadData(ctypes.byref(module), code)
        for name in KERNELS if not error else ():
            found[name] = ctypes.c_void_p()
            error = error or driver.cuModuleGetFunction(ctypes.byref(found[name]), module, name.encode())
    if error:
        raise Unavailable(f"the driver does not load what was built (CUDA error {error}); delete {cache_folder()}")
    return found


@functools.cache
def available(device: int) -> bool:
    """Whether the kernel runs on this GPU; if not, one line on standard error says why, once."""
    try:
        functions(device)
    except Unavailable as error:
        print(f"w4_matmul.cu: not used, 4-bit layers are dequantised instead: {error}", file=sys.stderr)
        return False
    return True


def launch(name: str, grid: tuple[int, int], threads: int, words, scales, zeros, x, bias, y, M: int, N: int, K: int,
           group: int):
    """One kernel on the current stream; tensors are passed by their addresses, None as null."""
    table = functions(words.device.index)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
                for tensor in (words, scales, zeros, x, bias, y)]
    values = pointers + [ctypes.c_int(value) for value in (M, N, K, group)]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(words.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = table["driver"].cuLaunchKernel(table[name], *grid, 1, threads, 1, 1, 0, stream, addresses, None)
    if error:
        raise RuntimeError(f"{name}: launch failed with CUDA error {error}")


def multiply(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, outputs: int,
             group_size: int) -> Tensor:
    """y = x W^T + b.  x [M, K] bfloat16, W as `repack` gives it, bias [N] bfloat16 -> y [M, N] bfloat16

    Up to MMA_ROWS rows by the kernel of `plan`; more: W is dequantised into memory that torch reuses, and cuBLAS multiplies.
    """
    M, K = x.shape
    x = x.contiguous()
    if x.data_ptr() % 16:                                       # a view that begins inside a row: loads are 16 bytes
        x = x.clone()
    if M > MMA_ROWS:
        return F.linear(x, dequantise(words, scales, zeros, outputs, K, group_size), bias)
    y = x.new_empty(M, outputs)
    if M:
        launch(*plan(M, outputs), words, scales, zeros, x, bias, y, M, outputs, K, group_size)
    return y


w4_matmul = torch.library.custom_op("minikd::w4_matmul", multiply, mutates_args=(), device_types="cuda")


@w4_matmul.register_fake                                        # for CUDA graphs' and torch.compile's tracing: the shape
def _(x, words, scales, zeros, bias, outputs, group_size):
    return x.new_empty(x.shape[0], outputs)


def dequantise(words: Tensor, scales: Tensor, zeros: Tensor | None, outputs: int, inputs: int,
               group_size: int) -> Tensor:
    """W [O, I] in bfloat16."""
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=words.device)
    blocks = words.shape[1]
    launch("w4_dequantise", (words.shape[0], -(-blocks // 8)), 256, words, scales, zeros, None, None, weight, 0, outputs,
           inputs, group_size)
    return weight
