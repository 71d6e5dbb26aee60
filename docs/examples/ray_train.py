"""Ray Train on one slice of 16 TPU v6e chips. Start it in the checkout, on the head node."""

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer


def train(settings):
    """Runs in every worker, after Ray has started jax.distributed there."""
    from configs import pixart_lcm
    from train import loop

    config = pixart_lcm.get_config("xl_512")
    config.teacher_path = settings["teacher_path"]
    loop.main(config, settings["workdir"], resume=True)


ray.init(runtime_env={"working_dir": "."})
JaxTrainer(
    train,
    train_loop_config={
        "teacher_path": "/mnt/models/PixArt-XL-2-512x512",
        "workdir": "/mnt/runs/lcm_512",
    },
    scaling_config=ScalingConfig(
        use_tpu=True,
        num_workers=4,
        topology="4x4",
        accelerator_type="TPU-V6E",
        resources_per_worker={"TPU": 4},
    ),
    run_config=RunConfig(name="pixart-lcm", storage_path="/mnt/ray"),
).fit()
