"""Energies of rows that are spread over the ranks of process groups."""
