"""Image bytes to pixels. Each format has a reader of its file structure; decoders receive only pixel data.

Begin at `decode.decode`.
"""
