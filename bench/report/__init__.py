"""What it shows: tables and pictures out of the files of results."""
