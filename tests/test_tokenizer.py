"""Text to ids and back: Qwen2's real ids, the chat templates as jinja renders them, streaming, and what is refused."""
import errno
import json
import random
import shutil
from pathlib import Path

import jinja2
import pytest
import tokenizers

from minikd.errors import InputError
from minikd.tokenizer import QWEN25_SYSTEM, Tokenizer

TEXTS = ["Hello world!", "¿Qué año es? El niño comió piñas.", "你好，世界。", "def f(x):\n\treturn x  # 12 34\n\n\n", "",
         "family 👩‍👩‍👧 party 🎉🎉 flag 🇪🇸", "rare 𠜎𠜱 and e\u0301 combined", "a \ufffd of its own \ufffd"]

# The plain-message part of each template, as the Instruct (Qwen1.5: Chat) models' tokenizer_config.json has it once
# JSON is read: Qwen2.5 escapes its newlines for jinja, Qwen2 and Qwen1.5 hold real ones.
QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
           or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
QWEN25_MATH = QWEN25.replace(QWEN25_SYSTEM, r"Please reason step by step, and put your final answer within \\boxed{}.")
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
         "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
         "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}" + ASK)
QWEN15 = QWEN2.replace("a helpful assistant.", "a helpful assistant")
NO_SYSTEM = QWEN2.replace("{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}", "")
# The prompt in a variable, as tools for fine-tuning write it; thoughts begun for the model; a turn that is left open.
VARIABLE = ("{% set system_message = \"You're a helpful assistant.\" %}{% if messages[0]['role'] == 'system' %}"
            "{% set system_message = messages[0]['content'] %}{% endif %}"
            "{{ '<|im_start|>system\n' + system_message + '<|im_end|>\n' }}{% for message in messages %}"
            "{% if message['role'] == 'system' %}{% continue %}{% endif %}"
            "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}" + ASK)
THINKING = QWEN25.replace(r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>assistant\n<think>\n' }}")
OPEN = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% generation %}\n"
          "{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endfor %}"
          "{% if tools is not none %}TOOLS{% endif %}{{ bos_token }}" + ASK)
