"""Recipes of semantic segmentation."""
