"""Many runs: packing them onto devices, worker processes, Slurm, cost estimates, the transfer matrix."""
