"""Logger ``wandb``: Weights & Biases, online or offline."""
