"""Finding plugins: hooks, registries, options and the choices of an experiment."""
