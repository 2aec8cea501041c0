"""A grid of cells run to the end: planned, stored cell by cell, resumed where it stopped."""
