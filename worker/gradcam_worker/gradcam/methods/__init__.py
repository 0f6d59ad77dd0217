"""The formulas of the methods, in `cam`, and the passes that compute their inputs, in `gradients`."""
