"""Which SAEs are trained: the space, the search, a trial, what is pruned, and the table of all."""
