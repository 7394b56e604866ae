"""One decode step's keys and values into the slots of the evicted tokens."""
