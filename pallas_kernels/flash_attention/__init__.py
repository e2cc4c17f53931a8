"""Attention in blocks: `from pallas_kernels.flash_attention import flash_attention`."""
from pallas_kernels.flash_attention.api import decode_attention, flash_attention

__all__ = ['decode_attention', 'flash_attention']
