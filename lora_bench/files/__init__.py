"""Reading and writing files: atomic writes, files of unknown origin, caches, paths that a user typed."""
