"""Where tests call the GPU kernels: on the NVIDIA GPU in use, else interpreted on the CPU."""
import jax

INTERPRET = jax.default_backend() != 'gpu'
