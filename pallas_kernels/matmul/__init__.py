"""Matrix product with float32 accumulation: `from pallas_kernels.matmul import matmul`."""
from pallas_kernels.matmul.api import matmul

__all__ = ['matmul']
