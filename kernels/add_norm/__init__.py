"""A residual sum and its root mean square norm."""
