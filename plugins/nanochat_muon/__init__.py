"""Optimizer plugin ``muon_adamw``: Muon for the matrices of the blocks, AdamW for everything else."""
