"""`Slurm()`: nodes that a Slurm cluster grants, or those of the job that this process is in."""

from .provider import Slurm as Slurm
