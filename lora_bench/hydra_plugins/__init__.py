"""What Hydra finds of ours: it looks for sweepers and launchers only below the package name `hydra_plugins`.

`cli.py` therefore appends this folder to that package's path before Hydra starts: it works from a clone and from a
wheel.
"""