JSON = "{{ ['<é>', {'b': 1, 'a': messages[0]['content']}] | tojson }}{{ messages[0] | tojson(indent=2) }}"
OTHER = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
INDENTED = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ message['content'] }}
    {% endif %}
{% endfor %}"""

USER, ASSISTANT = {"role": "user", "content": "Hi {{ there }}\n"}, {"role": "assistant", "content": " Yes?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {"one question": [USER], "a system message": [SYSTEM, USER], "an answered one": [USER, ASSISTANT],
         "two turns": [SYSTEM, USER, ASSISTANT, USER], "a late system message": [USER, ASSISTANT, SYSTEM, USER],
         "an empty system message": [{"role": "system", "content": ""}, USER]}


def with_template(folder, tmp_path, template, apart=False):
    """A copy of a tokenizer's folder that has the template, in tokenizer_config.json or apart (transformers 5)."""
    shutil.copytree(folder, tmp_path / "t")
    if apart:
        (tmp_path / "t" / "chat_template.jinja").write_text(template)
    else:
        config = {"chat_template": template, "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}, "bos_token": None,
                  "tokenizer_class": "Qwen2Tokenizer"}
        (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "t"


def rendered(template: str, messages: list[dict], add_generation_prompt: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt,
                                                    eos_token="<|im_end|>")


# ---- chat

@pytest.mark.parametrize("template", [QWEN25, QWEN25_MATH, QWEN2, QWEN15, NO_SYSTEM, VARIABLE, THINKING, OPEN, INDENTED, OTHER],
                         ids="Qwen2.5 Qwen2.5-Math Qwen2 Qwen1.5 none variable thinking open indented other".split())
def test_chat_is_character_for_character_what_the_folders_template_renders(tokenizer_folder, tmp_path, template):
    tokenizer, before = Tokenizer.load(with_template(tokenizer_folder, tmp_path, template)), json.dumps(CHATS)
    for name, messages in CHATS.items():
        for asked in True, False:
            assert tokenizer.chat(messages, add_generation_prompt=asked) == rendered(template, messages, asked), name
    assert json.dumps(CHATS) == before                                  # the caller's list is the caller's


def test_chat_without_a_template_is_qwen25s(tokenizer):
    assert tokenizer.chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    for messages in CHATS.values():
        assert tokenizer.chat(messages) == rendered(QWEN25, messages, False)


@pytest.mark.parametrize("template", [QWEN25, VARIABLE, THINKING, OPEN, MARKED, JSON, OTHER],
                         ids="25 variable thinking open marked json other".split())
def test_chat_is_transformers_apply_chat_template(tokenizer_folder, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    folder = with_template(tokenizer_folder, tmp_path, template)
    mine, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for messages in CHATS.values():
        for asked in True, False:
            assert mine.chat(messages, asked) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)


@pytest.mark.parametrize("turn", [{"role": "tool", "content": "3"}, {"role": "developer", "content": "x"}, {"content": "x"},
                                  {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, {"role": "user"},
                                  {"role": "user", "content": None}, {"role": "user", "content": [{"type": "text"}]}])
def test_chat_refuses_turns_that_it_has_no_words_for(tokenizer, turn):
    with pytest.raises(InputError, match=f"a turn of role {turn.get('role')!r}"):
        tokenizer.chat([USER, turn])


def test_the_template_is_read_from_either_file_the_one_apart_first(tokenizer_folder, tmp_path):
    folder = with_template(tokenizer_folder, tmp_path, QWEN25_MATH)
    assert Tokenizer.load(folder).chat([USER]) == rendered(QWEN25_MATH, [USER], False)
    for text, template in (QWEN2, QWEN2), ("", QWEN25), (" \n", QWEN25):        # an empty one is none
        (folder / "chat_template.jinja").write_text(text)
        assert Tokenizer.load(folder).chat([USER]) == rendered(template, [USER], False)
    (folder / "chat_template.jinja").write_bytes(b"a\xff")
    assert Tokenizer.load(folder).chat([USER]) == "a\ufffd"
    (folder / "chat_template.jinja").unlink(), (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.load(folder).chat([USER]) == rendered(QWEN25, [USER], False)


def test_of_several_named_templates_the_default_one_counts(tokenizer_folder, tmp_path):
    named = [{"name": ["odd"]}, {"name": "tool_use", "template": NO_SYSTEM}, {"name": "default", "template": QWEN2}]
    tokenizer = Tokenizer.load(with_template(tokenizer_folder, tmp_path, named))
    assert tokenizer.chat([USER]) == rendered(QWEN2, [USER], False)


@pytest.mark.parametrize("template, said", [
    ("{% if %}", "is damaged"), ("{{" + "(" * 9999 + ")" * 9999 + "}}", "is damaged"),
    ("{% for x in [1] %}" * 25 + "{% endfor %}" * 25, "is damaged .too many statically nested blocks"),
    ("{{ " + "1" * 6000 + " }}", "is damaged .Exceeds the limit"),
    ("{{ raise_exception('system first') }}", "system first"), ("{{ nobody.knows }}", "undefined"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"), ("{{ messages.append(1) }}", "unsafe"),
    ("{{ 1 / 0 }}", "division by zero")])
def test_a_template_that_fails_or_reaches_out_is_one_line(tokenizer_folder, tmp_path, template, said):
    folder = with_template(tokenizer_folder, tmp_path, template)
    with pytest.raises(InputError, match=said) as caught:
        Tokenizer.load(folder).chat([USER])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_jinja_that_could_not_confine_a_template_is_refused(tokenizer_folder, tmp_path, monkeypatch):
    folder = with_template(tokenizer_folder, tmp_path, QWEN25)
    for held, refused in ("3.1.5", True), ("3.1.6", False), ("3.2.0rc1", False), ("4.0", False), ("2.99.7", True):
        monkeypatch.setattr("minikd.tokenizer.version", lambda _: held)
        if refused:
            with pytest.raises(InputError, match=f"jinja2 {held} cannot run safely; pip install -U jinja2"):
                Tokenizer.load(folder)
        else:
            assert Tokenizer.load(folder).template


# ---- ids

def test_text_survives_encoding_and_decoding(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.backend.normalizer.normalize_str(text)     # NFC: é is one letter
        assert all(type(i) is int and 0 <= i < len(tokenizer) for i in ids)
    assert len(tokenizer.encode("the teacher")) < len("the teacher")


def test_special_tokens_are_one_id_each_and_decoding_leaves_them_out(tokenizer):
    text = "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.backend.token_to_id("<|im_start|>") and tokenizer.end_id in ids
    assert tokenizer.decode(ids) == "user\nHi\n" and tokenizer.backend.decode(ids, skip_special_tokens=False) == text


def test_nothing_is_added_to_a_text_or_cut_off_though_the_folder_asks_for_it(tokenizer_folder, tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.pad_id)])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "The student learns from its teacher."
    as_saved, ours = backend.encode(text).ids, tokenizer.encode(text)
    assert as_saved[:4] == [tokenizer.pad_id, *ours[:3]] and len(as_saved) == 64 and len(ours) > 4
    assert Tokenizer.load(tmp_path).encode(text) == ours and tokenizer.encode("") == []


def test_every_stop_ends_an_answer_and_pad_is_not_the_one_that_training_appends(tokenizer):
    end, pad = (tokenizer.backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert tokenizer.eos_ids == {end, pad} and tokenizer.end_id == end and tokenizer.pad_id == pad != end


# ---- streaming

def streamed(tokenizer, ids) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.end()]


def test_streaming_never_gives_half_a_character_and_adds_up_to_decode(tokenizer):
    for text in TEXTS[:-1]:
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in pieces)
    assert len(tokenizer.encode("🎉")) == 4                  # so that the test above had halves to give
    assert streamed(tokenizer, tokenizer.encode("🎉!")) == ["", "", "", "🎉", "!", ""]


def test_streaming_holds_back_no_more_than_the_unfinished_character(tokenizer):
    stream = tokenizer.stream()
    for i in tokenizer.encode("a 🎉")[:-1]:
        text = stream.push(i)
    assert text == "" and stream.end() == "\ufffd"          # generation stopped inside the character
    assert stream.end() == "" and stream.push(tokenizer.encode("b")[0]) == "b"


def test_streaming_adds_up_on_bytes_that_are_no_text_at_all(tokenizer):
    """As an untrained model writes.  The first row has seven bytes that begin no character, then a whole character."""
    continuation = tokenizer.encode("🎉")[1]
    rng = random.Random(0)
    rows = [[continuation] * 7 + tokenizer.encode("🎉")]
    rows += [[rng.randrange(rng.choice([256, len(tokenizer)])) for _ in range(30)] for _ in range(300)]
    for ids in rows:
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids), ids
    assert "🎉" in "".join(streamed(tokenizer, rows[0]))


# ---- folders

def test_save_copies_the_tokenizers_files_and_writes_every_stop(tokenizer_folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    saved = tmp_path / "new" / "folder"
    assert (saved / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert (saved / "tokenizer_config.json").exists()
    assert json.loads((saved / "generation_config.json").read_text()) == {
        "eos_token_id": sorted(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    again = Tokenizer.load(saved)
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    again.save(saved)                                       # into its own folder: nothing to copy, nothing lost
    assert Tokenizer.load(str(saved)).eos_ids == tokenizer.eos_ids


@pytest.mark.parametrize("inside", [True, False])
def test_a_link_in_the_folder_does_not_make_it_copy_a_private_file(tokenizer_folder, tmp_path, inside):
    """These files are not read, so anything would be copied; in the hub's cache every file is a link to a blob."""
    folder = tmp_path / "models" / "snapshots" / "commit"
    shutil.copytree(tokenizer_folder, folder)
    held = (tmp_path / "models" / "blobs" if inside else tmp_path) / "key"
    held.parent.mkdir(exist_ok=True)
    held.write_text("private")
    (folder / "merges.txt").symlink_to(held)
    (tmp_path / "saved").mkdir()
    Tokenizer.load(folder).save(tmp_path / "saved")
    assert (tmp_path / "saved" / "merges.txt").exists() == inside and (tmp_path / "saved" / "tokenizer.json").exists()


def test_save_needs_no_source_any_more_and_leaves_no_other_tokenizers_files(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "source")
    loaded = Tokenizer.load(tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "last").mkdir()
    for name in "chat_template.jinja", "model.safetensors":
        (tmp_path / "last" / name).write_text("another model's")
    loaded.save(tmp_path / "last")
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == [
        "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.load(tmp_path / "last").encode("What is 12 + 30?") == loaded.encode("What is 12 + 30?")


def test_a_save_that_fails_leaves_the_files_that_were_there(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path / "t")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}

    def full_disk(path, content):
        with open(path, "wb") as file:
            file.write(content[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left.*t/tokenizer.json"):       # the copy, not the original
        tokenizer.save(tmp_path / "t")
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


def test_an_answer_ends_at_the_eos_token_and_at_what_either_config_names(tokenizer_folder, tmp_path):
    before = Tokenizer.load(tokenizer_folder).eos_ids
    shutil.copytree(tokenizer_folder, tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "t" / "config.json").write_text('{"eos_token_id": 23}')
    assert Tokenizer.load(tmp_path / "t").eos_ids == before | {23}              # as transformers' generate
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": 24}')
    assert Tokenizer.load(tmp_path / "t").eos_ids == before | {24}
    token = Tokenizer.load(tokenizer_folder).backend.id_to_token(25)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert Tokenizer.load(tmp_path / "t").eos_ids == before | {24, 25}


def test_save_keeps_the_template_and_a_generation_config_that_the_model_came_with(tokenizer_folder, tmp_path):
    folder = with_template(tokenizer_folder, tmp_path, QWEN2, apart=True)
    tokenizer = Tokenizer.load(folder)
    for stops in 7, [7], None:                              # a base model names <|endoftext|> only
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "temperature": 0.7}))
        ends = Tokenizer.load(folder)
        assert ends.eos_ids == tokenizer.eos_ids | ({7} if stops else set())    # answers end there too
        ends.save(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
            "pad_token_id": tokenizer.pad_id, "temperature": 0.7, "eos_token_id": sorted(ends.eos_ids)}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="generation_config.json: is not JSON"):
        Tokenizer.load(folder)
    assert Tokenizer.load(tmp_path / "out").chat([USER]) == rendered(QWEN2, [USER], False)


@pytest.mark.parametrize("content, complaint", [(None, "is missing; copy the tokenizer's files"),
                                                (b"{\"model\": ", "is damaged ("), (b"\xff\xfe", "is damaged (")])
def test_a_tokenizer_json_that_is_missing_or_damaged_is_named_in_one_line(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'tokenizer.json'}: {complaint}") and "\n" not in text


def test_for_a_tokenizer_in_the_older_files_the_error_names_the_fix(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: is missing; make it with transformers: AutoTokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_a_tokenizer_that_does_not_speak_chatml_is_refused_by_the_token_it_lacks(tokenizer_folder, tmp_path, token):
    text = (tokenizer_folder / "tokenizer.json").read_text("utf-8").replace(json.dumps(token), '"<|other|>"')
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    assert f"has no {token}" in str(caught.value)


@pytest.mark.parametrize("apart", [False, True])
def test_without_chatml_the_folders_own_template_and_end_token_serve(tokenizer_folder, tmp_path, apart):
    """DeepSeek-R1-Distill-Qwen's tokenizer is of this kind."""
    template = ("{{ bos_token }}{% for message in messages %}<|User|>{{ message.content }}{% endfor %}"
                "{% if add_generation_prompt %}<|Done|>{% endif %}")
    folder = with_template(tokenizer_folder, tmp_path, template, apart)
    text = (folder / "tokenizer.json").read_text("utf-8").replace('"<|im_end|>"', '"<|Done|>"')
    (folder / "tokenizer.json").write_text(text.replace('"<|endoftext|>"', '"<|bos|>"'), "utf-8")
    for eos in "<|Done|>", {"__type": "AddedToken", "content": "<|Done|>"}:
        config = {"eos_token": eos, "bos_token": "<|bos|>"} | ({} if apart else {"chat_template": template})
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.load(folder)
        (end,) = tokenizer.encode("<|Done|>")
        assert tokenizer.eos_ids == {end} and tokenizer.end_id == tokenizer.pad_id == end
        assert tokenizer.chat([USER], add_generation_prompt=True) == "<|bos|><|User|>Hi {{ there }}\n<|Done|>"
        tokenizer.save(tmp_path / "saved")
        assert Tokenizer.load(tmp_path / "saved").eos_ids == {end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|nowhere|>"}))
    with pytest.raises(InputError, match="has no <|im_end|>"):
        Tokenizer.load(folder)


# ---- a teacher's tokenizer

def test_a_teacher_with_another_tokenizer_is_refused_and_one_without_is_taken_on_trust(tokenizer_folder, tmp_path):
    mine = Tokenizer.load(tokenizer_folder)
    mine.check_same(tokenizer_folder)
    mine.check_same(tmp_path)
    raw = json.loads((tokenizer_folder / "tokenizer.json").read_text("utf-8"))
    raw["model"]["vocab"] = {{"a": "b", "b": "a"}.get(key, key): value for key, value in raw["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"differs from .*, first in '[ab]'"):
        mine.check_same(tmp_path)


def test_a_teacher_may_lack_added_tokens_but_have_none_of_its_own(tokenizer_folder, tmp_path):
    """Qwen2 lacks some of Qwen2.5's. QwQ has more, and would teach ids that the student's tokenizer cannot decode."""
    mine = Tokenizer.load(tokenizer_folder)
    raw = json.loads((tokenizer_folder / "tokenizer.json").read_text("utf-8"))

    def with_added(*names, **words) -> Path:
        folder = tmp_path / "-".join([*names, *words])
        folder.mkdir()
        added = [raw["added_tokens"][0] | {"content": name, "id": len(mine) + i} for i, name in enumerate(names)]
        (folder / "tokenizer.json").write_text(json.dumps(raw | {
            "added_tokens": raw["added_tokens"] + added, "model": raw["model"] | {"vocab": raw["model"]["vocab"] | words}}))
        return folder

    more = with_added("<tool>")
    assert Tokenizer.load(more).check_same(tokenizer_folder) == ["<tool>"]
    assert Tokenizer.load(with_added("<b>", "<a>")).check_same(tokenizer_folder) == ["<b>", "<a>"]      # by their ids
    with pytest.raises(InputError, match="first in '<tool>'"):
        mine.check_same(more)
    for other, first in ((with_added("<think>"), "<t(ool|hink)>"),              # the same id means another token
                         (with_added("<x>", "<tool>"), "<(x|tool)>")):          # the same token has another id
        with pytest.raises(InputError, match=f"first in '{first}'"):
            Tokenizer.load(more).check_same(other)
    with pytest.raises(InputError, match="differs from"):                       # one of ordinary text
        mine.check_same(with_added(newword=len(mine)))


# ---- the real tokenizer, where ../shared/data has it

@pytest.fixture(scope="module")
def qwen(shared):
    return Tokenizer.load(shared / "qwen2-tokenizer")


def test_the_real_tokenizer_gives_qwens_ids(qwen):
    assert len(qwen) == 151_665
    assert qwen.encode("Hello world!") == [9707, 1879, 0]
    assert (qwen.pad_id, qwen.end_id, qwen.eos_ids) == (151_643, 151_645, {151_643, 151_645})
    turn = qwen.encode(qwen.chat([USER], add_generation_prompt=True))
    assert turn[:3] == [151_644, 8948, 198] and turn[-3:] == [151_644, 77_091, 198]        # system, assistant


@pytest.mark.parametrize("at_once", [1, 50, 1 << 19])
def test_a_batch_is_its_texts_one_by_one_and_an_id_one_object(qwen, monkeypatch, at_once):
    monkeypatch.setattr("minikd.tokenizer.AT_ONCE", at_once)
    batch, again, none = (list(qwen.encode_batch(texts)) for texts in (TEXTS * 2, TEXTS, []))
    assert batch == [qwen.backend.encode(text, add_special_tokens=False).ids for text in TEXTS * 2] and none == []
    assert max(batch[0]) > 1000 and all(a is b for ids, others in zip(batch, again) for a, b in zip(ids, others))


def test_the_saved_real_tokenizer_is_transformers_own(qwen, tmp_path):
    transformers = pytest.importorskip("transformers")
    qwen.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "<|im_start|>user\n1234<|im_end|>\n", "  three  spaces   "]:
        assert qwen.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [151_643, 151_645]
