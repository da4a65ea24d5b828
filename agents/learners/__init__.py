"""PPO, MAPPO and what they learn from."""
