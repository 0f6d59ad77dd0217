"""The formulas: `cam` has them, `gradients` is what each backend calls gradients."""
