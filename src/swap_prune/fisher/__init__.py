"""The Fisher factor G (n, p), whose rows are gradients: capture, storage, noise, and the defence against that."""
