"""Networks and codecs in pure torch. Knows tensors, and of files only weights."""
