"""Sweepers and launchers. Hydra looks for them only below the package name `hydra_plugins`.

`config/compose.py` therefore appends this folder to that package's path before Hydra starts. This works from a clone
and from a wheel.
"""
