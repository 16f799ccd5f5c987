"""Can the samples be believed? Labels and inputs that the dense network contradicts."""
