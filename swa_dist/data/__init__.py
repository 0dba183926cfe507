"""Data that `fit` takes: its kinds, its batch size, and a model's inputs from it."""
