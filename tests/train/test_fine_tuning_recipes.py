"""The recipes of fine-tuning in the repository, what is drawn for them, and what cannot be, in one line."""

import json
import random
from pathlib import Path

import pytest
import torch

import blip2
from blip2 import checkpoint, tensorfile, train
from blip2.data import Row, read_rows
from blip2.data.joined import Joined, Listed
from blip2.data.sample import Turn, parse_row
from blip2.errors import RecipeError
from blip2.text import Tokenizer
from blip2.train import load_recipe, overfit, preview
from blip2.train.check import gather
from blip2.train.recipes import DataRecipe, MixRecipe
from blip2.train.start import build
from blip2.train.texts import TextSource
from tests import tiny
from tests.train.test_finetuning import save_model

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = ("caption", "vqa", "retrieval", "instruct")
SMALL = {
    "optim.steps": 2, "optim.batch_size": 4, "optim.warmup_steps": 1, "data.max_prompt_tokens": 64,
    "data.max_text_tokens": 32, "threads": 1, "precision": "fp32",
}  # fmt: skip


@pytest.fixture
def example(rows, tmp_path):
    """``example(name)``: the path of a copy of that recipe, beside what it names."""

    def copy(name):
        path = tmp_path / f"{name}.toml"
        path.write_text((EXAMPLES / f"{name}.toml").read_text())
        (tmp_path / "data").mkdir(exist_ok=True)
        for file in ("train", "held_out"):
            (tmp_path / "data" / f"{file}.jsonl").write_text(rows.read_text())
        save_model("opt", tmp_path / "runs" / "stage2")
        save_model("matching", tmp_path / "runs" / "stage1")
        return path

    return copy


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_the_papers(name):
    recipe = load_recipe(EXAMPLES / f"{name}.toml")
    optim = recipe.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.peak_lr, optim.min_lr) == (0.9, 0.999, 0.05, 1e-5, 0)
    assert recipe.stage == (1 if name == "retrieval" else 2)
    assert (recipe.vision is not None and recipe.vision.learns) == (name != "instruct")
    assert (recipe.text_branch is not None) == (name in ("vqa", "instruct"))
    assert recipe.data.augment == (name != "instruct")
    told = (EXAMPLES / f"{name}.toml").read_text()
    for value in {"caption": ["(364)", "(256)", "11_069"], "vqa": ["(490)", "(128)", "(0.95 / 0.9 / 0.95)"],
                  "retrieval": ["(364)", "(224)", "(1 / 0.95"], "instruct": ["(192 / 128 / 64)", "(60_000)"]}[name]:
        assert value in told  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_carried_out(example, name):
    """Told beforehand, then trained for two steps, into a folder that loads."""
    path = example(name)
    text = "\n".join(preview(path, overrides=SMALL).lines())
    assert "the first batch:" in text and not (path.parent / "runs" / name).exists()
    out = train.run(path, overrides=SMALL)
    assert (out / "training").is_dir()
    size = 32 if name == "instruct" else load_recipe(path).vision.image_size
    config = checkpoint.read_config(out)
    assert config.vision.image_size == size
    if name != "retrieval":
        assert config.reads_prompt == (name in ("vqa", "instruct"))
        assert isinstance(blip2.load(out).ask(tiny.picture(1), "what colour is the car?", max_new_tokens=3), str)


def test_answers_are_drawn_as_often_as_people_gave_them(opt_model):
    row = parse_row({"image": "a.png", "question": "what colour?", "answers": {"red": 6, "orange": 3, "coral": 1}})
    tokenizer, config = Tokenizer.from_folder(opt_model), checkpoint.read_config(opt_model).language
    source = TextSource(tokenizer, config, DataRecipe(rows=(), question_prompt="Q: {} A:"))
    drawn = [source.draw(row, 1, random.Random(seed))[0] for seed in range(2000)]
    assert {tokenizer.decode(text.prompt_ids) for text in drawn} == {"Q: what colour? A:"}
    said = [tokenizer.decode(text.target_ids) for text in drawn]
    for answer, share in (("red", 0.6), ("orange", 0.3), ("coral", 0.1)):
        assert said.count(answer) / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"red": 0}, "'answers': 'red' has the count 0, but it has to be a number above 0"),
        ({"red": "many"}, "'answers': 'red' has the count 'many'"),
        ({"red": None}, "'answers': 'red' has the count None"),
        ([], "'answers' has to be a list of texts or {text: count}, not []"),
        ("red", "'answers' has to be a list of texts or {text: count}, not 'red'"),
    ],
)
def test_answers_without_counts_are_told(tmp_path, answers, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "what colour?", "answers": answers}) + "\n")
    with pytest.raises(RecipeError) as raised:
        read_rows([path], None)
    assert problem in str(raised.value) and "rows.jsonl:1" in str(raised.value) and "\n" not in str(raised.value)


