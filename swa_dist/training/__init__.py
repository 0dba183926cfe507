"""The model's own training: its train function, its optimizers, and how much it is fed."""
