"""Per-sample gradients as rows of the Fisher factor G (n, p): capture, storage, noise."""
