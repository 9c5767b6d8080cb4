"""The Python interface: one in, one out; lists in, lists out, in order; and every error one line that helps."""

import dataclasses
import io
import pickle
import threading
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

import blip2
from blip2.api.loading import DTYPES
from blip2.api.pipeline import Options
from blip2.encoded import EncodedImage
from blip2.errors import CheckpointError, ImageError, OptionError
from blip2.generation import GenerateOptions
from blip2.image import Reading
from tests import tiny


@pytest.fixture(scope="module")
def blip(any_model):
    return blip2.load(any_model)


def test_public_names():
    assert all(getattr(blip2, name) is not None for name in blip2.__all__)
    assert set(blip2.__all__) <= set(dir(blip2))
    with pytest.raises(AttributeError, match="Blip3"):
        _ = blip2.Blip3


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda blip, picture: blip.ask(picture, None), "None is not a text"),
        (lambda blip, picture: blip.ask(picture, b"is it?"), "b'is it\\?' is not a text"),
        (lambda blip, picture: blip.ask(picture, "how many?", choices=[1, 2]), "1 is not a text"),
        (lambda blip, picture: blip.ask(picture, "is it?", choices="yes"), "the choices are a single text"),
        (lambda blip, picture: blip.caption(picture, prompt=3), "3 is not a text"),
        (lambda blip, picture: blip.caption(picture, stop={"and"}), "stop is {'and'}"),
        (lambda blip, picture: blip.caption(picture, batch_size="3"), "batch_size is '3'"),
    ],
)
def test_what_is_no_text_is_said(opt_model, pictures, call, problem):
    with pytest.raises(OptionError, match=problem):
        call(blip2.load(opt_model), pictures[0])


@pytest.mark.parametrize(("labels", "problem"), [("cat", "a single text"), ([3], "3 is not a text"), (None, "no text")])
def test_labels_are_a_list(matching_model, pictures, labels, problem):
    with pytest.raises(OptionError, match=problem):
        blip2.load(matching_model).classify(pictures[0], labels)


def test_lists_tuples_and_numpy_do_as_well(opt_model, pictures):
    blip = blip2.load(opt_model)
    plain = blip.caption(pictures[0], num_beams=3, max_new_tokens=8)
    assert plain
    for stop in ([plain[2:4]], (plain[2:4],), plain[2:4]):
        found = blip.caption(pictures[0], num_beams=np.int64(3), max_new_tokens=8, stop=stop)
        assert plain[2:4] not in found
    as_list, as_tuple = (blip.ask(pictures[0], "is it?", choices=kind(("yes", "no"))) for kind in (list, tuple))
    assert as_list == as_tuple


def test_options_are_those_of_the_engine():
    assert list(Options.__annotations__) == [field.name for field in dataclasses.fields(GenerateOptions)]
    assert get_type_hints(Options) == get_type_hints(GenerateOptions)


# ---- shapes of what comes back ------------------------------------------------------------------------


def test_captions(blip, pictures):
    one = blip.caption(pictures[0])
    assert isinstance(one, str)
    several = blip.caption(pictures)
    assert several[0] == one
    assert len(set(several)) > 2  # the tiny model does look
    assert blip.caption([pictures[0]]) == [one]
    assert blip.caption([]) == []
    assert blip.caption(pictures[0], prompt="a photo of") == blip.caption(pictures[0], prompt=" a photo of\n")


def test_alone_or_in_company_the_same(blip, pictures):
    alone = [blip.caption(picture) for picture in pictures]
    for batch_size in (1, 3, 8):
        assert blip.caption(pictures, batch_size=batch_size) == alone
    assert blip.caption(pictures[::-1]) == alone[::-1]
    asked = [blip.ask(picture, f"what is {number}?") for number, picture in enumerate(pictures)]
    assert blip.ask(pictures, [f"what is {number}?" for number in range(8)], batch_size=3) == asked


def test_several_captions(blip, pictures):
    three = blip.caption(pictures[0], num_captions=3)
    assert len(three) == 3
    assert three[0] == blip.caption(pictures[0])
    assert blip.caption(pictures[:2], num_captions=3)[0] == three
    sampled = {"sample": True, "seed": 1, "num_captions": 4}
    assert blip.caption(pictures[0], **sampled) == blip.caption(pictures[0], **sampled)
    assert len(blip.caption(pictures[0], num_captions=7)) == 7


def test_questions(blip, pictures):
    questions = ["how many dogs?", "is it red?", "where is the car, and is it a large one?"]
    one = blip.ask(pictures[0], questions[0])
    assert isinstance(one, str)
    assert blip.ask(pictures[0], questions)[0] == one
    assert blip.ask(pictures[:3], questions[0])[0] == one
    assert blip.ask(pictures[:3], questions) == [blip.ask(*pair) for pair in zip(pictures, questions, strict=False)]
    assert blip.ask([pictures[0]], [questions[0]]) == [one]
    with pytest.raises(OptionError, match="2 images and 3 texts"):
        blip.ask(pictures[:2], questions)


