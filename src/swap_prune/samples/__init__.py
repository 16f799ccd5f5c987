"""The samples that a run looks at: how batches are taken apart, drawn, held out, and held."""
