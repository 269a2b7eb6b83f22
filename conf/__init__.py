"""The configuration groups; a package only so that they travel inside the wheel."""
