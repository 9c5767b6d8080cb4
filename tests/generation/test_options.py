"""Every option either makes sense or is refused in one line that says what to do."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2.errors import OptionError
from blip2.generation import GenerateOptions

WRONG = {
    "max_new_tokens": [0, -1, 1.5, True, "3", None],
    "min_new_tokens": [-1, 0.5, None],
    "num_beams": [0, -2, 2.0],
    "length_penalty": [math.inf, -math.inf, math.nan, "1", None],
    "early_stopping": [2, "always", None],
    "num_return": [0, -1],
    "sample": [1, "yes", None],
    "temperature": [0, -1.0, math.nan, math.inf, True],
    "top_k": [-1, 2.5],
    "top_p": [0, -0.1, 1.1, math.nan],
    "min_p": [-0.1, 1.1, math.nan, None],
    "typical_p": [0, 1.1, True],
    "repetition_penalty": [0, -1.0, math.nan, math.inf],
    "no_repeat_ngram_size": [-1, 1.5],
    "stop": ["", (1,), None, 3],
    "seed": [-1, 2**63, 0.5, "0", False],
}

valid = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(50, 100),
        "min_new_tokens": st.integers(0, 50),
        "num_beams": st.just(1),
        "length_penalty": st.floats(-3, 3),
        "early_stopping": st.sampled_from([True, False, "never"]),
        "num_return": st.integers(1, 9),
        "sample": st.just(True),
        "temperature": st.floats(1e-3, 100),
        "top_k": st.integers(0, 100),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "typical_p": st.floats(0, 1, exclude_min=True),
        "repetition_penalty": st.floats(0.1, 10),
        "no_repeat_ngram_size": st.integers(0, 9),
        "stop": st.lists(st.text(min_size=1), max_size=3).map(tuple),
        "seed": st.none() | st.integers(0, 2**63 - 1),
    }
)


def test_every_option_is_tried():
    assert set(WRONG) == {field.name for field in dataclasses.fields(GenerateOptions)}


@given(valid, st.data())
def test_right_values_pass_and_one_wrong_one_is_named(options, data):
    assert dataclasses.asdict(GenerateOptions(**options)) == options
    name = data.draw(st.sampled_from(sorted(WRONG)))
    wrong = data.draw(st.sampled_from(WRONG[name]))
    with pytest.raises(OptionError) as caught:
        GenerateOptions(**(options | {name: wrong}))
    message = str(caught.value)
    assert message.startswith(f"{name} is {wrong!r}; it may be ")
    assert "\n" not in message and message.count(";") >= 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_new_tokens": 31}, "max_new_tokens"),
        ({"num_return": 2}, "num_beams"),
        ({"num_return": 4, "num_beams": 3}, "num_beams"),
        ({"sample": True, "num_beams": 2}, "num_beams=1"),
        ({"temperature": 0.7}, "sample=True"),
        ({"top_k": 5}, "sample=True"),
        ({"top_p": 0.9, "num_beams": 5}, "sample=True"),
        ({"min_p": 0.1}, "sample=True"),
    ],
)
def test_conflicts(options, named):
    with pytest.raises(OptionError, match=named) as caught:
        GenerateOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 5, "num_return": 5, "stop": ("\n",), "seed": 3},
        {"length_penalty": -1.0, "early_stopping": True},  # a task's preset, taken without its beams
        {"min_new_tokens": 30},
        {"temperature": 1, "top_p": 1, "length_penalty": 0},
    ],
)
def test_what_goes_together(options):
    GenerateOptions(**options)


def test_stop_may_be_a_text_or_a_list():
    for given_stop in ("end", ["end"], ("end",)):
        assert GenerateOptions(stop=given_stop).stop == ("end",)
    assert GenerateOptions(stop=[]).stop == ()
    with pytest.raises(OptionError, match=r"^stop is 'a', ''; it may be one text or several"):
        GenerateOptions(stop=["a", ""])


def test_only_by_name_and_never_changed():
    with pytest.raises(TypeError):
        GenerateOptions(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateOptions().num_beams = 5
    assert dataclasses.replace(GenerateOptions(), num_beams=5).num_beams == 5
