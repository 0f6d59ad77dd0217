"""Image bytes become pixels: one reader for the structure of each format; decoders get nothing but pixels.

Begin at `decode.decode`.
"""
