"""A Hugging Face folder <-> a model: one file or shards, tied or untied head, any float dtype on disk, or 4 bits."""
import json
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minikd.config import Qwen2Config
from minikd.errors import InputError
from minikd.files import atomic_path, check_pointer, fingerprint, read_json, save_tensors, sha256
from minikd.hub import TOKENIZER, files_on_hub, local_folder
from minikd.model import Qwen2, allocate
from minikd.quant import is_finite, read_zeros
from minikd.w4 import W4Linear, swap_linears

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTIZE = "quantize_config.json"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
FOUR_BIT = (".qweight", ".qzeros", ".scales", ".g_idx")
PART = 16 << 20                                     # bytes that are read before a file is closed
# Old checkpoints store these; minikd computes both (rope_tables, causal attention), so they are ignored.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|attn\.masked_bias$")
# File names in a folder that has no config.json -> what it is instead.
OTHER_KINDS = {
    r"adapter_config\.json$": "is a LoRA adapter; merge it into its base model first: peft's merge_and_unload(), then "
                              "save_pretrained()",
    r"checkpoint-\d+(/|$)": "holds a training run; give one of its models, the folders checkpoint-*",
    r".*\.gguf$": "holds GGUF files; give the folder with safetensors, often the same name without -GGUF"}


def load_config(folder) -> Qwen2Config:
    """config.json of a local folder, checked.  Raises InputError for anything that minikd does not compute."""
    path = Path(folder) / "config.json"
    return Qwen2Config.from_dict(read_json(path), where=str(path))


def check_vocabulary(name, config: Qwen2Config, tokenizer):
    """Raises InputError if the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{name}: the tokenizer has {len(tokenizer):,} ids, but the model only {config.vocab_size:,} rows for "
                         "them; give a model and a tokenizer that belong together")


@torch.no_grad()                                    # and turns gradients on again, even after Ctrl-C in a no_grad of torch's own
def load_model(name, device="cpu", dtype: torch.dtype = torch.float32) -> Qwen2:
    """A model in eval mode from a local folder or a hub name. (One of 4 bits is only fast in bfloat16: w4.choose.)

    Every tensor goes from the file straight into its place in `dtype` on `device`; no second copy of the model is ever held.
    Files that are replaced meanwhile, as by a run that saves there, are read again.  Raises InputError for a tensor that is
    missing, unexpected, of the wrong shape or not finite, a truncated file, or an index that names a missing file.
    """
    folder = model_folder(name)
    for _ in range(10):
        begun = versions(folder)
        try:
            model = _read_model(folder, device, dtype)
        except (InputError, OSError, RuntimeError):             # of the files, or between two steps of their writer
            if versions(folder) == begun:
                raise
            continue
        if versions(folder) == begun:
            return model
        del model                                               # parts of two models
    raise InputError(f"{folder}: is written again and again while it is read; give a folder that stays as it is")


def versions(folder: Path) -> dict[str, tuple]:
    """Size and time of each file that decides what a folder's model computes; they change when one is written or replaced.
    (Inode numbers are left out: mounted cloud storage may change them at any moment.)"""
    found = {}
    with suppress(InputError):                                  # an index that is only half written
        for name in "config.json", INDEX, *shards_of(folder):
            with suppress(FileNotFoundError):
                stat = (folder / name).stat()
                found[name] = stat.st_size, stat.st_mtime_ns
    return found


class Checkpoint:
    """A model's folder as it was when a run began, for a run that may read it again hours later.

    files  the hashes of the files that decide what the model computes: they change if it is trained further in place
    """

    def __init__(self, name):
        self.folder = model_folder(name)
        self.seen = versions(self.folder)                       # before the files are hashed
        self.files = self.hashes()

    def __str__(self):
        """Its folder and one hash, to recognise it in a resumed run: 'runs/teacher (sha256 0123456789ab)'"""
        return f"{self.folder} (sha256 {fingerprint(self.files.values())[:12]})"

    def hashes(self) -> dict[str, str]:
        files = [self.folder / name for name in ("config.json", *shards_of(self.folder))]
        return {file.name: sha256(file) for file in files if file.exists()}

    def load(self, device="cpu", dtype: torch.dtype = torch.float32) -> Qwen2:
        """load_model's, of the model that was there.  Raises InputError if it is another by now."""
        model = load_model(self.folder, device, dtype)
        self.check()
        return model

    def check(self):
        """Raises InputError if a file's content has changed; that a file was copied or touched does not count."""
        now = versions(self.folder)
        if now != self.seen and self.hashes() != self.files:
            raise InputError(f"{self.folder}: has changed since this run began; put its files back and go on with --resume, or "
                             "start again with a copy that stays as it is")
        self.seen = now


