"""Folder or Hub repository -> model."""
