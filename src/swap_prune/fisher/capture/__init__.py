"""The rows of G: gradients of single samples or of mini-batches, taken, rounded, sketched, or taken again."""
