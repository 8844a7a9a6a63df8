"""H-JEPA, a hierarchical joint-embedding predictive architecture, trained and evaluated with MLX."""

from . import backend

backend.prepare()  # before MLX is imported: it decides which BLAS the CPU back-end gets

__version__ = "0.1.0"
