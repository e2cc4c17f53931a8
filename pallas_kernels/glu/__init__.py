"""The activation of a gated feed-forward: `from pallas_kernels.glu import glu`."""
from pallas_kernels.glu.api import glu

__all__ = ['glu']
