"""Quantised weights: `from pallas_kernels.quantized_matmul import quantized_matmul`."""
from pallas_kernels.quantized_matmul.api import quantize, quantized_matmul

__all__ = ['quantize', 'quantized_matmul']
