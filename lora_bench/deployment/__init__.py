"""Exports of a whole run for deployment: a graph from tokens to scores, and the script that feeds it."""
