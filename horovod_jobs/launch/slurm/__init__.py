"""``launch=slurm``: a batch job. ``plan`` submits it, ``script`` writes its text."""
