"""Logger ``csv``: a table that spreadsheets and pandas read."""
