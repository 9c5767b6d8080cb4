"""What is wrong with a request is told in the words of a request."""

from __future__ import annotations

from blip2.errors import OptionError
from blip2.generation import GenerateOptions
from blip2.serve.errors import as_api_error


def told(**options: object) -> str:
    try:
        GenerateOptions(**options)  # type: ignore[arg-type]
    except OptionError as error:
        return as_api_error(error).message
    raise AssertionError("nothing is wrong with it")


def test_options_are_the_fields_of_a_request() -> None:
    assert told(num_return=3).startswith("n is 3, but 1 beam(s) give only that many answers")
    assert told(num_return=3).endswith("set num_beams to 3 or more, or give a temperature above 0")
    assert told(sample=True, num_beams=3).endswith("set num_beams to 1, or leave out temperature")
    assert told(seed=-1).endswith("leave out seed for different samples each time")
