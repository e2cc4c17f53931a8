"""LayerNorm and RMSNorm, with a residual added: `from pallas_kernels.norm import norm`."""
from pallas_kernels.norm.api import norm

__all__ = ['norm']
