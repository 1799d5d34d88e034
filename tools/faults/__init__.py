"""The fault campaign: does real damage to the real command line, and counts what was tried and what was lost."""
