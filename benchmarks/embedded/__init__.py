"""How the data and weights in ``spn4cir/embedded`` were made."""
