"""PPO and MAPPO: learners, critics, losses, rollouts, and the environments they play."""
