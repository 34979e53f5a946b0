"""Reading experiments: TOML files, what they extend and overrides become an Experiment, each value with its origin."""
