"""Products summed in float32: `from pallas_kernels.matmul import matmul`."""
from pallas_kernels.matmul.api import dot, matmul

__all__ = ['dot', 'matmul']
