"""spn4cir: composed image retrieval by scaling positives and negatives."""

__version__ = "0.1.0"
