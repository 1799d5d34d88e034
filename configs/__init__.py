"""Recipes. Each file opens with the command that runs it and the result to expect."""
