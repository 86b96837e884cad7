"""What states go through before they are packed, one piece per file, and all that compose: a rotation of every head,
tokens of unit length, ranges that are cut. Attention is the same, to rounding, where nothing is quantized."""