def test_the_qformer_reads_what_the_language_model_reads(tmp_path):
    """The question in its words, the turns before it, the instruction of a caption; and of what is cut the rest."""
    folder = tiny.save_instructed("llama", tmp_path / "instructed")
    config = checkpoint.read_config(folder)
    tokenizer, reader = Tokenizer.from_folder(folder), Tokenizer.from_folder(folder / "qformer_tokenizer")
    turns = (Turn("is there a car?", "yes"), Turn("where is it?", "left"))
    row = Row("a.png", ("a red car",), (Turn("how many dogs?", "two"),), (turns,))

    def read(**recipe):
        source = TextSource(tokenizer, config.language, DataRecipe(rows=(), **recipe), (reader, config.qformer))
        texts = [text for seed in range(40) for text in source.draw(row, 1, random.Random(seed))]
        for text in texts:
            assert list(text.read_ids) == reader.instruction_ids(tokenizer.decode(text.prompt_ids), config.qformer)
        return {(text.kind, tokenizer.decode(text.prompt_ids)) for text in texts}

    history = "dialog history: Question: is there a car? Answer: yes.\nwhere is it?"
    assert read() == {
        ("caption", "A short image caption."), ("question", "how many dogs?"), ("dialogue", "is there a car?"),
        ("dialogue", history),
    }  # fmt: skip
    assert ("dialogue", "where is it?") in read(max_prompt_tokens=len(tokenizer.encode(history)) - 5)
    assert read(mix=MixRecipe(0, 1, 0), question_prompt="{}?!") == {("question", "how many dogs??!")}
    assert read(mix=MixRecipe(1, 0, 0), caption_prompt="a photo of") == {("caption", "a photo of")}


def test_rows_of_collections_know_their_pictures():
    """The same file, or the same content within others, is the same image; whatever it is called."""
    rows = [Row("a.png", ("one",)), Row("b.png", ("two",)), Row("a.png", ("three",))]
    held = [Row(f"x/{number}", ("four",), content=content) for number, content in enumerate((b"1", b"2", b"1"))]
    joined = Joined([Listed(rows), Listed(held)], [1.0, 1.0])
    shown = [joined.shown(number) for number in range(6)]
    assert shown[0] == shown[2] and shown[3] == shown[5] and len(set(shown)) == 4
    assert all(0 <= each < 2**63 for each in shown) and joined[3].content is None


def test_rows_of_one_picture_in_a_collection_are_no_negatives(rows, tmp_path, matching_model, monkeypatch):
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:4]]
    twice = [{"image": line["image"], "caption": text} for line in lines for text in line["captions"]]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(each) + "\n" for each in twice))
    seen = []
    plain = train.stage1.draw_negatives

    def note(logits_NB, equal_NB, own_N, chance_N):
        seen.append(equal_NB.sum().item())
        return plain(logits_NB, equal_NB, own_N, chance_N)

    monkeypatch.setattr(train.stage1, "draw_negatives", note)
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'stage = 1\nstart = "{matching_model}"\nout = "out"\nprecision = "fp32"\nthreads = 1\n'
        '[data]\nsources = "twice.jsonl"\n[optim]\nsteps = 1\nbatch_size = 8\n'
    )
    train.run(path)
    assert seen == [16, 16]


def test_without_captions_only_contrast_and_matching_are_learnt(example):
    path = example("retrieval")
    out = train.run(path, overrides=SMALL | {"optim.itg": False})
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-2])
    assert line["itc"] > 0 and line["itm"] > 0 and "lm" not in line
    before, after = (checkpoint.load(folder).state_dict() for folder in (path.parent / "runs" / "stage1", out))
    assert torch.equal(before["lm_head.dense.weight"], after["lm_head.dense.weight"])
    assert not torch.equal(before["itm_head.weight"], after["itm_head.weight"])
    verdict = overfit(path, 4, report=lambda _: None, overrides=SMALL | {"optim.itg": False})
    assert verdict.last == pytest.approx(verdict.scores["itc"] + verdict.scores["itm"]) and verdict.first < 10


