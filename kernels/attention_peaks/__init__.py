"""The largest attention that rows pay to each token of a context."""
