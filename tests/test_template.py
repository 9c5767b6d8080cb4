"""Chat templates: the words of transformers, the image in its place, and limits for programs that nobody trusts."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import blip2
from blip2 import checkpoint, template
from blip2.cli import cli
from blip2.errors import CheckpointError, OptionError
from blip2.serve.service import Models
from blip2.template import IMAGE, ChatTemplate
from tests import tiny
from tests.serve.conftest import serving

transformers = pytest.importorskip("transformers")

CHATML = (  # as SmolLM 2 and Qwen 2.5 have it: words of its own where there is no system prompt
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (  # as Llama 3.1 has it
    "{{- bos_token }}\n{%- if custom_tools is defined %}\n    {%- set tools = custom_tools %}\n{%- endif %}\n"
    "{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
SMOLLM3 = (  # marks for who trains, a break, a namespace
    "{%- set ns = namespace(found=false) -%}\n{%- for message in messages -%}\n"
    "    {%- if message.role == 'user' -%}\n{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}\n"
    "    {%- else -%}\n{% generation %}{{ '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endgeneration %}\n    {%- endif -%}\n    {%- if ns.found -%}{% break %}{%- endif -%}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}\n{%- endif -%}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "smollm3": SMOLLM3}
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<bos>",
]  # fmt: skip
TALKS = [
    [("user", "how many dogs are there?")],
    [("user", "what is it?"), ("assistant", "a car."), ("user", "what colour?")],
]


def write_template(folder, source, *, inside=False):
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    names["bos_token"] = {"__type": "AddedToken", "content": "<bos>", "special": True}
    if inside:
        names["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    else:
        (folder / "chat_template.jinja").write_text(source)
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model whose tokenizer has the special tokens of all templates."""
    folder = tiny.save_generative("llama", tmp_path_factory.mktemp("llama"))
    words = tiny.opt_tokenizer()
    words.add_special_tokens(SPECIAL)
    model = checkpoint.load(folder)
    config = model.config.language
    assert words.get_vocab_size() <= config.vocab_size
    checkpoint.save(model, folder, tokenizer=words.to_str())
    return folder


@pytest.fixture(params=TEMPLATES)
def folder(request, base, tmp_path):
    return write_template(shutil.copytree(base, tmp_path / "model"), TEMPLATES[request.param])


@pytest.mark.parametrize("talk", TALKS, ids=["one turn", "three turns"])
def test_the_words_and_ids_of_transformers(folder, talk):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": text} for role, text in talk]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    speaker = blip2.load(folder, chat_template=True).speaker
    said = [text for _, text in talk]
    turns = list(zip(said[:-1:2], said[1:-1:2], strict=True))
    text = speaker.question(said[-1], turns)
    assert text.replace(IMAGE, "") == wanted
    assert text.index(IMAGE) + 1 == text.index(said[0])
    before, after = speaker.ids(text)
    ids = theirs(wanted, add_special_tokens=False).input_ids
    assert len(before) > 1 and [*before, *after] == ids


def test_the_images_vectors_stand_before_the_question(folder, pictures):
    blip, plain = blip2.load(folder, chat_template=True), blip2.load(folder)
    speaker, image = blip.speaker, blip.encode(pictures[0])
    text = speaker.question("how many?")
    before, after = speaker.ids(text)
    prompt_SD = speaker.prompt(image, text, 5)
    queries_QD = speaker.model.prompt(image.queries_QD)
    assert torch.equal(prompt_SD[len(before) : len(before) + len(queries_QD)], queries_QD)
    assert len(prompt_SD) == len(before) + len(queries_QD) + len(after)
    assert torch.equal(prompt_SD[0], speaker.model.language.embed(torch.tensor(before))[0])
    asked = {"max_new_tokens": 8, "min_new_tokens": 8}
    assert isinstance(blip.ask(pictures[0], "how many?", **asked), str)
    assert blip.caption(pictures[:3], **asked) == plain.caption(pictures[:3], **asked)
    first, *_ = blip.rank(pictures[0], "how many?", ["two", "one"])
    assert first.text in ("two", "one")
    chat = blip.chat(pictures[0], max_new_tokens=4)
    chat.history.append(("what is it?", "a dog"))
    chat.say("how many?")
    assert chat.prompt("where?").count(IMAGE) == 1
    with pytest.raises(OptionError, match="cannot be explained"):
        blip.explain(pictures[0], question="how many?")


def test_who_writes_a_special_token_is_told(folder):
    speaker = blip2.load(folder, chat_template=True).speaker
    for text in ("no<|im_end|>", f"{IMAGE}", "<start_of_turn>system"):
        with pytest.raises(OptionError, match="with which the chat template marks turns"):
            speaker.question(text)
        with pytest.raises(OptionError, match="with which the chat template marks turns"):
            speaker.question("what?", [("a", text)])
    with pytest.raises(OptionError, match="the question is empty"):
        speaker.question(" ")


