"""Self-refined preference optimisation (arXiv:2405.21040) for JAX and TPU pods."""

__version__ = "0.1.0"
