"""`blip2 assemble`: parts as transformers writes them become models that training starts from."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import blip2
from blip2 import checkpoint
from blip2.checkpoint import BUNDLED
from blip2.checkpoint.assemble import assemble, qformer_start
from blip2.checkpoint.describe import stored
from blip2.cli import cli
from blip2.errors import CheckpointError, OptionError
from tests import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "photo", "of"]


def tokenizer(folder, words, unknown="[UNK]"):
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=unknown)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens([word for word in words if word.startswith("[")])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders: clip, opt, t5, bert."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts")
    clip = transformers.CLIPVisionConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, image_size=28, patch_size=14
    )
    transformers.CLIPVisionModel(clip).save_pretrained(folder / "clip")
    settings = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "clip/preprocessor_config.json").write_text(json.dumps(settings))
    opt = transformers.OPTConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformers.OPTForCausalLM(opt).save_pretrained(folder / "opt")
    t5 = transformers.T5Config(
        vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    t5.tie_word_embeddings = False  # the library's own configuration ties them whatever it is told
    whole = transformers.T5ForConditionalGeneration(t5)
    for half in (whole.encoder, whole.decoder):  # what Flan-T5 has, and is lost with that
        half.embed_tokens = whole.shared
    whole.save_pretrained(folder / "t5")
    bert = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertForMaskedLM(bert).eval().save_pretrained(folder / "bert")
    llama = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    for name in ("opt", "t5", "llama"):
        tokenizer(folder / name, [str(number) for number in range(20)], "3")
    tokenizer(folder / "bert", WORDS)
    return folder


def assembled(parts, out, **options):
    chosen = {"vision": "clip", "language": "opt", "qformer": "bert", **options}
    encoder = checkpoint.open_encoder(parts / chosen.pop("vision"))
    language = chosen.pop("language")
    start = qformer_start(str(parts / chosen.pop("qformer")))
    return assemble(out, vision=encoder, qformer=start, language=language and str(parts / language), **chosen)


def test_the_text_branch_of_the_start_is_the_bert(parts, tmp_path):
    matching, _ = assembled(parts, tmp_path / "start")
    model = checkpoint.load(matching)
    assert model.config.bos_token_id == len(WORDS) == model.config.qformer.vocab_size - 1
    bert = transformers.BertForMaskedLM.from_pretrained(parts / "bert").eval()
    text_BT = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        expected = bert.bert(text_BT).last_hidden_state
        found = model.qformer(text_BT=text_BT).hidden_BSD
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        words_VD = model.qformer.word_embedding.weight
        scores = model.lm_head(found, words_VD)[..., : len(WORDS)]
        torch.testing.assert_close(scores, bert.cls(expected), rtol=1e-5, atol=1e-5)
    first = model.qformer.layers[0]
    torch.testing.assert_close(first.query_feed_forward.output.weight, first.text_feed_forward.output.weight)
    assert first.cross_attention.key.weight.shape[1] == 24


@pytest.mark.parametrize("language", ["opt", "t5", "llama"])
def test_the_frozen_parts_are_as_they_were_and_transformers_reads_the_whole(parts, tmp_path, language):
    _, generative = assembled(parts, tmp_path / "start", language=language, num_queries=5)
    model = checkpoint.load(generative)
    encoder, settings = checkpoint.load_encoder(parts / "clip")
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model.vision.features(pixels), encoder.features(pixels))
    assert checkpoint.image_settings(generative, model.config) == settings
    whole = transformers.Blip2ForConditionalGeneration.from_pretrained(generative)
    now = whole.language_model.state_dict()
    for name, tensor in load_file(parts / language / "model.safetensors").items():
        assert torch.equal(tensor, now[name]), name
    assert whole.query_tokens.shape == (1, 5, 24)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(parts, tmp_path):
    made = [assembled(parts, tmp_path / str(number), seed=seed) for number, seed in enumerate([1, 1, 2])]
    files = [[(folder / "qformer.safetensors").read_bytes() for folder in folders] for folders in made]
    assert files[0] == files[1]
    assert files[0][0] != files[2][0] and files[0][1] != files[2][1]


def test_a_q_former_of_another_model_keeps_what_fits(parts, tmp_path):
    _, first = assembled(parts, tmp_path / "first", seed=3)
    (again,) = assemble(
        tmp_path / "again", vision=checkpoint.open_encoder(parts / "clip"), qformer=qformer_start(str(first)),
        language=str(parts / "t5"), seed=4,
    )  # fmt: skip
    old, new = checkpoint.load(first), checkpoint.load(again)
    for (name, one), other in zip(old.qformer.named_parameters(), new.qformer.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_q_former_and_the_encoder_of_an_instructblip(tmp_path):
    """Its text branch, too, for stage 1."""
    folder = tiny.save_instructed("t5", tmp_path / "instructed")
    written = assemble(
        tmp_path / "out", vision=checkpoint.open_encoder(folder), qformer=qformer_start(str(folder)),
        language=str(folder),
    )  # fmt: skip
    old = checkpoint.load(folder)
    matching, generative = map(checkpoint.load, written)
    assert old.config.reads_prompt and not generative.config.reads_prompt
    known = dict(old.qformer.named_parameters())
    for model in (matching, generative):
        for name, one in model.qformer.named_parameters():
            assert torch.equal(one, known[name]), name
    assert torch.equal(generative.language.output.weight, old.language.output.weight)


def test_a_q_former_of_another_model_speaks_to_a_language_model_of_another_width(parts, tmp_path):
    """The projection is new then; all else is as it was."""
    wider = transformers.GPT2Config(vocab_size=20, n_embd=24, n_layer=1, n_head=2, eos_token_id=3, bos_token_id=3)
    transformers.GPT2LMHeadModel(wider).save_pretrained(tmp_path / "gpt2")
    tokenizer(tmp_path / "gpt2", [str(number) for number in range(20)], "3")
    _, first = assembled(parts, tmp_path / "first", seed=3)
    start = qformer_start(str(first))
    encoder = checkpoint.open_encoder(parts / "clip")
    [folder] = assemble(tmp_path / "again", vision=encoder, qformer=start, language=str(tmp_path / "gpt2"))
    old, new = checkpoint.load(first), checkpoint.load(folder)
    assert all(map(torch.equal, old.qformer.parameters(), new.qformer.parameters()))
    assert new.projection.weight.shape == (24, 24) and 0.01 < new.projection.weight.std() < 0.03


def test_a_start_from_scratch_has_the_text_of_a_tokenizer(parts, tmp_path):
    start = qformer_start("scratch", str(parts / "bert"))
    folders = assemble(
        tmp_path / "start", vision=checkpoint.open_encoder(parts / "clip"), qformer=start, num_queries=4
    )
    assert [folder.name for folder in folders] == ["matching"]
    model = blip2.load(folders[0])
    config = model.model.config.qformer
    assert config.vocab_size == len(WORDS) + 1
    assert (config.hidden_size, config.num_layers, config.num_heads) == (24, 4, 2)  # of that BERT


def test_a_start_from_scratch_of_a_tokenizer_alone_has_the_published_size(parts, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((parts / "bert/tokenizer.json").read_bytes())
    config = qformer_start("scratch", str(tmp_path)).config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (768, 12, len(WORDS))


def test_a_matching_model_of_another_projection_is_begun_from(tmp_path):
    """The bundled one compares vectors of 128 numbers."""
    bundled = BUNDLED["miniature-itm"]
    [folder] = assemble(tmp_path, vision=checkpoint.open_encoder(bundled), qformer=qformer_start(str(bundled)))
    old, new = checkpoint.load(bundled), checkpoint.load(folder)
    assert new.config == old.config
    for (name, one), other in zip(old.named_parameters(), new.parameters(), strict=True):
        assert torch.equal(one.float(), other.float()), name


def disk_bytes(folder):
    """What the files of a folder take, each content once."""
    stats = {stat.st_ino: stat for stat in (path.stat() for path in folder.rglob("*") if path.is_file())}
    return sum(stat.st_size for stat in stats.values())


def test_ten_models_share_the_frozen_parts_of_one(parts, tmp_path):
    assembled(parts, tmp_path / "all/0")
    alone = disk_bytes(tmp_path / "all")
    frozen = {path.name: path.stat() for path in (tmp_path / "all/0/generative").glob("*_model.safetensors")}
    assert frozen.keys() == {"vision_model.safetensors", "language_model.safetensors"}
    for number in range(1, 10):
        folders = assembled(parts, tmp_path / f"all/{number}", seed=number, link=tmp_path / "all/0")
        for folder in folders:
            for path in folder.glob("*_model.safetensors"):
                assert path.stat().st_ino == frozen[path.name].st_ino
        assert stored(folders[1]).num_shared_bytes == sum(stat.st_size for stat in frozen.values())
    shared = sum(stat.st_size for stat in frozen.values())
    assert disk_bytes(tmp_path / "all") == 10 * (alone - shared) + shared

    kept = checkpoint.load(tmp_path / "all/9/generative").state_dict()
    shutil.rmtree(tmp_path / "all/0")  # each is whole without the others
    (tmp_path / "moved").mkdir()
    (tmp_path / "all/9/generative").rename(tmp_path / "moved/model")
    for name, tensor in checkpoint.load(tmp_path / "moved/model").state_dict().items():
        assert torch.equal(tensor, kept[name])
    whole = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "moved/model")
    assert torch.equal(whole.query_tokens, kept["qformer.query_tokens"])


def test_parts_are_shared_only_where_they_are_the_same(parts, tmp_path):
    first = assembled(parts, tmp_path / "first")[1]
    encoder = checkpoint.open_encoder(parts / "clip", layer="last")
    start = qformer_start(str(parts / "bert"))
    _, other = assemble(
        tmp_path / "other", vision=encoder, qformer=start, language=str(parts / "opt"), link=tmp_path / "first"
    )
    files = ["language_model.safetensors", "vision_model.safetensors"]
    assert [(other / file).samefile(first / file) for file in files] == [True, False]
    changed = load_file(first / files[0])
    changed["language_model.model.decoder.final_layer_norm.bias"][0] += 1e-6
    save_file(changed, first / "new", {"format": "pt"})
    (first / "new").replace(first / files[0])
    _, third = assembled(parts, tmp_path / "third", link=first)
    assert [(third / file).samefile(first / file) for file in files] == [False, True]
    with pytest.raises(CheckpointError, match=r"files of their own.*leave link out"):
        assembled(parts, tmp_path / "fourth", link=parts / "opt")
    assert not (tmp_path / "fourth").exists()


def test_where_the_disk_has_no_hard_links_files_are_copied(parts, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    folders = assembled(parts, tmp_path / "start")
    one, other = [(folder / "vision_model.safetensors") for folder in folders]
    assert not one.samefile(other) and one.read_bytes() == other.read_bytes()
    monkeypatch.setattr("blip2.checkpoint.assemble._disk_of", lambda path: len(str(path)))
    with pytest.raises(OptionError, match="is on another disk than"):
        assembled(parts, tmp_path / "other", link=tmp_path / "start")


def test_what_training_reads_is_whole(parts, tmp_path):
    """An image and a text go through both models."""
    matching, generative = assembled(parts, tmp_path / "start")
    picture = torch.zeros(40, 30, 3, dtype=torch.uint8).numpy()
    assert isinstance(blip2.load(generative).caption(picture, max_new_tokens=3), str)
    assert len(blip2.load(matching).classify(picture, ["a dog", "photo"])) == 2


def test_the_command_prints_what_it_wrote(parts, tmp_path):
    out = tmp_path / "start"
    names = ["--vision", parts / "clip", "--language", parts / "opt", "--qformer", parts / "bert", "-o", out]
    done = CliRunner().invoke(cli, ["assemble", *map(str, names)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(out / "matching"), str(out / "generative")]
    again = CliRunner().invoke(cli, ["assemble", *map(str, names)])
    assert again.exit_code == 1 and "exists already" in again.output


def test_parts_that_do_not_go_together_are_refused_and_nothing_is_written(parts, tmp_path):
    out = tmp_path / "start"
    with pytest.raises(CheckpointError, match="a Q-Former starts from a BERT"):
        qformer_start(str(parts / "opt"))
    with pytest.raises(CheckpointError, match=r"family 'bert'"):
        assembled(parts, out, language="bert")
    with pytest.raises(CheckpointError, match="not a supported image encoder"):
        assembled(parts, out, vision="opt")
    with pytest.raises(OptionError, match="nothing to write"):
        assemble(out, vision=checkpoint.open_encoder(parts / "clip"), qformer=qformer_start("scratch"))
    with pytest.raises(OptionError, match="queries"):
        assembled(parts, out, num_queries=0)
    assert not (out / "generative").exists()


def test_a_linked_model_is_told_quantised_and_merged_whole(parts, tmp_path):
    assembled(parts, tmp_path / "first")
    _, model = assembled(parts, tmp_path / "second", link=tmp_path / "first")
    told = CliRunner().invoke(cli, ["info", str(model)])
    assert "shared with other models by hard links" in told.output
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    done = CliRunner().invoke(cli, ["quantize", str(model), str(tmp_path / "int8"), "--to", "int8"])
    assert done.exit_code == 0, done.output
    assert stored(tmp_path / "int8").num_shared_bytes == 0
    loaded = checkpoint.load(model)
    checkpoint.save(loaded, model)  # over itself: the others keep theirs
    assert [path.name for path in model.glob("*.safetensors*")] == ["model.safetensors"]
    for folder in ("generative", "matching"):
        checkpoint.load(tmp_path / "first" / folder)
    assert (tmp_path / "first/generative/language_model.safetensors").read_bytes() == before[
        "language_model.safetensors"
    ]


def test_a_part_by_itself_is_told(parts):
    def told(name):
        plain = CliRunner().invoke(cli, ["info", str(parts / name)])
        assert plain.exit_code == 0, plain.output
        content = json.loads(CliRunner().invoke(cli, ["info", str(parts / name), "--json"]).output)
        weights = load_file(parts / name / "model.safetensors")
        assert content["disk_bytes"] == (parts / name / "model.safetensors").stat().st_size
        return plain.output, content, sum(tensor.numel() for tensor in weights.values())

    text, content, number = told("llama")
    assert "blip2 assemble --language" in text and content["family"] == "llama"
    assert content["kind"] == "language model" and content["num_parameters"] == number
    assert content["memory_bytes"].keys() == {"bfloat16", "int8", "int4"}
    assert content["memory_bytes"]["bfloat16"] == 2 * number
    text, content, _ = told("clip")
    assert "blip2 assemble --vision" in text and "28 pixels, 4 patches, a class token" in content["architecture"]
    vision = checkpoint.open_encoder(parts / "clip")
    assert content["num_parameters"] == sum(tensor.numel() for _, tensor in vision.tensors())
    text, content, _ = told("bert")
    assert "blip2 assemble --qformer" in text and content["kind"] == "BERT"
    assert told("t5")[1]["architecture"].startswith("T5, 2 + 2 blocks")


def test_another_program_s_model_in_the_same_folder_is_told_and_harms_no_other(parts, tmp_path):
    _, first = assembled(parts, tmp_path / "first")
    _, second = assembled(parts, tmp_path / "second", link=tmp_path / "first")
    before = checkpoint.load(first).state_dict()
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(second)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    theirs.save_pretrained(second)
    with pytest.raises(CheckpointError, match="has two models"):
        checkpoint.load(second)
    for name, tensor in checkpoint.load(first).state_dict().items():
        assert torch.equal(tensor, before[name])
    (second / "model.safetensors").unlink()
    checkpoint.load(second)
def test_a_q_former_that_does_not_fit_leaves_nothing_behind(parts, tmp_path):
    """So that the same command can be given again with another."""
    start = qformer_start(str(parts / "bert"))
    name = "qformer.layernorm.weight"
    assert name in start.tensors
    wrong = replace(start, tensors={**start.tensors, name: torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"layernorm\.weight of the Q-Former has shape \[7\], but needs \[24\]"):
        assemble(tmp_path / "start", vision=checkpoint.open_encoder(parts / "clip"), qformer=wrong)
    assert not (tmp_path / "start").exists()
