"""Each fine-tuning of the paper against itself written out plainly (`finetuned`), and on several processes."""

import json
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file

from blip2 import checkpoint, train
from blip2.config import CLIP_MEAN, CLIP_STD
from blip2.image import load_image, to_pixels
from blip2.model import Blip2, Blip2Matcher
from blip2.train import overfit, preview, stage1
from tests import tiny
from tests.train import finetuned
from tests.train.conftest import COLOURS
from tests.train.processes import in_processes
from tests.train.test_distributed import assert_same, gradients

SIZE, LAYERS = 48, 3
LEARNING = f"""
            [vision]
            learns = true
            layer_decay = {finetuned.DECAY}
            image_size = {SIZE}
"""
ADAPTED = """
            [lora]
            parts = ["vision"]
            rank = 2
            dropout = 0.2
"""
TASKS = ("caption", "vqa", "asked", "instruct", "retrieval")


def deeper(config, dropout):
    """With more blocks in the image encoder."""
    vision, qformer = replace(config.vision, num_layers=LAYERS), replace(config.qformer, dropout=dropout)
    return replace(config, vision=vision, qformer=qformer)


@torch.no_grad()
def save_model(kind, folder, dropout=0.0):
    """A random model, "opt", "t5" or "matching", in which everything matters, in the published layout."""
    like = tiny.save_matching(folder) if kind == "matching" else tiny.save_generative(kind, folder)
    source = checkpoint.load(like)
    config = deeper(source.config, dropout)
    model = (Blip2Matcher if kind == "matching" else Blip2)(config).eval()
    torch.manual_seed(4)  # with some others a ReLU of the OPT comes to lie on its edge, and both go on differently
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.startswith("language."):
            weight.normal_(std=0.3)
    if kind != "matching":
        model.language.load_state_dict(source.language.state_dict())
        model.projection.weight *= 4
    checkpoint.save(model, folder, tokenizer=folder / "tokenizer.json")
    return folder


