"""Attention of new tokens over a cache: `from pallas_kernels.decode_attention import ...`."""
from pallas_kernels.decode_attention.api import decode_attention, quantize
from pallas_kernels.decode_attention.cpu import put_tokens

__all__ = ['decode_attention', 'put_tokens', 'quantize']
