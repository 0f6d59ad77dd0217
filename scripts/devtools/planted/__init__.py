"""Small networks on drawn shapes, with a shortcut planted into their training, for `gradcam audit` to find.

shapes    images of shapes with labels and boxes, with a plant or without
training  a small Keras network, trained on them in seconds
"""
