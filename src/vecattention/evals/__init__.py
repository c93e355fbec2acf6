"""How good sparse attention is: fidelity to dense attention, and the quality of what models make with it."""
