"""`python -m train --config=configs/X.py[:variant] --workdir=DIR [--resume]`."""

import math
import os

from absl import flags, logging
from ml_collections import config_flags

from cnxs_jax import errors

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A recipe and its variant, e.g. configs/pixart_lcm.py:tiny."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: new, or one to go on with.")
RESUME = flags.DEFINE_bool("resume", False, "Go on with the run in --workdir.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Multi-host: host:port of process 0. Clusters that JAX knows need no flag."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Multi-host: number of processes.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Multi-host: this process, from 0.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Multi-host: find the cluster by itself.")

CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS")


def start_cluster():
    """`jax.distributed.initialize()` where a flag or the environment asks for it.

    Raises:
        DistributedError: incomplete arguments, or a cluster that did not come up.
    """
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    wanted = DISTRIBUTED.value or any(name in os.environ for name in CLUSTER_VARIABLES)
    if all(value is None for value in given) and not wanted:
        return
    if any(v is not None for v in given) and any(v is None for v in given):
        raise errors.DistributedError(
            f"--coordinator, --num_processes and --process_id belong together, got {given}",
            "command line",
            "give all three, or --distributed alone on a cluster that JAX knows",
        )
    import jax

    try:
        jax.distributed.initialize(*given)
    except Exception as error:
        raise errors.DistributedError(
            f"the cluster did not come up: {errors.first_line(error)}",
            f"coordinator {given[0] or 'found by JAX'}",
            "start all processes within five minutes, with one address and different ids",
        ) from error


def use_cores(config):
    """On a CPU, a device a core, up to the recipe's `cpu_devices` and as every batch divides.

    Before JAX has its devices. XLA runs the small operations of a small model on one core; a device
    each shares the batch. The environment's own number of devices wins.
    """
    most = config.get("cpu_devices")
    given = "JAX_NUM_CPU_DEVICES" in os.environ
    if not most or given or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    runs = [config[name] for name in config.get("stages") or () if name in config]
    # What is wrong in a config is said where it is checked, later: nothing may fail here.
    shared = math.gcd(*(run.batch_size // max(run.grad_accum, 1) for run in runs))
    devices = max(n for n in range(1, min(most, cores or 1) + 1) if shared % n == 0)
    jax.config.update("jax_num_cpu_devices", devices)


def main(argv):
    if len(argv) > 1:
        raise errors.ConfigError(f"unknown argument {argv[1]!r}", "command line", "see --help")
    logging.set_verbosity(logging.ERROR)  # Orbax writes dozens of lines about a healthy save
    use_cores(CONFIG.value)
    start_cluster()
    from train import loop

    loop.main(CONFIG.value, WORKDIR.value, RESUME.value)
    return 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator("workdir", bool, message="give a directory")
    errors.run_app(main)
