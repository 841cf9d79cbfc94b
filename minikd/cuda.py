"""Compiles the CUDA sources at first use, caches the machine code on disk, loads it and launches its kernels.

NVRTC compiles them (torch's CUDA wheels bring this library, so that nvcc is not needed), and the CUDA driver loads and launches
them. Both are called through their C interfaces by ctypes: no torch headers, no C++ compiler, nothing private of torch.
"""
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from minikd.files import atomic_path

# One program, in this order.
SOURCES = tuple(Path(__file__).with_name(f"{name}.cu")
                for name in ("common", "w4_matmul", "loss", "decode", "attend", "fused", "adamw"))

OVERLAP = 6                             # the driver's CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
MAX_SHARED = 8                          # the driver's CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LAUNCHING = threading.Lock()            # held from setting MAX_SHARED, one value per kernel, until the launch that needs it


class Unavailable(RuntimeError):
    """Why the kernels cannot be used here, in one line."""


# ---- building

def program() -> bytes:
    """All sources, one after the other; by the #line directives a compiler's errors still name the file and its line."""
    return b"".join(b'#line 1 "%s"\n%s\n' % (path.name.encode(), path.read_bytes()) for path in SOURCES)


def cache_folder() -> Path:
    """$MINIKD_CACHE, or ~/.cache/minikd."""
    return Path(os.environ.get("MINIKD_CACHE") or Path.home() / ".cache" / "minikd")


def build(arch: str) -> bytes:
    """The machine code (a cubin) for arch ("sm_90"): from the cache, or compiled now by NVRTC, or by nvcc if NVRTC cannot.

    Raises Unavailable if neither compiles it. If the cache cannot be written, every call compiles.
    """
    source, path, reasons = program(), None, []
    with suppress(OSError, RuntimeError):                       # a folder that this user may not look into; no home at all
        path = cache_folder() / f"kernels-{hashlib.sha256(source).hexdigest()[:16]}-{arch}.cubin"
        if path.exists():
            return path.read_bytes()
    for compiler in nvrtc, nvcc:
        try:
            code = compiler(source, arch)
        except Unavailable as error:
            reasons.append(str(error))
            continue
        with suppress(OSError):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as new:
                    new.write_bytes(code)
        return code
    raise Unavailable("; ".join(reasons))


def find_nvrtc() -> ctypes.CDLL:
    """NVRTC's library, from the loader's path or from the wheels that torch depends on.  Raises Unavailable."""
    major = (torch.version.cuda or "13").split(".")[0]
    wheels = [Path(folder) / "nvidia" for folder in sys.path]
    found = sorted(str(path) for folder in wheels for path in folder.glob(f"*/lib/libnvrtc.so.{major}*"))
    for name in [f"libnvrtc.so.{major}", *found]:
        beside = Path(name).parent.glob("libnvrtc-builtins.so*") if name in found else ()
        with suppress(OSError):
            for builtins in beside:
                ctypes.CDLL(str(builtins))                      # NVRTC itself looks for these on the loader's path only
            return ctypes.CDLL(name)
    raise Unavailable(f"libnvrtc.so.{major} was not found: install nvidia-cuda-nvrtc, or nvcc")


