"""Training a backbone together with what removes its tokens, one trainer for all methods."""
