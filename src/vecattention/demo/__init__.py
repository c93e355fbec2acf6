"""`vecattention demo`: the same questions about a film, answered with full and with vector-sparse attention."""
