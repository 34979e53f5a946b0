"""Documents that every Python carries: no download."""