def row_of(task, number, pictures):
    colour = COLOURS[number]
    if task == "retrieval":  # two rows about each image
        return {"image": pictures[number // 2], "caption": f"a {colour} car and {'two' if number % 2 else 'a'} dogs"}
    if task == "caption":
        return {"image": pictures[number], "caption": f"two dogs and a {colour} car"}
    turn = {"question": f"what colour is car {number}?", "answer": colour}
    return {"image": pictures[number], **({"dialogues": [[turn]]} if task == "instruct" else turn)}


@pytest.fixture
def tuning(pictures, tmp_path):
    """``tuning(task, family)``: the path of a recipe that fine-tunes on eight rows, a text about each."""

    def write(task, family="opt", dropout=0.0, learning=LEARNING):
        rows = tmp_path / f"{task}.jsonl"
        rows.write_text("".join(json.dumps(row_of(task, each, pictures)) + "\n" for each in range(8)))
        start = save_model("matching" if task == "retrieval" else family, tmp_path / f"{task}-{family}", dropout)
        is_asked = task in ("asked", "instruct")
        if is_asked:
            save_model("matching", tmp_path / "matching", dropout)
        lines = {
            "caption": 'caption_prompt = "a photo of"', "vqa": 'question_prompt = "Question: {} Answer:"',
            "asked": 'question_prompt = "Question: {} Answer:"',
        }  # fmt: skip
        path = tmp_path / f"{task}-{family}.toml"
        path.write_text(
            f"""
            stage = {1 if task == "retrieval" else 2}
            start = "{start}"
            out = "out-{task}-{family}"
            precision = "fp32"
            threads = 1
            log_every = 1
            {'text_branch = "matching"' if is_asked else ""}
            {learning}
            [data]
            rows = "{rows}"
            max_prompt_tokens = 64
            {lines.get(task, "")}
            [optim]
            steps = {finetuned.STEPS}
            batch_size = 8
            peak_lr = {finetuned.PEAK}
            min_lr = {finetuned.LEAST}
            warmup_steps = {finetuned.WARM_UP}
            beta2 = 0.999
            [evaluation]
            rows = "{rows}"
            """
        )
        return path

    return write


def said(row):
    """The text about a row, as what is read and what is written."""
    if "caption" in row:
        return "a photo of", row["caption"]
    if "dialogues" in row:
        return row["dialogues"][0][0]["question"], row["dialogues"][0][0]["answer"]
    return f"Question: {row['question']} Answer:", row["answer"]


def pixels_of(rows):
    return to_pixels([load_image(row["image"]) for row in rows], size=SIZE, mean=CLIP_MEAN, std=CLIP_STD)


def plain_generative(path, task, family):
    """What the recipe comes to, and its losses, in plain steps over the reference's model."""
    start = path.parent / f"{task}-{family}"
    text_branch = path.parent / "matching" if task in ("asked", "instruct") else None
    model = finetuned.generative(start, text_branch, SIZE)
    tokenizer, reader = finetuned.tokenizers_of(start, text_branch)
    rows = [json.loads(line) for line in (path.parent / f"{task}.jsonl").read_text().splitlines()]
    pixels_BCHW = pixels_of(rows)

    def loss():
        found = [
            finetuned.sum_of_tokens(model, pixels_BCHW[number, None], *said(row), tokenizer, reader)
            for number, row in enumerate(rows)
        ]
        return sum(each for each, _ in found) / sum(count for _, count in found)

    learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
    losses = finetuned.train(learning, LAYERS, loss)
    return losses, {name: each.detach() for name, each in learning.items()}


def plain_retrieval(path):
    """The same of stage 1, over our own model."""
    folder = path.parent / "retrieval-opt"
    model = checkpoint.load(folder)
    positions = finetuned.resized_positions(model.vision.position_embedding.detach(), SIZE // 16)
    model.vision.position_embedding = torch.nn.Parameter(positions)
    model.vision.config = replace(model.vision.config, image_size=SIZE)
    model.config = replace(model.config, vision=model.vision.config)
    rows = [json.loads(line) for line in (path.parent / "retrieval.jsonl").read_text().splitlines()]
    tokenizer, _ = finetuned.tokenizers_of(folder)
    ids = [torch.tensor(finetuned.reading_ids(row["caption"], tokenizer)) for row in rows]
    ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask_BT = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], batch_first=True).bool()
    pictures = sorted({row["image"] for row in rows})
    image_id_B = torch.tensor([pictures.index(row["image"]) for row in rows])
    names = checkpoint.keys.table(model.config)
    learning = {names[name]: each for name, each in model.named_parameters()}
    loss = partial(finetuned.retrieval_losses, model, pixels_of(rows), ids_BT, mask_BT, image_id_B)
    losses = finetuned.train(learning, LAYERS, loss)
    checkpoint.save(model, path.parent / "plain", tokenizer=folder / "tokenizer.json")
    return losses, load_file(path.parent / "plain" / "model.safetensors")


def assert_same_weights(found, wanted):
    """But for the keys' biases, which move no attention, and whose gradient is rounding."""
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        keep = torch.ones(value.shape, dtype=torch.bool)
        if name.endswith("qkv.bias"):
            keep.view(3, -1)[1] = False
        if not name.endswith("attention.key.bias"):
            torch.testing.assert_close(found[name][keep], value[keep], rtol=0, atol=1e-5, msg=name)


def losses_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning_rate" in line]
    return [sum(line[name] for name in ("itc", "itm", "lm") if name in line) for line in steps]


@pytest.mark.parametrize("task", TASKS[:4])
@pytest.mark.parametrize("family", ["opt", "t5"])
def test_it_is_the_plain_fine_tuning(tuning, task, family):
    """Losses and weights after some steps; and what learnt nothing is as it was."""
    path = tuning(task, family)
    out = train.run(path)
    wanted_losses, wanted = plain_generative(path, task, family)
    assert losses_of(out) == pytest.approx(wanted_losses, abs=2e-5)
    found, before = load_file(out / "model.safetensors"), load_file(path.parent / f"{task}-{family}/model.safetensors")
    assert_same_weights(found, wanted)
    assert all(torch.equal(found[name], each) for name, each in before.items() if name.startswith("language_model"))
    is_asked = task in ("asked", "instruct")
    kind = transformers.InstructBlipForConditionalGeneration if is_asked else transformers.Blip2ForConditionalGeneration
    _, told = kind.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]


@pytest.mark.parametrize("takes_all", [False, True])
def test_whose_the_branches_of_a_qformer_are_that_reads(tuning, takes_all):
    """The text's are those of stage 1; the queries' too, if the recipe says so."""
    path = tuning("asked")
    still = {"optim.peak_lr": 0.0, "optim.min_lr": 0.0} | ({"qformer": "matching"} if takes_all else {})
    model = checkpoint.load(path.parent / "matching")
    model.vision = checkpoint.load(path.parent / "asked-opt").vision
    checkpoint.save(model, path.parent / "matching", tokenizer=path.parent / "matching" / "tokenizer.json")
    out = train.run(path, overrides=still)
    found, start, matching = (
        checkpoint.load(folder).qformer.state_dict()
        for folder in (out, path.parent / "asked-opt", path.parent / "matching")
    )
    assert found.keys() == matching.keys() > start.keys()
    for name, value in found.items():
        assert torch.equal(value, (start if name in start and not takes_all else matching)[name]), name


def test_retrieval_is_the_plain_fine_tuning(tuning, monkeypatch):
    """With the hardest negatives, so that nothing is drawn; never one of the same image."""

    def hardest(logits_NB, equal_NB, own_N, chance_N):
        return logits_NB.masked_fill(equal_NB, float("-inf")).argmax(dim=1)

    monkeypatch.setattr(stage1, "draw_negatives", hardest)
    path = tuning("retrieval")
    out = train.run(path)
    wanted_losses, wanted = plain_retrieval(path)
    assert losses_of(out) == pytest.approx(wanted_losses, abs=5e-5)
    assert_same_weights(load_file(out / "model.safetensors"), wanted)


