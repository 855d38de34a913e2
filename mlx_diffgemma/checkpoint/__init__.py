"""Loading of a model from a folder or Hub repository."""
