"""Speed: the kernels against the bytes they move, decoding end to end, and what the scorer costs at prefill."""
