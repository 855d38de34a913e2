"""The commands, each in its own short file."""

from . import interrupt as interrupt
