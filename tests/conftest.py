"""What several test files share: one thread (two are slower on a busy machine), small models and a tokenizer, the scripts as a
shell sees them, the CUDA kernels on a CPU, and the real data if it is there."""
import fcntl
import functools
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from minikd import checkpoint, cuda, model, sandbox
from minikd.checkpoint import load_model, save_model
from minikd.config import Qwen2Config
from minikd.cuda import Unavailable
from minikd.errors import InputError
from minikd.model import Qwen2
from minikd.run import Log, lock, read_log
from minikd.tokenizer import Tokenizer
from minikd.toy import QWEN2_WORDS
from ptx import Driver, Kernel, kernels_of

os.environ["CUDA_VISIBLE_DEVICES"] = ""                          # these tests are the CPU's, also where there is a GPU
torch.set_num_threads(1)
if sys.platform != "linux":
    sandbox._run = lambda *_: pytest.skip("programs are confined on Linux alone")
os.fsync = lambda handle: None                                   # no test cuts the power; 7,000 times 0.7 ms
sys.path.insert(0, str(Path(__file__).parents[1]))               # the scripts and benchmarks/, which are not installed

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["The student learns from its teacher, and the teacher learns nothing.", "¿Qué año es? El niño comió piñas.",
         "def add(a, b):\n    return a + b\n", "你好，世界。你好吗？", "What is 12 + 30? It is 42."] * 4

# A record of each dataset.
DOLLY = {"instruction": "Which is a fish?", "context": "", "response": "Tope", "category": "classification"}
BUGNET = {"problem_id": "p1", "language": "Python", "original_status": "Wrong Answer", "fail": "print(1)\n",
          "pass": "print(2)\n", "change": "replace", "i1": 6, "i2": 7, "error": "TLE", "stderr": "", "stdout": "1"}
PYTORRENT = {"repo": "r", "docstring": "Add one.\n\nReturns int.", "summary": "Add one.", "func_name": "f",
             "original_string": 'def f(x):\n    """Add one.\n\n    Returns int."""\n    return x + 1\n',
             "code": "def f(x):\n    return x + 1\n"}
CODEFORCES = {"id": "1/A", "note": None, "editorial": None, "prompt": "Solve it.", "generation": "<think>\n</think>",
              "finish_reason": "stop", "messages": [{"role": "user", "content": "Solve it."},
                                                    {"role": "assistant", "content": "<think>\n</think>"}]}


