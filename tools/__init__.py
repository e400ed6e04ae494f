"""What maintainers run beside tests and benchmarks."""
