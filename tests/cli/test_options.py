"""What the verbs have in common: the options that name a model reach its loading; numbers as people read them."""

import io
import sys

import pytest

from blip2.cli.options import in_bytes, in_words, load_pipeline
from blip2.errors import CheckpointError


@pytest.mark.parametrize("verb", [["caption", "x.png"], ["ask", "x.png", "is it?"], ["chat", "x.png"]])
def test_the_options_of_a_model_reach_its_loading(run, monkeypatch, verb):
    given = []

    def load(name, **options):
        given.append((name, options))
        raise CheckpointError("that is all")

    monkeypatch.setattr("blip2.api.load", load)
    chosen = [
        "--device",
        "cuda:1",
        "--dtype",
        "bfloat16",
        "--quantize",
        "int4",
        "--quantize-vision",
        "--vision",
        "int8",
        "--revision",
        "v2",
    ]
    assert run(*verb, "--model", "a/b", *chosen, "--beams", 2).stderr == "blip2: that is all\n"
    run(*verb)
    nothing = {
        "device": "auto", "dtype": None, "quantize": None, "quantize_vision": False, "vision": None, "revision": None,
        "adapter": None, "progress": None,
    }  # fmt: skip
    everything = {
        "device": "cuda:1", "dtype": "bfloat16", "quantize": "int4", "quantize_vision": True, "vision": "int8",
        "revision": "v2", "adapter": None, "progress": None,
    }  # fmt: skip
    assert given == [("a/b", everything), (None, nothing)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "smallest", "is_shown"), [(Terminal, 0, True), (Terminal, 2**30, False),
                                                              (io.StringIO, 0, False)])  # fmt: skip
def test_a_large_model_shows_its_progress_on_a_terminal(any_model, monkeypatch, stream, smallest, is_shown):
    monkeypatch.setattr("blip2.cli.options.LARGE_BYTES", smallest)
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.setenv("TERM", "xterm")
    options = {"device": "auto", "dtype": "auto", "quantize": None, "quantize_vision": False, "vision": None}
    load_pipeline(model=str(any_model), revision=None, adapter=(), **options)
    assert ("loading the model" in sys.stderr.getvalue()) is is_shown


def test_quantising_nothing(run, pictures, opt_model):
    result = run("caption", pictures[0], "--model", opt_model, "--quantize-vision")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("blip2: --quantize-vision is set without")


def test_an_image_encoder_in_8_bits(run, pictures, opt_model):
    result = run("caption", pictures[0], "--model", opt_model, "--vision", "int8")
    assert (result.exit_code, result.stderr) == (0, "")
    refused = run("caption", pictures[0], "--model", opt_model, "--vision", "int8", "--quantize-vision")
    assert refused.stderr.startswith("blip2: --quantize-vision is set together with") and refused.exit_code == 2
    assert run("caption", pictures[0], "--vision", "int4").exit_code == 2


def test_numbers():
    sizes = {15_200_000: "15.2 MB", 99_900_000: "99.9 MB", 425_000_000: "0.42 GB", 8_580_000_000: "8.58 GB"}
    assert {size: in_bytes(size) for size in sizes} == sizes
    assert in_bytes(48.9e9) == "48.9 GB"
    counts = {7_600_000: "7.6 M", 99_960_000: "100 M", 985_952_256: "986 M", 999_600_000: "1.0 B"}
    assert {count: in_words(count) for count in counts} == counts


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_computes_nothing_here(run, pictures, device):
    result = run("caption", pictures[0], "--device", device)
    assert result.exit_code == 2
    assert f"--device '{device}' cannot be used (" in result.stderr
    assert len(result.stderr) < 200


def test_more_threads_than_can_be(run, pictures):
    result = run("caption", pictures[0], "--threads", "99999999")
    assert result.exit_code == 2
    assert "'--threads': 99999999 is not in the range" in result.stderr
