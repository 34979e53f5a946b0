"""Logger ``tensorboard``: event files for TensorBoard."""
