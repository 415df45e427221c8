"""Bounds of the length of a row, in tokens. A module of its own, because command lines are checked by them."""

MIN_SEQ_LENGTH = 5  # the shortest target length of an example that is drawn
MAX_SEQ_LENGTH = 65535  # `segment_lengths` are 16-bit
