"""Training under a mask, and what the dense network teaches."""
