"""What fewer tokens, and other keys and values, do to attention as a gradient sees it."""
