"""Attention of new tokens over a cache: `from pallas_kernels.decode_attention import ...`."""
from pallas_kernels.decode_attention.api import decode_attention, quantize

__all__ = ['decode_attention', 'quantize']
