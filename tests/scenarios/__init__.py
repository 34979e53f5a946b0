"""Whole runs: resuming, kills, faults, jobs, world sizes.

Most of them train ``helpers.support.TINY`` with plugins that nanochat ships (bytes, parquet, gpt, muon_adamw, bpb,
samples, console), because what they guarantee is for those. ``test_third_party`` runs the core with none of them.
"""
