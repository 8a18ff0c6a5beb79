"""The models whose KV cache can be played: their shapes, and the bytes and operations that follow from a shape.

Imports nothing heavy: `mlpstorage --help` pays for it.
"""

from mlpstorage.models.architecture import Architecture, Experts, LatentAttention
from mlpstorage.models.shape import BYTES_PER_VALUE, ModelShape
from mlpstorage.models.table import MODELS

__all__ = ["BYTES_PER_VALUE", "MODELS", "Architecture", "Experts", "LatentAttention", "ModelShape"]
