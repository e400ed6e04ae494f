"""What it is measured on: a study for each question."""
