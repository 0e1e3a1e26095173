"""Token-level fusion: what sources say of every token, in the pivot's words."""
