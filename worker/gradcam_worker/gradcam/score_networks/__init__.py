"""Networks that only give scores: any function, ONNX, TFLite, and Keras models that are not taken apart.

Begin at `score_network.ScoreNetwork` and `score_files.load_score_network`.
"""