def test_contrast_alone(example):
    path = example("retrieval")
    out = train.run(path, overrides=SMALL | {"optim.itg": False, "optim.itm": False})
    line = json.loads((out / "log.jsonl").read_text().splitlines()[-2])
    assert line["itc"] > 0 and not {"itm", "lm"} & line.keys()
    before, after = (checkpoint.load(folder).state_dict() for folder in (path.parent / "runs" / "stage1", out))
    for name in ("lm_head.dense.weight", "itm_head.weight"):
        assert torch.equal(before[name], after[name])
    for name in ("qformer.query_tokens", "vision_projection.weight"):
        assert not torch.equal(before[name], after[name])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_learns_begins_with_all_its_digits(example, precision):
    """Though the frozen parts may be kept in half precision."""
    recipe, path = load_recipe(example("vqa"), SMALL), example("vqa")
    model = build(recipe, path, gather(recipe, path), device=torch.device("cpu"), dtype=torch.bfloat16)
    stored = checkpoint.load(path.parent / "runs" / "stage2")
    assert torch.equal(model.vision.blocks[0].qkv.weight, stored.vision.blocks[0].qkv.weight)
    assert model.language.dtype == torch.bfloat16
    out = train.run(path, overrides=SMALL | {"precision": precision})
    assert all(each.dtype == torch.float32 for each in checkpoint.load(out).vision.state_dict().values())


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("caption", {"vision.learn": True}, "vision.learn: is not a key of recipes; did you mean vision.learns?"),
        ("caption", {"vision.learns": 1}, "vision.learns: has to be true or false, not 1"),
        ("caption", {"data.features": "f"}, "data.features: needs a frozen image encoder, but this recipe trains it"),
        ("caption", {"vision.learns": False, "data.features": "f"}, "data.augment: crops images differently"),
        ("caption", {"vision.layer_decay": 0}, "vision.layer_decay: has to be above 0 and at most 1, not 0"),
        ("caption", {"vision.layer_decay": 1.5}, "vision.layer_decay: has to be above 0 and at most 1, not 1.5"),
        ("vqa", {"vision.learns": False}, "vision.layer_decay: needs a trained image encoder; set vision.learns"),
        ("caption", {"vision.image_size": 0}, "vision.image_size: has to be at least 1, not 0"),
        ("caption", {"vision.image_size": 37.5}, "vision.image_size: has to be a whole number, not 37.5"),
        ("caption", {"vision.image_size": 390}, "set it to 384 or 400"),
        ("caption", {"lora.rank": 4}, "vision.learns: changes the model that the adapters belong to, but only the"),
        ("instruct", {"lora.rank": 4}, "text_branch: changes the model that the adapters belong to"),
        ("instruct", {"text_branch": "runs/stage2"}, "is not a matching model; name the result of stage 1"),
        ("instruct", {"text_branch": "runs/none"}, "text_branch: there is no folder"),
        ("instruct", {"out": "runs/stage1"}, "is also the folder of 'text_branch', which would be overwritten"),
        ("vqa", {"data.question_prompt": "Question:"}, "data.question_prompt: has to contain {} exactly once"),
        ("retrieval", {"text_branch": "runs/stage1"}, "text_branch: belongs to stage 2, but this recipe is for"),
        ("retrieval", {"data.question_prompt": "{}"}, "data.question_prompt: belongs to stage 2"),
        ("caption", {"optim.itg": False}, "optim.itg: belongs to stage 1, but this recipe is for stage 2; remove it"),
        ("caption", {"optim.itm": False}, "optim.itm: belongs to stage 1, but this recipe is for stage 2; remove it"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(example, name, changes, problem):
    with pytest.raises(RecipeError) as raised:
        preview(example(name), overrides=SMALL | changes)
    assert problem in str(raised.value) and "\n" not in str(raised.value)


def test_a_text_branch_of_another_make_is_told(example, tmp_path):
    path = example("instruct")
    model = checkpoint.load(path.parent / "runs" / "stage1")
    other = tmp_path / "other"
    checkpoint.save(model, other, tokenizer=path.parent / "runs" / "stage1" / "tokenizer.json")
    config = json.loads((other / "config.json").read_text())
    config["qformer_config"]["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="differs from that of 'start' in num_layers; name the result of stage 1"):
        preview(path, overrides=SMALL | {"text_branch": str(other)})
    start = tiny.save_instructed("t5", tmp_path / "instructed")
    with pytest.raises(RecipeError, match="is an InstructBLIP and already has a text branch; remove"):
        preview(path, overrides=SMALL | {"start": str(start)})


def test_a_state_of_before_goes_on(write_recipe, opt_model):
    """Saved when recipes did not know of image encoders that learn."""
    path = write_recipe(2, opt_model)
    out = train.run(path, overrides={"optim.steps": 4})
    state = out / "training" / "state.safetensors"
    tensors, about = tensorfile.load(state)
    facts = json.loads(about["recipe"])
    for name in ("vision", "text_branch", "optim.itg", "optim.itm", "data.question_prompt"):
        del facts[name]
    tensorfile.save(state, tensors, about | {"recipe": json.dumps(facts)}, unfinished=state.with_suffix(".part"))
    train.run(path, overrides={"optim.steps": 6})
    with pytest.raises(RecipeError, match=r"was saved with vision\.learns = None, but the recipe has False"):
        train.run(path, overrides={"optim.steps": 7, "vision.image_size": 48, "data.features": "other"})
