"""Rotary positions of queries and keys: `from pallas_kernels.rotary import rotary`."""
from pallas_kernels.rotary.api import rotary

__all__ = ['rotary']
