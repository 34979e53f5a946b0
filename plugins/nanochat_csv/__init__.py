"""Logger ``csv``: tables that spreadsheets and pandas read."""
