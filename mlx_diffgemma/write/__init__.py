"""The tasks: answering a prompt, filling a template, editing a text."""
