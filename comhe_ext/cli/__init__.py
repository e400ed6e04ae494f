"""What the command `comhe-ext` does, a module for each of its commands."""
