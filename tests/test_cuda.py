"""How the CUDA sources are compiled and cached, and the line that says why they cannot be."""
import ctypes
import shutil
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from minikd import cuda
from minikd.cuda import Unavailable, build
from minikd.w4_cuda import KERNELS


def test_nvcc_compiles_and_the_result_is_cached(nvcc, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIKD_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "find_nvrtc", Mock(side_effect=Unavailable("none here")))
    monkeypatch.setattr(cuda, "program", lambda: b'extern "C" __global__ void nothing() {}')
    code = build("sm_90")
    assert code[:4] == b"\x7fELF" and b"nothing" in code
    assert [path.read_bytes() == code for path in tmp_path.iterdir()] == [True]
    monkeypatch.setattr(cuda, "nvcc", lambda source, arch: b"built again")
    assert build("sm_90") == code                                               # from the cache
    monkeypatch.setenv("MINIKD_CACHE", "/proc/nowhere")                         # which cannot be written
    assert build("sm_90") == build("sm_90") == b"built again"
    for method, error in ("exists", PermissionError(13, "another user's")), ("home", RuntimeError("no home")):
        with monkeypatch.context() as patch:
            patch.delenv("MINIKD_CACHE")
            patch.setattr(cuda.Path, method, Mock(side_effect=error))
            assert build("sm_90") == b"built again"


def test_a_changed_source_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIKD_CACHE", str(tmp_path))
    monkeypatch.setattr(cuda, "nvrtc", lambda source, arch: source + arch.encode())
    for text, arch in (b"a", "sm_90"), (b"b", "sm_90"), (b"a", "sm_80"), (b"a", "sm_90"):
        first, second = sources = tmp_path / "first.cu", tmp_path / "second.cu"
        monkeypatch.setattr(cuda, "SOURCES", sources)
        first.write_bytes(b"the same"), second.write_bytes(text)
        assert build(arch) == b'#line 1 "first.cu"\nthe same\n#line 1 "second.cu"\n%s\n' % text + arch.encode()
    assert len(list(tmp_path.glob("*.cubin"))) == 3


def test_nvrtc_compiles_the_sources_if_it_is_installed():
    try:
        cuda.find_nvrtc()
    except Unavailable:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")
    code = cuda.nvrtc(cuda.program(), "sm_90")
    assert all(name.encode() in code for name in KERNELS)
    with pytest.raises(Unavailable, match="NVRTC: a.cu.*7.*nonsense"):
        cuda.nvrtc(b'#line 7 "a.cu"\n__global__ void f() { nonsense; }', "sm_90")


def test_without_a_compiler_one_line_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIKD_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError("no library")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device else (9, 0))
    with pytest.raises(Unavailable, match="compute capability 7.5; bfloat16 products need 8.0"):
        cuda.load(1)
    cuda.load.cache_clear(), cuda.available.cache_clear()
    assert not cuda.available(0) and not cuda.available(0)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "libnvrtc" in said and "nvcc is not on the PATH" in said and "w4_matmul.cu" in said
    assert list(tmp_path.iterdir()) == []
    cuda.load.cache_clear(), cuda.available.cache_clear()


def test_for_a_source_that_does_not_compile_the_compiler_s_error_is_given(nvcc):
    with pytest.raises(Unavailable, match="nvcc: a.cu.*7.*error"):
        cuda.nvcc(b'#line 7 "a.cu"\n__global__ void f() { nonsense; }', "sm_90")


def use_driver(monkeypatch, **functions):
    """Makes cuda.launch call a driver that has these functions."""
    monkeypatch.setattr(cuda, "load", lambda device: (SimpleNamespace(**functions), None))
    monkeypatch.setattr(cuda, "find", lambda device, name: name)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


def test_a_temporary_tensor_lives_until_its_kernel_is_launched(monkeypatch):
    held, alive = [], []

    def temporary():
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        return tensor

    use_driver(monkeypatch, cuLaunchKernel=lambda *_: alive.append(held[0]() is not None) or 0)
    cuda.launch("any", torch.device("cuda", 0), (1, 1), 32, temporary(), 3)
    assert alive == [True] and held[0]() is None


def test_another_thread_does_not_take_shared_memory_from_a_launch(monkeypatch):
    """The driver keeps one limit for a kernel, and another launch of it may need less."""
    limits, other = [], []

    def limit(kernel, attribute, size):
        limits.append(size)
        if not other:
            other.append(threading.Thread(target=cuda.launch, args=("any", gpu, (1, 1), 32), kwargs={"shared": 100}))
            other[0].start()
            other[0].join(0.2)                                  # it must wait
        return 0

    gpu = torch.device("cuda", 0)
    use_driver(monkeypatch, cuFuncSetAttribute=limit, cuLaunchKernel=lambda *given: int(given[7] > limits[-1]))
    cuda.launch("any", gpu, (1, 1), 32, shared=200)
    other[0].join()
    assert limits == [200, 100]
