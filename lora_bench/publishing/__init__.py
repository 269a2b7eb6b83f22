"""A finished run as a repository of the Hugging Face hub: its files, its model card, and the upload."""
