"""Toy plug-ins: each in one file, known by one dictionary line."""