def test_an_answer_never_has_the_question(blip, pictures):
    assert "Question:" not in blip.ask(pictures[0], "how many dogs?", max_new_tokens=3)


def test_choices(blip, pictures):
    ranked = blip.rank(pictures[0], "is it red?", ["yes", "no", "perhaps"])
    assert sorted(choice.text for choice in ranked) == ["no", "perhaps", "yes"]
    assert sum(choice.probability for choice in ranked) == pytest.approx(1)
    assert blip.ask(pictures[0], "is it red?", choices=["yes", "no", "perhaps"]) == ranked[0].text
    rows = blip.rank(pictures[:2], "is it red?", ["yes", "no", "perhaps"])
    assert [choice.text for choice in rows[0]] == [choice.text for choice in ranked]
    assert blip.ask(pictures[:2], "is it red?", choices=("yes", "no")) == [
        blip.ask(picture, "is it red?", choices=("yes", "no")) for picture in pictures[:2]
    ]
    with pytest.raises(OptionError, match="num_beams has no effect with choices"):
        blip.ask(pictures[0], "is it red?", choices=["yes", "no"], num_beams=2)


def test_details(blip, pictures):
    [[answer], [_]] = blip.each_caption(pictures[:2])
    assert answer.text == blip.caption(pictures[0])
    assert answer.finish_reason in ("eos", "length")
    assert 0 < len(answer.tokens) <= blip.speaker.defaults.caption.max_new_tokens
    assert answer.score < 0


def test_chat(blip, pictures):
    chat, other = blip.chat(pictures[0], max_new_tokens=8), blip.chat(blip.encode(pictures[0]), max_new_tokens=8)
    for question in ("what is there?", "where?"):
        assert chat.say(question) == "".join(other.stream(question))
    assert len(chat.history) == 2
    assert "pipeline" in repr(blip).lower()


@pytest.mark.parametrize("task", ["caption", "ask"])
def test_the_reference_writes_the_same(blip, any_model, pictures, task):
    """From the image's file to the text: the paper's settings, given by hand to the reference."""
    if blip.speaker.model.config.reads_prompt:
        pytest.skip("an InstructBLIP is compared in tests/parity/test_instruct.py")
    transformers = pytest.importorskip("transformers")
    processors = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    reference = transformers.Blip2ForConditionalGeneration.from_pretrained(any_model).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(any_model / "tokenizer.json"))
    processor = processors.BlipImageProcessorPil(size={"height": 32, "width": 32})
    config = blip.speaker.model.config
    if task == "caption":
        ours = blip.caption(pictures)
        prompt, settings = "", {"max_new_tokens": 30, "length_penalty": 1.0}
    else:
        ours = blip.ask(pictures, "is it red?")
        prompt = f"Question: is it red? {'Short answer:' if config.language.has_encoder else 'Answer:'}"
        settings = {"max_new_tokens": 10, "length_penalty": -1.0}
    image_ids = torch.full((1, config.qformer.num_query_tokens), config.image_token_id)
    ids = torch.cat([image_ids, tokenizer(prompt, return_tensors="pt").input_ids], dim=1)
    theirs = []
    for picture in pictures:
        [tokens] = reference.generate(
            pixel_values=processor(Image.open(picture), return_tensors="pt").pixel_values,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=5,
            min_new_tokens=1,
            do_sample=False,
            suppress_tokens=[config.image_token_id],
            **settings,
        )
        new = tokens if config.language.has_encoder else tokens[ids.shape[1] :]
        theirs.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert ours == theirs


# ---- images -----------------------------------------------------------------------------------------


def test_sources(blip):
    image = tiny.picture(3)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    array = np.asarray(image)
    sources = [image, buffer.getvalue(), array, torch.from_numpy(array.copy()).permute(2, 0, 1), blip.encode(image)]
    assert len(set(blip.caption(sources))) == 1
    assert len({blip.caption(source) for source in sources}) == 1


def test_seen_once(blip, pictures, monkeypatch):
    seen = blip.encode(pictures[:2])
    shape = blip.speaker.model.config.kept_shape
    assert all(isinstance(image, EncodedImage) and image.queries_QD.shape == shape for image in seen)
    assert not seen[0].queries_QD.requires_grad
    expected = blip.caption(pictures[:2])
    calls = []
    encode = blip.speaker.model.encode
    monkeypatch.setattr(blip.speaker.model, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    assert blip.caption(seen) == expected
    assert blip.encode(seen) == seen
    assert calls == []
    blip.ask(pictures[0], ["is it?", "how many?", "where?"], batch_size=2)
    assert calls == [1]


def test_only_two_batches_of_pictures_in_memory(blip, monkeypatch):
    read = []
    pixels = Reading.pixels
    monkeypatch.setattr(Reading, "pixels", lambda *arguments, **options: read.append(arguments) or pixels(
        *arguments, **options))  # fmt: skip
    images = [tiny.picture(seed) for seed in range(20)]
    before = set(threading.enumerate())
    results = blip.each_caption(images, batch_size=4, max_new_tokens=2, num_beams=1)
    next(results)
    assert len(read) <= 8
    started = set(threading.enumerate()) - before
    assert started
    results.close()
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)


