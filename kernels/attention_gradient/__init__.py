"""How a loss changes with what follows a context, through its attention to both."""
