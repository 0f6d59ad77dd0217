"""A model's graph: taken apart into steps, its logits and target layer found, checked to lie on the image.

Begin at `trace.trace_model`.
"""
