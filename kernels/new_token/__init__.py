"""The new token of a decode step, from its projections to its place in the store."""