@pytest.mark.parametrize("task", TASKS)
def test_the_rate_of_each_parameter_at_each_step(tuning, monkeypatch, task):
    """The authors' shares of the paper's schedule, applied group by group; and what decays is what has two axes."""
    seen, loop = [], sys.modules["blip2.train.loop"]
    plain = loop.set_rate

    def note(optimizer, rate):
        plain(optimizer, rate)
        seen.append({id(each): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups
                     for each in group["params"]})  # fmt: skip

    models = []
    monkeypatch.setattr(loop, "set_rate", note)
    start = sys.modules["blip2.train.run"]
    monkeypatch.setattr(start, "build", lambda *args, **more: models.append(start_build(*args, **more)) or models[-1])
    start_build = sys.modules["blip2.train.start"].build
    train.run(tuning(task))
    [model] = models
    names = checkpoint.keys.table(model.config)
    learning = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert any(name.startswith("vision.blocks.0.") for name in learning)
    for step in (0, 1, finetuned.STEPS - 1):
        for name, each in learning.items():
            rate = finetuned.learning_rate(step) * finetuned.share(names[name], LAYERS)
            assert seen[step][id(each)] == pytest.approx((rate, 0.05 if each.dim() > 1 else 0.0)), name
    assert seen[0][id(model.vision.position_embedding)][0] == pytest.approx(finetuned.PEAK / 2 / 2**4)
    assert seen[0][id(model.vision.blocks[2].fc1.weight)][0] == pytest.approx(finetuned.PEAK / 2 / 2)
    assert seen[0][id(model.vision.post_norm.weight)][0] == pytest.approx(finetuned.PEAK / 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_parts_give_the_gradients_of_the_whole(tuning, task, accumulate):
    """Dropout included: the image encoder sees each part a second time."""
    path, some = tuning(task, dropout=0.1), {"optim.batch_size": 7, "data.augment": True}
    some |= {"data.texts_per_image": 2} if task == "asked" else {}
    assert_same(gradients(path, some | {"optim.accumulate": accumulate}), gradients(path, some))


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_so_do_parts_for_an_adapter_in_the_image_encoder(tuning, task):
    path, some = tuning(task, learning=ADAPTED), {"optim.batch_size": 7}
    assert_same(gradients(path, some | {"optim.accumulate": 2}), gradients(path, some))


@pytest.mark.slow
def test_two_processes_compute_and_learn_what_one_does(tuning, tmp_path):
    """Of each task, dropout included; of an adapter in the image encoder; and a training to its end."""
    paths = {task: tuning(task, dropout=0.1) for task in TASKS}
    (tmp_path / "adapter").mkdir()
    adapted = tuning("retrieval", learning=ADAPTED).rename(tmp_path / "adapter" / "adapter.toml")
    paths = {task: tuning(task, dropout=0.1) for task in TASKS} | {"adapter": adapted}
    seven, parts = {"optim.batch_size": 7}, {"optim.accumulate": 2}
    cases = [
        {"path": str(path)} | seven | (parts if task in ("asked", "retrieval") else {}) for task, path in paths.items()
    ]
    shared = {"path": str(paths["retrieval"]), "out": str(tmp_path / "shared"), "optim.batch_size": 7} | parts
    in_processes(2, tmp_path / "found.pt", json.dumps(cases), json.dumps(shared))
    for case, found in zip(cases, torch.load(tmp_path / "found.pt"), strict=True):
        path = next(path for path in paths.values() if str(path) == case["path"])
        assert_same(found, gradients(path, seven))
    alone = train.run(paths["retrieval"], overrides=seven)
    assert_same_weights(load_file(tmp_path / "shared" / "model.safetensors"), load_file(alone / "model.safetensors"))


@pytest.mark.parametrize("task", TASKS)
def test_stopped_it_goes_on_as_if_it_had_not(tuning, task, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.phase == "train" and progress.step == 3:
            raise Stop

    path, some = tuning(task, dropout=0.1), {"data.augment": True, "optim.batch_size": 3}
    whole = train.run(path, overrides=some)
    with pytest.raises(Stop):
        train.run(path, overrides=some | {"out": "parts"}, report=stop)
    parts = train.run(path, overrides=some | {"out": "parts"})
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], each) for name, each in other.items())


@pytest.mark.parametrize("task", TASKS)
def test_it_is_tried_beforehand(tuning, task):
    """What learns is told, and a few rows are learnt by heart."""
    path = tuning(task)
    found = preview(path)
    config = found.materials.config
    assert config.vision.image_size == SIZE and found.parts["vision"][1] == 0
    text = "\n".join(found.lines())
    assert "car" in text and ("a photo of" in text) == (task == "caption")
    assert (re.search(r"Question: what colour is car \d\? Answer:", text) is not None) == (task in ("vqa", "asked"))
    fast = {"optim.steps": 60, "optim.peak_lr": 0.02, "optim.batch_size": 4}
    verdict = overfit(path, 4, report=lambda _: None, overrides=fast)
    assert verdict.last < 0.85 * verdict.first  # a random language model is not spoken to by queries alone
