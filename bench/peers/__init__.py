"""What is measured: the package, and what one would take instead."""
