"""Attention in blocks: `from pallas_kernels.flash_attention import flash_attention`."""
from pallas_kernels.flash_attention.api import flash_attention

__all__ = ['flash_attention']
