"""Linear layers whose weights are stored in 8 or 4 bits."""

from blip2.quantized.linear import BITS, GROUP_SIZES, QuantizedLinear

__all__ = ["BITS", "GROUP_SIZES", "QuantizedLinear"]
