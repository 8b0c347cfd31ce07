"""Runs of one process or several: their arguments, the environment that a launcher leaves, and their end."""

import os
import subprocess
import time
from argparse import ArgumentParser

import torch
from _errors import ConfigError


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add what a run of mmengine's Runner has."""
    parser.add_argument("--work-dir", help="where to save; default: the config's, else work_dirs/<config name>")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none",
                        help="what started the processes of a run with several")  # fmt: skip
    parser.add_argument("--local-rank", "--local_rank", type=int, help="set by old launchers")


def set_environment(launcher: str, local_rank: int | None) -> None:
    """Set the environment variables of torchrun, whatever launched the process."""
    theirs = {
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
        "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    }
    if launcher == "none":
        return
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name, source in zip(ours, theirs.get(launcher, ours), strict=True):
        if source not in os.environ:
            start = {"pytorch": "tools/dist_train.sh", "slurm": "tools/slurm_train.sh", "mpi": "mpirun"}[launcher]
            raise ConfigError(f"--launcher {launcher}: {source} is not set; start the processes with {start}")
        os.environ[name] = os.environ[source]
    if launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        hosts = subprocess.check_output(["scontrol", "show", "hostnames", os.environ["SLURM_NODELIST"]], text=True)
        os.environ["MASTER_ADDR"] = hosts.split()[0]
    if "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"--launcher {launcher}: set MASTER_ADDR to the machine of the first process")
    os.environ.setdefault("MASTER_PORT", "29500")


def finish() -> None:
    """Leave the group of processes, if there are several.

    A thread of Gloo that still lets go of a tensor when the interpreter ends aborts the process. Each needs Python for
    it, which is free while this one sleeps.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.1)
