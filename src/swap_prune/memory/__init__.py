"""How much memory a run may hold, how much it will need, and how G is held so that it fits."""
