"""People's own pictures as a searchable index."""
