"""The tasks: answer a prompt, fill a template, edit a text."""