def _read_model(folder: Path, device, dtype: torch.dtype) -> Qwen2:
    model, files = outline(folder)
    model = allocate(model.to(dtype), device)
    places = model.state_dict()                                 # the parameters' own memory, by name, outside autograd
    # The pages read from a file take memory until it is closed, in addition to all that is loaded already: so the largest tensor
    # comes first, in parts. Opening a file takes a millisecond, too long to do for each of many small tensors.
    opened, read = {}, 0
    for key in sorted(files, key=lambda key: -places[key].numel()):
        path, at = files[key], 0
        for part in places[key].split(max(1, PART // places[key][0].nbytes)):
            if path not in opened:
                opened[path] = open_tensors(path)
            part.copy_(read_tensor(path, key, opened[path], slice(at, at + len(part)), part.is_floating_point()))
            at, read = at + len(part), read + part.nbytes
            if read >= PART:
                opened, read = {}, 0                            # dropped, they are closed
        check_finite(places[key], path, key)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, W4Linear):
            check_words(layer, model.quantization, f"{files[layer_name + '.g_idx']}: {layer_name}")
    return model.eval()


def check_words(layer: W4Linear, quantization: dict, where: str):
    """Raises InputError for missing groups, and zero points of the other gptq format."""
    groups = len(layer.scales)
    if not 0 <= int(layer.g_idx.min()) <= int(layer.g_idx.max()) < groups:
        raise InputError(f"{where}.g_idx: names a group outside 0 to {groups - 1}; fetch it again")
    zeros = read_zeros(layer.qzeros, layer.version)             # [I/g, O]; symmetric: 8, or 7 or 9 if read by the wrong version
    if quantization.get("sym", True) and ((zeros == 7).all() or (zeros == 9).all()):
        raise InputError(f"{where}.qzeros: symmetric zero points are 8, these are {int(zeros[0, 0])}; in config.json set "
                         "checkpoint_format (and format, if it is there) to the other one of gptq and gptq_v2")


def load_head(name, device="cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Only the LM head [V, D] of a model. Raises load_model's errors about names and shapes, and about the head's own values."""
    model, files = outline(model_folder(name))
    key = TABLE if model.config.tie_word_embeddings else HEAD
    head = read_tensor(files[key], key).to(device, dtype)
    check_finite(head, files[key], key)
    return head


def model_folder(name, weights: bool = True) -> Path:
    """The local folder of a model and its tokenizer. If `name` is on the hub, the small files are downloaded first and checked,
    then, with `weights`, those that hold the tensors."""
    folder = local_folder(name, ["config.json", INDEX, *TOKENIZER])
    if not (folder / "config.json").exists():
        held = files_on_hub(name) or [path.name for path in folder.glob("*")]
        for pattern, said in OTHER_KINDS.items():
            if any(re.match(pattern, file) for file in held):
                raise InputError(f"{name}: {said}")
    if weights and not Path(name).expanduser().is_dir():
        load_config(folder)                                     # both raise for what minikd cannot compute, before
        read_quantization(folder)                               # gigabytes are fetched in vain
        names = files_on_hub(name)
        if names is not None:
            check_weights(name, names)
        local_folder(name, [SINGLE] if SINGLE in (names or ()) else shards_of(folder))
    return folder


def outline(folder: Path) -> tuple[Qwen2, dict[str, Path]]:
    """A model on the meta device (no memory for weights), and the file that holds each of its tensors; all checked."""
    config = load_config(folder)
    with torch.device("meta"):
        try:
            model = Qwen2(config)
        except (RuntimeError, TypeError) as error:              # a size, or a tensor's bytes, does not fit in 64 bits
            raise InputError(f"{folder / 'config.json'}: its sizes are impossible ({str(error).splitlines()[0]}); "
                             "fetch it again") from error
        model.quantization = read_quantization(folder)
        if model.quantization:
            size = model.quantization["group_size"]
            try:
                swap_linears(model, size, 2 if model.quantization["checkpoint_format"] == "gptq_v2" else 1)
            except InputError as error:
                raise InputError(f"{folder / 'config.json'}: quantization_config has group_size = {size}, which does not "
                                 "divide the inputs of all layers; use the unquantised folder") from error
    return model, tensor_files(folder, {key: tuple(p.shape) for key, p in model.state_dict().items()})


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a folder holds its model's embeddings."""
    return read_tensor(outline(folder)[1][TABLE], TABLE, rows=slice(1)).dtype


def has_four_bits(name) -> bool:
    """Whether a folder or hub name holds 4-bit weights, by its config alone.  Raises InputError as read_quantization."""
    return read_quantization(model_folder(name, weights=False)) is not None


def read_quantization(folder: Path) -> dict | None:
    """config.json's quantization_config, checked; None where there is none.  Raises InputError for another method, format or
    number of bits."""
    path = folder / "config.json"
    config = read_json(path)
    raw = config.get("quantization_config")
    if config.get("quantization") and not (isinstance(raw, dict) and "quant_method" in raw):     # mlx-lm writes both
        raise InputError(f"{path}: `quantization` is MLX's; minikd reads the gptq format: use the unquantised folder")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: quantization_config is not an object; fetch it again")
    raw = {field: value for field, value in raw.items() if value is not None}              # null: the default
    format = raw.setdefault("checkpoint_format", raw.get("format", "gptq"))
    usual = {"format": format, "pack_dtype": "int32", "dynamic": {}, "lm_head": False}     # where a field is missing
    read = {"quant_method": ["gptq"], "bits": [4], "checkpoint_format": ["gptq", "gptq_v2"]}
    for field, good in (read | {field: [value] for field, value in usual.items()}).items():
        value = raw.get(field, usual.get(field))
        if value not in good:
            raise InputError(f"{path}: quantization_config has {field} = {value!r}; minikd reads "
                             f"{' or '.join(map(repr, good))}: use the unquantised folder")
    if type(raw.get("group_size")) is not int:
        raise InputError(f"{path}: quantization_config has group_size = {raw.get('group_size')!r}; give a whole number")
    return raw


def read_tensor(path: Path, key: str, file=None, rows: slice = slice(None), floating: bool = True) -> torch.Tensor:
    """A tensor of a safetensors file, which may be open already (open_tensors), or some of its rows.  Raises InputError
    where it holds integers for floats, or the reverse."""
    file = open_tensors(path) if file is None else file
    try:
        tensor = file.get_slice(key)[rows]
    except (SafetensorError, RuntimeError) as error:            # of a dtype that torch lacks, such as FP4
        raise InputError(f"{path}: {key}: cannot be read ({error}); use the unquantised folder, or fetch it again") from error
    if tensor.is_floating_point() != floating:
        kind = "a float" if floating else "an integer"
        raise InputError(f"{path}: {key} is {tensor.dtype}, not {kind} tensor; fetch the model again")
    return tensor


def check_finite(tensor: torch.Tensor, path: Path, key: str):
    """Raises InputError for floats that are not finite in the dtype they are now held in: float16's largest is 65,504."""
    if tensor.is_floating_point() and not is_finite(tensor):
        raise InputError(f"{path}: {key}: has values that are not finite in {tensor.dtype}; fetch the model again, or take an "
                         "earlier checkpoint")


def open_tensors(path: Path):
    """safe_open, with a file that cannot be read, or is damaged, reported as an InputError."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:                                   # whatever the reason
        raise InputError(f"{path}: is missing, or cannot be opened; check its permissions, or fetch it again") from None
    except SafetensorError as error:
        check_pointer(path)
        raise InputError(f"{path}: is damaged or truncated, {path.stat().st_size:,} bytes ({error}); fetch it again") from error


def shards_of(folder: Path) -> list[str]:
    """The names of the files that hold a folder's tensors; they need not be there."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return [SINGLE]
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in named.values()):
        raise InputError(f"{folder / INDEX}: has no weight_map from tensors to files in its folder; fetch it again")
    return sorted(set(named.values()))


def check_weights(name, files: list[str]):
    """Raises InputError if among the names of a folder's files there are no safetensors."""
    if SINGLE not in files and INDEX not in files:
        if any(file.endswith(".bin") for file in files):
            raise InputError(f"{name}: has only pickled weights (*.bin), which can run code when opened; if you trust them, "
                             "convert them to safetensors with transformers: "
                             "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)")
        raise InputError(f"{name}: has neither {SINGLE} nor {INDEX}; give the folder of a model")


def tensor_files(folder: Path, wanted: dict[str, tuple]) -> dict[str, Path]:
    """Which file holds each wanted tensor, after checking every name and shape against the model's."""
    check_weights(folder, [path.name for path in folder.iterdir()])
    files, shapes = {}, {}                                      # of the tensors that the folder holds
    for shard in shards_of(folder):
        if not (folder / shard).is_file():
            if (folder / INDEX).exists():
                raise InputError(f"{folder / INDEX}: names {shard}, which is not in the folder; fetch that file")
            raise InputError(f"{folder / shard}: is not a file; fetch the model again")        # a link into an emptied cache, say
        with open_tensors(folder / shard) as file:
            files |= dict.fromkeys(file.keys(), folder / shard)
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    for key, shape in wanted.items():
        if key.removesuffix("weight") + "qweight" in files:
            raise InputError(f"{folder}: holds 4-bit layers, but its config.json has no quantization_config; add one with "
                             f"the content of {QUANTIZE} and \"quant_method\": \"gptq\"")
        if key not in files:
            raise InputError(f"{folder}: tensor {key} {list(shape)} is missing, but config.json asks for it; fetch the model "
                             "again")
        if shapes[key] != shape:
            raise InputError(f"{files[key]}: tensor {key} is {list(shapes[key])}, but config.json asks for {list(shape)}; use "
                             "files of the same model")
    for key in files:
        if key in wanted or key == HEAD or COMPUTED.search(key):
            continue
        if not key.endswith("_proj.bias") or read_tensor(files[key], key).any():    # AutoGPTQ stores zeros for no bias
            raise InputError(f"{files[key]}: tensor {key} {list(shapes[key])} is not part of the model that "
                             "config.json describes; use files of the same model")
    if HEAD in files and HEAD not in wanted and shapes[HEAD] != (0,):           # some folders store a tied head, too
        if shapes[HEAD] != wanted[TABLE]:
            raise InputError(f"{files[HEAD]}: tensor {HEAD} is {list(shapes[HEAD])}, but config.json ties it to the "
                             f"embedding, {list(wanted[TABLE])}; use files of the same model")
        a, b = (read_tensor(files[key], key) for key in (HEAD, TABLE))
        if a.dtype != b.dtype:                                  # torch compares float8 with no other dtype
            a, b = a.float(), b.float()
        if (a != b).any():
            raise InputError(f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from it; set "
                             "tie_word_embeddings to false, or remove that tensor")
    return {key: files[key] for key in wanted}


@torch.no_grad()                                    # as for load_model
def save_model(model: Qwen2, folder, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9):
    """Writes config.json and the weights, in `dtype` or the model's own, completely or not at all.

    One model.safetensors or, above `shard_bytes` (transformers 4's limit), shards with an index. A tied head is left
    out, as in Qwen's own folders. A 4-bit model's codes and scales are written as they are, its quantization_config
    goes into config.json and, for tools that look there, quantize_config.json. What else is in `folder` is kept (the
    tokenizer's files, a log, subfolders), except other *.safetensors.
    Before anything is written, raises InputError for weights that `dtype` cannot hold, and ValueError for a model that
    load_model would refuse: partly quantised, with tensors that model.config does not describe (an adapter's), or
    packed for another thread's generate.
    """
    from huggingface_hub import split_state_dict_into_shards_factory as split   # comes with tokenizers
    folder = Path(folder)
    if model.decoding and model.layout == "packed" and not model.quantization:
        raise ValueError(f"{folder}: not saved, as the model generates meanwhile, and its weights are packed; wait for it")
    if model.partly_quantized:
        raise ValueError(f"{folder}: not saved, as the model is partly quantised, or its weights were freed; finish with to_w4")
    held = model.state_dict()
    if not model.quantization:
        shapes = lambda tensors: {(key, value.shape) for key, value in tensors.items()}
        with torch.device("meta"):
            described = shapes(Qwen2(model.config).state_dict())
        if others := shapes(held) ^ described:
            raise ValueError(f"{folder}: not saved, as {min(others)[0]} is not as model.config describes it; merge adapters and "
                             "masks into the weights, or change the config")
    tensors = {key: value.to(value.dtype if key.endswith(FOUR_BIT) else dtype or value.dtype) for key, value in held.items()}
    for key, value in tensors.items():
        if value.dtype != held[key].dtype and not is_finite(value) and is_finite(held[key]):
            raise InputError(f"{folder}: not saved, as {key} has values that are not finite in {dtype}; save in another dtype")
    keep = lambda name: not name.endswith(".safetensors") and name not in (INDEX, "config.json", QUANTIZE)
    settings = {"config.json": model.config.to_dict(dtype=dtype or model.head.dtype)}
    if model.quantization:
        settings["config.json"]["quantization_config"] = settings[QUANTIZE] = model.quantization
    shards = split(tensors, get_storage_size=lambda tensor: tensor.nbytes, max_shard_size=shard_bytes,
                   filename_pattern="model{suffix}.safetensors")
    if shards.is_sharded:
        settings[INDEX] = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    with atomic_path(folder, folder=True, keep=keep) as new:
        for name, value in settings.items():
            (new / name).write_text(json.dumps(value, indent=2) + "\n")
        for file, keys in shards.filename_to_tensors.items():
            save_tensors({key: tensors[key] for key in keys}, new / file, {"format": "pt"})
