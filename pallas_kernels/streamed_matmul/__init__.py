"""Products of few rows at the speed of a CPU's memory: `from pallas_kernels.streamed_matmul import
streamed_matmul`; and rows of such matrices, `streamed_rows`."""
from pallas_kernels.streamed_matmul.api import Streamed, streamed_matmul, streamed_rows

__all__ = ['Streamed', 'streamed_matmul', 'streamed_rows']
