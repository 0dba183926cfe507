"""Exact batch normalization statistics: observed in each layer, pooled, recomputed in one pass."""
