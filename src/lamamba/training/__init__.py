"""Training: setting up a run, its steps, EMAs and log."""
