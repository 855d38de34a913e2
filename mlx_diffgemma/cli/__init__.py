"""The commands, one thin file each."""

from . import interrupt as interrupt
