"""Transfer studies: which cells there are, computing them here or on more machines, and the tables of what came out."""
