#!/usr/bin/env bash
# One slice of 16 TPU v5e chips (4 hosts). The image: docs/examples/Dockerfile.
set -eu
xpk workload create --cluster=CLUSTER --project=PROJECT --zone=ZONE \
  --workload=pixart-lcm --tpu-type=v5litepod-16 --num-slices=1 --max-restarts=10 \
  --docker-image=REGISTRY/cnxs_jax \
  --command="python -m train --config=configs/pixart_lcm.py:xl_512 --workdir=/mnt/runs/lcm_512 --config.teacher_path=/mnt/models/PixArt-XL-2-512x512 --distributed --resume"
