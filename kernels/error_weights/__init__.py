"""How much errors of keys, of queries and of values matter."""
