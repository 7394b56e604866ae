"""Writing new tokens into the slots of the evicted ones."""