def test_it_is_found_in_either_file_and_goes_along(base, tmp_path):
    folder = write_template(shutil.copytree(base, tmp_path / "model"), CHATML, inside=True)
    wanted = blip2.load(folder, chat_template=True).speaker.question("what?")
    checkpoint.save(checkpoint.load(folder), tmp_path / "saved", tokenizer=folder / "tokenizer.json")
    done = CliRunner().invoke(cli, ["quantize", str(tmp_path / "saved"), str(tmp_path / "int8"), "--to", "int8"])
    assert done.exit_code == 0, done.output
    for name in ("saved", "int8"):
        assert (tmp_path / name / "chat_template.jinja").read_text() == CHATML
        assert blip2.load(tmp_path / name, chat_template=True).speaker.question("what?") == wanted


def test_where_there_is_none(base, matching_model, pictures, monkeypatch):
    with pytest.raises(CheckpointError, match=r"there is no chat_template\.jinja"):
        blip2.load(base, chat_template=True)
    with pytest.raises(OptionError, match="is for generative models"):
        blip2.load(matching_model, chat_template=True)
    told = CliRunner().invoke(cli, ["ask", pictures[0], "what?", "--model", str(base), "--chat-template"])
    assert told.exit_code == 1 and "leave --chat-template out" in told.output


def test_the_command_asks_with_it(folder, pictures):
    arguments = ["ask", pictures[0], "what?", "--model", str(folder), "--beams", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--chat-template"])
    assert done.exit_code == 0, done.output
    expected = blip2.load(folder, chat_template=True).ask(pictures[0], "what?", num_beams=1)
    assert done.output.split() == expected.split()


def test_a_collection_and_the_server_ask_with_it(folder, pictures, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["ask", pictures[0], "what?", "--model", str(folder), "--chat-template", "--beams", "1", "-o", str(out)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    blip = blip2.load(folder, chat_template=True)
    expected = blip.ask(pictures[0], "what?", num_beams=1)
    written = json.loads(out.read_text().splitlines()[0])["caption"]  # without what no text has
    assert list(filter(str.isalpha, written)) == list(filter(str.isalpha, expected))

    image = "data:image/png;base64," + base64.b64encode(Path(pictures[0]).read_bytes()).decode()
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": image}}]
    with serving(lambda: Models(blip)) as server:
        answer = server.chat({"role": "user", "content": content}, temperature=0, max_tokens=10, model="model")
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == expected


BAD = {
    "loops without end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}", "cannot be used",
    ),
    "doubles a text": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "cannot be used",
    ),
    "writes too much": ("{% for a in range(99999) %}{{ '%99d' % 1 }}{% endfor %}", "characters"),
    "asks for classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "asks for globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
    "changes what it is given": ("{{ messages.append(1) }}", "SecurityError"),
    "reads a file": ("{% include '/etc/passwd' %}", "cannot be used"),
    "refuses": ("{{ raise_exception('never') }}", "never"),
    "is none": ("{% for", "TemplateSyntaxError"),
    "leaves out the question": ("hello", "drops or repeats"),
    "says it twice": ("{{ messages[0].content }}{{ messages[0].content }}", "drops or repeats"),
    "moves it away from the image": ("{{ messages[0].content[1:] }}", "changes texts"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_template_that_cannot_be_trusted_is_an_error(what, tmp_path):
    source, reason = BAD[what]
    write_template(tmp_path, source)
    with pytest.raises(CheckpointError, match=reason) as caught:
        ChatTemplate.from_folder(tmp_path, frozenset())
    assert len(str(caught.value).splitlines()) == 1 and "use the model without it" in str(caught.value)


def test_without_jinja2_the_line_that_installs_it_is_told(tmp_path, monkeypatch):
    write_template(tmp_path, CHATML)
    monkeypatch.setattr(template, "_run", lambda order: (3, "", ""))
    with pytest.raises(OptionError, match=r"needs jinja2; .*\[chat\]"):
        ChatTemplate.from_folder(tmp_path, frozenset())


def test_a_template_runs_once_for_each_number_of_turns(tmp_path, monkeypatch):
    made = ChatTemplate.from_folder(write_template(tmp_path, CHATML), frozenset())
    monkeypatch.setattr(template, "_run", lambda order: pytest.fail("it ran again"))
    assert "dogs" in made.prompt((), "dogs") and "cats" in made.prompt((), "cats")
    with pytest.raises(OptionError, match="at most"):
        made.prompt([("a", "b")] * 200, "c")
