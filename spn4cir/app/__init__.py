"""The page and the REST service over an index; they read ``SearchableIndex`` only."""
