"""The faces of the game: PettingZoo, Gymnasium, vectorised Gymnasium; and their registration."""
