"""Super-resolution: networks, training data, the crop baselines and the training loop."""