def write_records(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_in(path) -> list:
    """The values of a .jsonl file."""
    return [json.loads(line) for line in Path(path).open(encoding="utf-8")]


def change_json(path: Path, **fields):
    """Sets fields of the object in a .json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def files_in(folder: Path) -> dict[str, bytes]:
    """Path in the folder -> content, of all files."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(act, *given, **named) -> str:
    """The message of the InputError that act(*given, **named) raises; it is one line."""
    with pytest.raises(InputError) as caught:
        act(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(ended: tuple, *said: str):
    """A script, by what `shell` returned, has ended as it does for the user's errors: in one line that says these."""
    status, _, err = ended
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and all(words in err for words in said), ended


def passed(ended: tuple) -> str:
    """What a script has printed, by what `shell` returned; it ended without an error."""
    status, out, err = ended
    assert status == 0, err
    return out


@contextmanager
def locked_by_another(folder: Path):
    """Inside, another process holds minikd's lock on the folder; then it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            lock(folder)
            os.write(write, b"1")
            time.sleep(60)
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def small(seed: int, **shape) -> Qwen2:
    """A very small random model."""
    sizes = dict(vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3)
    return Qwen2(Qwen2Config(**sizes | shape)).init_weights(seed)


def random_model(seed: int = 0, **shape) -> Qwen2:
    """A random model of 2 layers with no bias at 0 and no norm at 1, in eval mode."""
    sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, tie_word_embeddings=False)
    model = small(seed, **sizes | shape).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(*shape, seed: int = 0, V: int = 61) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(seed: int, tokenizer, folder, **shape) -> Path:
    """A folder with a model made by `small` and the tokenizer."""
    tokenizer.save(folder)
    save_model(small(seed, **shape), folder)
    return folder


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps_of(folder) -> list[dict]:
    """The lines of optimizer steps in a run's log, less the clock."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder) if "grad_norm" in line]


@contextmanager
def killed_at(step: int):
    """Inside the `with` block a run is interrupted (KeyboardInterrupt) where it would log this step."""
    write = Log.write

    def until(log, *lines, **values):
        if values.get("step") == step:
            raise KeyboardInterrupt
        write(log, *lines, **values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", until)
        yield


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the slow tests: more shapes of the kernels and more "
                     "runs, most on a GPU played by the CPU; torch.compile; every section of benchmarks/gpu.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long for what it adds to the others; runs with --all")
    config.pluginmanager.set_blocked("logging-plugin")              # it adds handlers to 63 loggers of transformers, 3 x a test


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest --all"))
    items.sort(key=lambda item: "compiled" in getattr(item, "fixturenames", ()))    # last: nvcc is ready by then


def pytest_collection_finish(session):
    gc.collect(), gc.freeze()                                       # what was imported, which no later collection searches
    gc.set_threshold(100_000, 50, 100)                              # models come and go by thousands: a tenth of all time


@pytest.fixture
def spy(monkeypatch):
    """spy(module, function's name, note) -> a list that grows by note(*given, **named) with every call of the function."""
    def watch(where, name: str, note) -> list:
        notes, function = [], getattr(where, name)

        @functools.wraps(function)
        def call(*given, **named):
            notes.append(note(*given, **named))
            return function(*given, **named)

        monkeypatch.setattr(where, name, call)
        return notes
    return watch


@pytest.fixture
def loaded(spy) -> list[str]:
    """The names of the folders whose models are loaded, in order."""
    return spy(checkpoint, "_read_model", lambda folder, *more: folder.name)


@pytest.fixture
def native_bfloat16(monkeypatch):
    """native_bfloat16(avx512, amx=False): whether this CPU has these instructions for bfloat16."""
    def pretend(avx512: bool, amx: bool = False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    return pretend


@pytest.fixture
def recomputed(spy) -> list:
    """Grows with every group of blocks that gradient checkpointing will recompute."""
    return spy(model, "checkpoint", lambda *given, **named: 1)


@pytest.fixture
def read_only(monkeypatch):
    """read_only(folder): no file can be made in it from now on, as for a user who is not root."""
    make, folders = tempfile.TemporaryFile, set()

    def refuse(dir):
        if dir in folders:
            raise PermissionError(13, "Permission denied", str(dir))
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    return folders.add


@pytest.fixture(scope="session", autouse=True)
def compilation(request, tmp_path_factory):
    """-> the folder in which nvcc compiles minikd/*.cu while the first tests run, and a Future that is done when nvcc is; None if
    no test needs them. One of pytest-xdist's workers compiles, and the others wait for its lock."""
    if not shutil.which("nvcc") or not any("compiled" in getattr(item, "fixturenames", ()) for item in request.session.items):
        return None
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if hasattr(request.config, "workerinput") else folder) / "nvcc"
    folder.mkdir(exist_ok=True)
    source = cuda.program()                                         # now: a test may replace the sources while nvcc runs

    def compile():
        with open(folder / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (folder / "kernels.cubin").exists():
                (folder / "kernels.cu").write_bytes(source)
                subprocess.run(["nvcc", "-arch=sm_90", "-std=c++17", "-cubin", "--keep", "--keep-dir", folder,
                                folder / "kernels.cu", "-o", folder / "kernels.cubin"],
                               check=True, stderr=subprocess.PIPE, text=True)

    # In a thread, which waits for nvcc: a test that looks for child processes must not find an ended one.
    return folder, ThreadPoolExecutor(1).submit(compile)


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)      # what a test draws is the same in every run; torch.manual_seed takes 2 ms


@pytest.fixture
def shell(monkeypatch, capsys):
    """shell(script's module, *flags) -> (exit status, stdout, stderr), as from a shell; without matplotlib, because a picture
    takes longer than the rest of a small run (test_plots.py draws some)."""
    def call(script, *flags):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        status = 0
        try:
            with script.script_errors():
                script.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def int8():
    """Skips a test that multiplies in int8 where torch cannot."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or platform.machine() != "x86_64":
        pytest.skip("torch has no int8 product for this CPU")


@pytest.fixture(scope="session")
def nvcc():
    """Skips a test that needs nvcc where it compiles nothing: CUDA 13.0's does not know the headers of glibc 2.43, for one."""
    try:
        cuda.nvcc(b"", "sm_90")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiled(compilation, request) -> SimpleNamespace:
    """What nvcc makes of minikd/*.cu for a Hopper GPU: the PTX (text) and the machine code (bytes)."""
    if compilation is None:
        pytest.skip("no nvcc")
    folder, built = compilation
    try:
        built.result()
    except subprocess.CalledProcessError as error:
        request.getfixturevalue("nvcc")                             # which skips if these sources are not what is wrong
        pytest.fail(f"{error}\n{error.stderr}")
    return SimpleNamespace(ptx=(folder / "kernels.ptx").read_text())


@pytest.fixture(scope="session")
def kernels(compiled) -> dict[str, Kernel]:
    return kernels_of(compiled.ptx)


@pytest.fixture
def gpu(kernels, monkeypatch) -> Driver:
    """Makes cuda.launch run kernels on the CPU by ptx.Driver; a test sets the returned driver's `readable` and `writable`."""
    driver = Driver(kernels)
    monkeypatch.setattr(cuda, "load", lambda device: (driver, None))
    monkeypatch.setattr(cuda, "find", lambda device, name: name)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return driver


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared/data; a test that needs it is skipped in a clone without it."""
    if not SHARED.exists():
        pytest.skip("no ../shared/data here")
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """An ordinary tokenizer folder: a byte-level BPE of 400 ids, ChatML's special tokens included."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=400 - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    backend.add_special_tokens(SPECIAL)                             # after the words, as Qwen's are
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
