"""BLIP-2 from scratch: pictures into words, questions answered, pictures and sentences matched."""

__version__ = "0.1.0"
