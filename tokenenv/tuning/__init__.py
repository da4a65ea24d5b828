"""Search for the fastest model within an accuracy budget, on this machine's clock."""
