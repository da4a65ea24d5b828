"""Policies: what decides in a game, learned or not."""
