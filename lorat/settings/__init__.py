"""Every setting once: its type and help, what contradicts what, and how it is read."""
