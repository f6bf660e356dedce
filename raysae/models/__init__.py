"""Host a transformer: named sites, reads and edits, for the architectures in `resolvers`."""
