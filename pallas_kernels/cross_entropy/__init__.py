"""Head and cross entropy in one: `from pallas_kernels.cross_entropy import cross_entropy`."""
from pallas_kernels.cross_entropy.api import cross_entropy, token_losses

__all__ = ['cross_entropy', 'token_losses']