def test_a_broken_picture(blip, pictures, tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(b"not a picture")
    images = [pictures[0], broken, pictures[1], missing]
    with pytest.raises(ImageError, match=r"broken\.png: not a"):
        blip.caption(images)
    for texts in (blip.caption(images, on_error="return"), blip.ask(images, "is it?", on_error="return")):
        assert [isinstance(text, ImageError) for text in texts] == [False, True, False, True]
        assert "missing.png: no such file" in str(texts[3])
    assert blip.caption(images, on_error="return")[2] == blip.caption(pictures[1])
    assert isinstance(blip.caption(missing, on_error="return"), ImageError)
    assert all(isinstance(row, ImageError) for row in blip.caption([missing, broken], on_error="return"))
    assert all(isinstance(row, ImageError) for row in blip.ask(missing, ["a?", "b?"], on_error="return"))
    with pytest.raises(ImageError):
        blip.ask(missing, ["a?", "b?"])
    with pytest.raises(ImageError):
        blip.encode(images)
    ranked = blip.rank(images, "is it?", ["a", "b"], on_error="return")
    assert [isinstance(row, ImageError) for row in ranked] == [False, True, False, True]
    with pytest.raises(OptionError, match="'ignore'; use 'raise' or 'return'"):
        blip.caption(images, on_error="ignore")


# ---- what cannot be -----------------------------------------------------------------------------------


def test_options_that_are_none(blip, pictures):
    with pytest.raises(OptionError, match="did you mean num_beams"):
        blip.caption(pictures[0], num_beam=3)
    with pytest.raises(OptionError, match="did you mean max_new_tokens"):
        blip.each_answer(pictures[0], "is it?", max_new_token=3)
    with pytest.raises(OptionError, match="batch_size is 0"):
        blip.caption(pictures[0], batch_size=0)
    with pytest.raises(OptionError, match="the question is empty"):
        blip.each_answer(pictures, ["is it?"] * 7 + [""])


def test_loading_reports_the_bytes_of_weights(any_model):
    heard = []
    blip2.load(any_model, progress=lambda *sizes: heard.append(sizes))
    done, totals = zip(*heard, strict=True)
    [total] = set(totals)
    assert list(done) == sorted(set(done)) and 0 < done[0] < total == done[-1]
    on_disk = sum(path.stat().st_size for path in any_model.glob("*.safetensors"))
    assert 0.9 * on_disk < total <= on_disk


def test_no_such_model(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        blip2.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        blip2.load(tmp_path)


def test_what_is_there_decides(matching_model, opt_model):
    assert isinstance(blip2.load(matching_model), blip2.Matcher)
    assert isinstance(blip2.load(opt_model), blip2.Pipeline)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_no_such_device(opt_model, device):
    with pytest.raises(OptionError, match=r"device .* cannot be used") as caught:
        blip2.load(opt_model, device=device)
    assert "\n" not in str(caught.value)


def test_precision(opt_model, pictures):
    assert isinstance(blip2.load(opt_model, dtype="bfloat16").caption(pictures[0]), str)
    with pytest.raises(OptionError, match="float16 is not supported on a CPU"):
        blip2.load(opt_model, device="cpu", dtype="float16")
    with pytest.raises(OptionError, match="dtype 'half' is not a precision"):
        blip2.load(opt_model, dtype="half")
    assert all(getattr(torch, name) is dtype for name, dtype in DTYPES.items())


# ---- which images are read, and copies --------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt_model", "matching_model"])
def test_what_is_read_is_said_at_load(request, pictures, name):
    folder = request.getfixturevalue(name)
    with open(pictures[0], "rb") as file:
        buffer = io.BytesIO()
        Image.open(file).convert("RGB").save(buffer, "JPEG")
    cut = buffer.getvalue()[:-2]
    strict, lenient = blip2.load(folder), blip2.load(folder, allow_truncated=True, max_pixels=100_000)
    with pytest.raises(ImageError, match="allow_truncated=True"):
        strict.encode(cut)
    assert type(lenient.encode(cut)) is type(strict.encode(buffer.getvalue()))
    with pytest.raises(ImageError, match="320x320 is more than 100,000 pixels"):
        lenient.encode(Image.new("RGB", (320, 320)))
    with pytest.raises(OptionError, match="max_pixels is 0"):
        blip2.load(folder, max_pixels=0)


def test_a_pipeline_can_be_pickled_and_answers_the_same(blip, pictures):
    again = pickle.loads(pickle.dumps(blip))
    assert again.caption(pictures[:2]) == blip.caption(pictures[:2])
    assert (again.name, again.speaker.identity) == (blip.name, blip.speaker.identity)


def test_a_matcher_can_be_pickled_and_sees_the_same(matching_model, pictures):
    matcher = blip2.load(matching_model)
    again = pickle.loads(pickle.dumps(matcher))
    assert torch.equal(again.embed_images(pictures[:2]), matcher.embed_images(pictures[:2]))
    assert again.identity == matcher.identity
