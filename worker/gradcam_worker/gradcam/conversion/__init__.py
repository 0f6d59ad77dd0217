"""Conversion of a classifier from another format into the `.keras` file that workers load."""
