"""What mixers and models are built from: norms, convolutions, rotations, growing buffers."""
