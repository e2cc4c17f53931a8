"""Products of few rows at the speed of a CPU's memory: `from pallas_kernels.streamed_matmul import
streamed_matmul`."""
from pallas_kernels.streamed_matmul.api import Streamed, streamed_matmul

__all__ = ['Streamed', 'streamed_matmul']
