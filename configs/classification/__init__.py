"""Classification recipes."""
