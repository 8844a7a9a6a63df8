"""Pictures: where they come from, and the order in which a run sees them."""

from mlx_hjepa.data.dataset import Dataset, Pictures, describe, load_dataset, validation_split
from mlx_hjepa.data.source import batches, indices, order, steps_per_epoch

__all__ = ["Dataset", "Pictures", "batches", "describe", "indices", "load_dataset", "order", "steps_per_epoch",
           "validation_split"]
