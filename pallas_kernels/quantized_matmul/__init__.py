"""Quantised weights: `from pallas_kernels.quantized_matmul import quantized_matmul`."""
from pallas_kernels.quantized_matmul.api import Quantized, quantize, quantized_matmul

__all__ = ['Quantized', 'quantize', 'quantized_matmul']
