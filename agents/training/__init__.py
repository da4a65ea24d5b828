"""Training runs: the loop around a learner, its folder, its report."""
