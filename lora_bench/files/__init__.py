"""Reading and writing files: atomic writes, untrusted files, caches, and paths that a user typed."""
