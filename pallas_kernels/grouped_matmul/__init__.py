"""A product for each group of rows: `from pallas_kernels.grouped_matmul import grouped_matmul`."""
from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ['grouped_matmul']
