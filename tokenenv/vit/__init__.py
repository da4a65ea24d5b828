"""A Vision Transformer in stages, and what can be done to its tokens."""
