"""`lm`: language models in JAX, from raw documents to a served model."""

__version__ = '0.1.0'