def nvrtc(source: bytes, arch: str) -> bytes:
    """source -> cubin, by NVRTC.  Raises Unavailable with the first line of the compiler's log."""
    library, program, size = find_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()

    def text(length: str, content: str) -> bytes:               # what a pair of NVRTC's functions gives: size, then bytes
        getattr(library, length)(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, content)(program, buffer)
        return buffer.raw

    if library.nvrtcCreateProgram(ctypes.byref(program), source, b"minikd", 0, None, None):
        raise Unavailable("NVRTC: cannot create a program")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={arch}".encode())
        if library.nvrtcCompileProgram(program, 1, options):
            log = text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").strip(b"\0\n ").decode(errors="replace")
            raise Unavailable(f"NVRTC: {(log.splitlines() or ['no log'])[0]}")
        return text("nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def nvcc(source: bytes, arch: str) -> bytes:
    """source -> cubin, by the nvcc on the PATH.  Raises Unavailable with the first line that it printed."""
    tool = shutil.which("nvcc")
    if tool is None:
        raise Unavailable("nvcc is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        run = subprocess.run([tool, f"-arch={arch}", "-std=c++17", "-cubin", "-x", "cu", "-o", out, "-"], input=source,
                             capture_output=True)
        if run.returncode or not out.exists():
            raise Unavailable(f"nvcc: {(run.stderr.decode(errors='replace').strip().splitlines() or ['failed'])[0]}")
        return out.read_bytes()


# ---- loading and launching

@functools.cache
def load(device: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """-> the driver's library, and the module that holds all kernels, loaded on a GPU.  Raises Unavailable."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise Unavailable(f"the GPU has compute capability {major}.{minor}; bfloat16 products need 8.0")
    code = build(f"sm_{major}{minor}")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"the driver cannot be loaded ({error})") from error
    torch.zeros(1, device=f"cuda:{device}")                     # creates torch's CUDA context and makes it current
    module = ctypes.c_void_p()
    with torch.cuda.device(device):
        error = driver.cuModuleLoadData(ctypes.byref(module), code)
    if error:
        raise Unavailable(f"the driver cannot load the compiled kernels (CUDA error {error}); delete {cache_folder()}")
    return driver, module


@functools.cache
def find(device: int, name: str) -> ctypes.c_void_p:
    """The handle of a kernel, by its name.  Raises Unavailable."""
    driver, module = load(device)
    kernel = ctypes.c_void_p()
    if error := driver.cuModuleGetFunction(ctypes.byref(kernel), module, name.encode()):
        raise Unavailable(f"{name} is not among the compiled kernels (CUDA error {error}); delete {cache_folder()}")
    return kernel


@functools.cache
def available(device: int) -> bool:
    """Whether the kernels run on this GPU; if not, one line on standard error says why, once."""
    try:
        load(device)
    except (Unavailable, OSError) as error:                     # OSError: no place for nvcc's files
        print(f"{', '.join(path.name for path in SOURCES)}: not used, torch's operators run instead: {error}", file=sys.stderr)
        return False
    return True


class Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute."""
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class Config(ctypes.Structure):
    """The driver's CUlaunchConfig.  shape: as in `launch`"""
    _fields_ = [("shape", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)),
                ("count", ctypes.c_uint)]


def launch(name: str, device: torch.device, grid: tuple[int, int], threads: int, *values, together: bool = False,
           overlap: bool = False, shared: int = 0):
    """Launches a kernel on the current stream.

    threads   per block
    values    the kernel's arguments: a tensor is passed as its address, None as null, an int as a C int, a ctypes structure
              by value
    together  a cooperative launch: all blocks are resident at once and can wait for each other; an error if they do not fit
    overlap   the kernel may start before its predecessor in the stream has ended, if that one allows it; from compute
              capability 9.0 on. Until it calls wait_for_previous, it must read only what no kernel writes, and write nothing
    shared    bytes of dynamic shared memory per block, in addition to what the kernel declares
    Raises RuntimeError if the driver returns an error.
    """
    def argument(value):
        if value is None or isinstance(value, Tensor):
            return ctypes.c_void_p(None if value is None else value.data_ptr())
        return ctypes.c_int(value) if isinstance(value, int) else value

    arguments = [argument(value) for value in values]           # `values` keeps temporary tensors alive until the launch
    addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    (driver, _), kernel = load(device.index), find(device.index, name)
    shape = *grid, 1, threads, 1, 1, shared                     # x, y and z of the grid, and of a block; bytes
    with torch.cuda.device(device), LAUNCHING:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = driver.cuFuncSetAttribute(kernel, MAX_SHARED, shared) if shared else 0          # needed above 48 KB
        if not error and overlap:
            config = Config(shape, stream, ctypes.pointer(Attribute(id=OVERLAP, value=1)), 1)
            error = driver.cuLaunchKernelEx(ctypes.byref(config), kernel, addresses, None)
        elif not error and together:
            error = driver.cuLaunchCooperativeKernel(kernel, *shape, stream, addresses)
        elif not error:
            error = driver.cuLaunchKernel(kernel, *shape, stream, addresses, None)
    if error:
        raise RuntimeError(f"{name}: launch failed with CUDA error {error}" + ": out of memory" * (error == 2))
