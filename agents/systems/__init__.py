"""The systems that can be trained: their settings, and what is built from them."""
