"""What a class is recognized by beside its object: suspects, and trials on the network. Begin at `gaze`."""
